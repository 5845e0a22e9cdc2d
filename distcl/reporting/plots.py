"""The plots of a report, drawn by matplotlib; as SVG they follow the page's light or dark colours.

Every function returns a ``Figure``; :func:`svg` and :func:`save_png` turn it into what is needed.
Nothing here knows of run folders.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from distcl.reporting.figures import Words

Entry = float | None
Matrix = Sequence[Sequence[Entry]]

COLORS = {
    "ink": ("#1c2127", "#e6e9ee"),
    "soft": ("#66707c", "#99a3b0"),
    "grid": ("#dfe3e8", "#323942"),
    "c1": ("#2f6fb3", "#6aaaf0"),
    "c2": ("#c8632b", "#f0955c"),
    "c3": ("#2c8a66", "#55c79b"),
    "c4": ("#8a57a8", "#c394e0"),
    "c5": ("#9c7c16", "#d9b84a"),
    "c6": ("#b23f5c", "#ef8299"),
    "alarm": ("#c22f2f", "#ff7f76"),
}
"""Name → (light, dark). Figures are drawn in light colours; SVG names them, CSS decides."""

INK, SOFT, GRID = (COLORS[name][0] for name in ("ink", "soft", "grid"))
LINES = [COLORS[f"c{k}"][0] for k in range(1, 7)]
ALARM = COLORS["alarm"][0]

WIDTH = 4.3  # inches of every figure, such that its text can be read on a phone
_MOST_ROWS = 12  # rounds of one plot
_HEAT = LinearSegmentedColormap.from_list("heat", ["#f4e7c3", "#e0a458", "#a4496a", "#3b2a63"])
_STYLE: Any = {  # matplotlib's rcParams, in force while a figure is made
    "font.family": ["DejaVu Sans"],
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.edgecolor": SOFT,
    "axes.labelcolor": SOFT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": False,
    "grid.color": GRID,
    "text.color": INK,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.6,
    "svg.fonttype": "none",
}
_styled = matplotlib.rc_context(_STYLE)


def svg(figure: Figure, name: str) -> str:
    """Return a figure as an ``<svg>`` element; its ids begin with ``name``, letters and hyphens."""
    stream = io.StringIO()
    style: Any = {"svg.hashsalt": name, "svg.fonttype": "none", "image.composite_image": False}
    with matplotlib.rc_context(style):
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(stream, format="svg", metadata=nothing, transparent=True)
    text = stream.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'<g id="[^"]*">', "<g>", text)
    text = re.sub(r'(\bid="|"#|url\(#)', rf"\g<1>{name}-", text)
    for key, (light, _) in COLORS.items():
        text = text.replace(light, f"var(--{key})")
    text = text.replace("'DejaVu Sans'", "inherit")
    return re.sub(r' (width|height)="[\d.]+pt"', "", text, count=2)


def save_png(figure: Figure, path: Path) -> None:
    """Write a figure as a PNG file on white."""
    figure.savefig(path, format="png", dpi=160, facecolor="white")


@_styled
def matrix(rows: Matrix, names: Sequence[str], words: Words, marked: Sequence[int] = ()) -> Figure:
    """Heat map of the accuracy matrix: a row per evaluation, a column per experience; dark is good.

    Of a score of which less is better, colours follow its logarithm where it spans much.
    ``marked``: columns, from 0, whose numbers get an asterisk.
    """
    rows, names = rows[-_MOST_ROWS * 2 :], names[-_MOST_ROWS * 2 :]
    values = np.array(rows, dtype=float)
    high, width = values.shape
    figure, axes = _figure(0.9 + 0.31 * high)
    scale = _goodness(values, words.higher)
    for i, j in np.ndindex(high, width):
        if np.isfinite(values[i, j]):
            color = _HEAT(0.05 + 0.95 * scale[i, j])
            axes.add_patch(Rectangle((j - 0.48, i - 0.46), 0.96, 0.92, color=color, lw=0))
            if width <= 10:
                text = "white" if scale[i, j] > 0.45 else "black"
                shown = words.number(float(values[i, j]), most=2)
                axes.text(j, i, shown, ha="center", va="center", color=text, fontsize=8)
    axes.set(xlim=(-0.5, width - 0.5), ylim=(high - 0.5, -0.5), xlabel="experience")
    _whole_ticks(axes, width, marked=marked)
    _bare(axes, names)
    return figure


@_styled
def confusion(counts: Sequence[Sequence[int]], names: Sequence[str]) -> Figure:
    """Heat map of what each class, a row, is taken for; colours are shares of the row."""
    values = np.array(counts, dtype=float)
    size = len(values)
    shares = values / np.maximum(values.sum(1, keepdims=True), 1)
    figure, axes = _figure(1.0 + max(0.31 * min(size, 12), 0.09 * size))
    axes.pcolormesh(shares, cmap=_HEAT, vmin=0, vmax=1, rasterized=size > 30)
    if size <= 12:
        for i, j in np.ndindex(size, size):
            color = "white" if shares[i, j] > 0.45 else "black"
            place: Any = {"ha": "center", "va": "center", "fontsize": 7, "color": color}
            axes.text(j + 0.5, i + 0.5, f"{values[i, j]:.0f}", **place)
    axes.set(xlim=(0, size), ylim=(size, 0), xlabel="predicted")
    ticks, names = [k + 0.5 for k in range(size)], [name[:24] for name in names]
    turned = 90 if size > 20 or max(map(len, names)) > 3 else 0
    axes.set_xticks(ticks, names, rotation=turned)
    _bare(axes, names, ticks)
    axes.tick_params(labelsize=7 if size <= 30 else 4)
    return figure


@_styled
def forgetting(values: Sequence[Entry], words: Words) -> Figure:
    """Bars: points, or what the score is in, lost of each experience since it was known best."""
    figure, axes = _figure(2.1)
    points = words.scale * np.array(values, dtype=float)
    colors = [LINES[1] if v > 0 else LINES[2] for v in points]
    axes.bar(range(len(points)), points, color=colors, width=0.62)
    axes.axhline(0, color=SOFT, lw=0.8)
    for k, v in enumerate(points):
        if np.isfinite(v) and len(points) <= 12:
            offset = (0, 3 if v >= 0 else -3)
            place: Any = {"textcoords": "offset points", "ha": "center", "fontsize": 8}
            place["va"] = "bottom" if v >= 0 else "top"
            axes.annotate(words.number(v / words.scale, "+", most=2), (k, v), offset, **place)
    axes.margins(y=0.22)
    axes.set(xlabel="experience", ylabel=f"{words.gain} forgotten")
    _whole_ticks(axes, len(points))
    return figure


@_styled
def watched(
    positions: Sequence[float], values: Sequence[float], drifts: Sequence[float], metric: str
) -> Figure:
    """The watched metric over stream positions, with the drifts that were detected."""
    figure, axes = _figure(2.2)
    x, y = np.asarray(positions, dtype=float), np.asarray(values, dtype=float)
    axes.plot(x, y, color=LINES[0], lw=0.6, alpha=0.4)
    width = max(1, min(9, len(y) // 8))
    axes.plot(x, _smooth(y, width), color=LINES[0], label=f"{metric}, running mean")
    for k, drift in enumerate(drifts):
        label = "drift detected" if k == 0 else None
        axes.axvline(drift, color=ALARM, lw=1.1, ls=(0, (4, 2)), label=label)
    axes.set(xlabel="stream position (samples)", ylabel=metric)
    _legend(axes, 2)
    return figure


@_styled
def loss(
    steps: Sequence[int], values: Sequence[float], begins: Sequence[tuple[int, str]]
) -> Figure:
    """Training loss over steps; ``begins``: (first step, name) of each round."""
    figure, axes = _figure(2.2)
    axes.plot(steps, values, color=LINES[0], lw=1.2)
    top = axes.get_xaxis_transform()
    apart, last = 0.05 * (steps[-1] - steps[0]), -np.inf
    for step, name in begins:
        axes.axvline(step, color=GRID, lw=1, zorder=0)
        if step - last >= apart:
            axes.text(step, 1.02, name, transform=top, fontsize=8, color=SOFT)
            last = step
    axes.set(xlabel="optimizer step", ylabel="training loss")
    axes.set_ylim(bottom=0) if min(values) >= 0 else None
    return figure


@_styled
def weight_histograms(
    histograms: Sequence[npt.NDArray[np.float64]],
    edges: npt.NDArray[np.float64],
    ess: Sequence[Entry],
    names: Sequence[str],
) -> Figure:
    """Spread of draw weights, a ridge per round, and the effective sample size beside it."""
    shares = [np.asarray(h, dtype=float) / max(h.sum(), 1) for h in histograms][-_MOST_ROWS:]
    ess, names = ess[-_MOST_ROWS:], names[-_MOST_ROWS:]
    figure = _canvas(1.0 + 0.36 * len(shares))
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=[3, 1])
    top = max(float(share.max()) for share in shares)
    for k, share in enumerate(shares):
        line = k - 0.85 * share / top
        left.stairs(line, edges, baseline=k, fill=True, color=LINES[0], alpha=0.75, lw=0)
        left.axhline(k, color=GRID, lw=0.7, zorder=0)
        value = ess[k]
        if value is not None:
            right.barh(k - 0.3, value, height=0.42, color=LINES[2])
            right.text(value + 0.05, k - 0.3, f"{value:.0%}", va="center", fontsize=8)
    left.axvline(1, color=SOFT, lw=0.8, ls=":")
    occupied = np.flatnonzero(np.sum(shares, axis=0))
    low, high = min(edges[occupied[0]], 0.5), max(edges[occupied[-1] + 1], 2.0)
    left.set(xscale="log", xlim=(low, high), ylim=(len(shares) - 0.8, -1.0))
    left.set(xlabel="draw weight (1 = uniform)")
    left.set_yticks(range(len(shares)), names)
    digits = (1, 2, 5) if high / low < 30 else (1,)
    left.xaxis.set_major_locator(LogLocator(subs=digits, numticks=6))
    left.xaxis.set_minor_locator(NullLocator())
    left.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    right.set(xlim=(0, 1.5), xlabel="effective\nsample size")
    right.set_xticks([0, 1], ["0", "100 %"])
    for axes in (left, right):
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
    return figure


@_styled
def most_drawn(
    images: Sequence[npt.NDArray[np.uint8]], captions: Sequence[Sequence[str]], names: Sequence[str]
) -> Figure:
    """Thumbnails of the samples drawn most, a row per round; images: uint8 [n, h, w, 1 or 3]."""
    images, captions, names = images[-_MOST_ROWS:], captions[-_MOST_ROWS:], names[-_MOST_ROWS:]
    across = 6
    figure, axes = _figure(0.1 + 0.84 * len(images))
    for row, (pictures, texts) in enumerate(zip(images, captions, strict=True)):
        for column, (picture, text) in enumerate(zip(pictures[:across], texts, strict=False)):
            high, wide = np.array(picture.shape[:2]) / max(picture.shape)
            left, top = column + 0.5 - 0.45 * wide, 1.25 * row + 0.9 - 0.9 * high
            drawn = picture[..., 0] if picture.shape[-1] == 1 else picture
            place = (left, left + 0.9 * wide, top + 0.9 * high, top)
            axes.imshow(drawn, "gray", vmin=0, vmax=255, interpolation="nearest", extent=place)
            axes.text(column + 0.5, top - 0.06, text, ha="center", va="bottom", fontsize=7.5)
    axes.set(xlim=(0, across), ylim=(1.25 * len(images) - 0.3, -0.3), aspect="equal")
    axes.set_xticks([])
    _bare(axes, names, [1.25 * row + 0.45 for row in range(len(images))])
    return figure


@_styled
def times(stages: Sequence[str], parts: Mapping[str, Sequence[float]]) -> Figure:
    """Stacked bars: seconds of each stage of the run, by what they were spent on."""
    shown = stages[-2 * _MOST_ROWS :]
    figure, axes = _rows(shown, "seconds", 0.95 + 0.24 * len(shown))
    left = np.zeros(len(shown))
    for k, (name, seconds) in enumerate(parts.items()):
        values = np.asarray(seconds, dtype=float)[-len(shown) :]
        if values.any():
            axes.barh(range(len(shown)), values, left=left, color=LINES[k], height=0.66, label=name)
            left += values
    axes.margins(x=0.05)
    _legend(axes, 4)
    return figure


@_styled
def curves(series: Mapping[str, Sequence[Sequence[float]]], ylabel: str) -> Figure:
    """Lines of several variants: mean over runs, and the spread (standard deviation) as a band.

    Each variant has a list of runs, each a value per evaluation; runs may differ in length.
    """
    figure, axes = _figure(2.6)
    for k, (name, runs) in enumerate(series.items()):
        columns = [[v for v in column if v is not None] for column in zip_longest(*runs)]
        mean = np.array([fmean(column) for column in columns])
        color, x = LINES[k % len(LINES)], np.arange(len(mean))
        axes.plot(x, mean, color=color, marker="o", ms=3, label=name)
        if len(runs) > 1:
            spread = np.array([_spread(column) for column in columns])
            axes.fill_between(x, mean - spread, mean + spread, color=color, alpha=0.18, lw=0)
    axes.set(xlabel="evaluation", ylabel=ylabel)
    _whole_ticks(axes, max(len(run) for runs in series.values() for run in runs))
    _legend(axes, 1)
    return figure


@_styled
def dots(groups: Mapping[str, Sequence[float]], xlabel: str) -> Figure:
    """One value per run: dots of each variant, with mean and standard deviation."""
    figure, axes = _rows([name.replace(", ", "\n") for name in groups], xlabel)
    for k, values in enumerate(groups.values()):
        color = _dots(axes, values, k)
        bar: Any = {"fmt": "|", "ms": 12, "mew": 2, "color": color, "capsize": 3}
        axes.errorbar(fmean(values), k, xerr=_spread(values), **bar)
    return figure


@_styled
def differences(groups: Mapping[str, tuple[Sequence[float], float, float]], xlabel: str) -> Figure:
    """Paired differences: a dot per pair, the mean, and its confidence interval (low, high)."""
    figure, axes = _rows([name.replace("; ", "\n") for name in groups], xlabel)
    axes.axvline(0, color=SOFT, lw=0.8)
    for k, (values, low, high) in enumerate(groups.values()):
        color = _dots(axes, values, k)
        axes.plot([float(np.mean(values))], [k], "|", ms=14, mew=2, color=color)
        axes.plot([low, high], [k, k], color=color, lw=2)
    return figure


def _goodness(values: npt.NDArray[np.float64], higher: bool) -> npt.NDArray[np.float64]:
    """Return where each value lies between bad, 0, and good, 1."""
    known = values[np.isfinite(values)]
    if higher:
        low = float(min(known.min(initial=1.0), 0.99))
        found = (values - low) / (max(float(known.max(initial=1.0)), low + 1e-9) - low)
    else:
        if len(known) and 0 < 20 * known.min() < known.max():
            values, known = np.log(values), np.log(known)
        worst = float(known.max(initial=-np.inf))
        if len(known) and worst == known.min():
            return np.ones_like(values)
        found = (worst - values) / max(worst - float(known.min(initial=np.inf)), 1e-9)
    return found


def _rows(names: Sequence[str], xlabel: str, height: float = 0.0) -> tuple[Figure, Axes]:
    """Return a figure with a row per name; ``height``: of all; 0: what the names need."""
    figure, axes = _figure(height or 0.75 + 0.2 * sum(n.count("\n") + 1.7 for n in names))
    axes.set(xlabel=xlabel, ylim=(len(names) - 0.5, -0.5))
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(axis="y", length=0)
    axes.margins(x=0.1)
    return figure, axes


def _bare(axes: Axes, names: Sequence[str], places: Sequence[float] = ()) -> None:
    """Name the rows, at their places or one by one, and take ticks and frame away."""
    axes.set_yticks(places or range(len(names)), names)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def _legend(axes: Axes, columns: int) -> None:
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=columns)


def _spread(values: Sequence[float]) -> float:
    return stdev(values) if len(values) > 1 else 0.0


def _dots(axes: Axes, values: Sequence[float], row: int) -> str:
    color = LINES[row % len(LINES)]
    axes.plot(values, [row] * len(values), "o", ms=4, color=color, alpha=0.45, mew=0)
    return color


def _canvas(height: float) -> Figure:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _figure(height: float) -> tuple[Figure, Axes]:
    figure = _canvas(height)
    return figure, figure.add_subplot()


def _whole_ticks(axes: Axes, number: int, first: int = 1, marked: Sequence[int] = ()) -> None:
    places = range(0, number, max(1, -(-number // 12)))
    axes.set_xticks(places, [f"{k + first}{'*' if k in marked else ''}" for k in places])


def _smooth(values: npt.NDArray[np.float64], width: int) -> npt.NDArray[np.float64]:
    """Return the running mean over ``width`` values, of fewer at both ends."""
    kernel = np.ones(width)
    counts = np.convolve(np.ones(len(values)), kernel, "same")
    smooth: npt.NDArray[np.float64] = np.convolve(values, kernel, "same") / counts
    return smooth
