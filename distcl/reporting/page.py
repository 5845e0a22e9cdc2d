"""``report.html``: one file that shows what a run, or several, kept and forgot. Needs no network.

Every plot is an inline SVG; colours follow the reader's light or dark setting.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import zip_longest
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import jinja2
from markupsafe import Markup
from matplotlib.figure import Figure

from distcl import __version__
from distcl.config.files import write_atomically
from distcl.errors import UsageError
from distcl.reporting import plots
from distcl.reporting.comparison import Arm
from distcl.reporting.run_reader import Run, read_run, variants
from distcl.reporting.status import clock
from distcl.reporting.verdict import Result, differences, table
from distcl.types import unpack_ids

_FIGURES = (
    ("average_accuracy", "average accuracy", "over all experiences, at the end", "%"),
    ("average_forgetting", "forgetting", "since each was known best; less is better", "points"),
    ("worst_experience_accuracy", "worst experience", "at the end", "%"),
    ("average_anytime_accuracy", "anytime accuracy", "mean over the run", "%"),
    ("backward_transfer", "backward transfer", "what later rounds did to earlier ones", "points"),
    ("forward_transfer", "forward transfer", "known before being trained on", "points"),
)
_PARTS = {"cur": "current data", "hist": "history"}


@dataclass(frozen=True)
class Plot:
    """A figure in the page: its title, a line below it, and the name of its PNG file."""

    name: str
    title: str
    note: str
    figure: Figure

    @property
    def svg(self) -> Markup:
        """The figure as an element of the page."""
        return Markup(plots.svg(self.figure, self.name))  # made by matplotlib, text escaped


@dataclass(frozen=True)
class Section:
    """A run's part of the page."""

    run: Run
    facts: list[tuple[str, str]]
    tiles: list[tuple[str, str, str, str]]
    plots: list[Plot]
    rounds: list[list[str]]
    guard: list[str]
    top: list[tuple[str, list[list[str]]]]


def write_report(folders: Sequence[Path], out: Path, png: Path | None = None) -> list[Path]:
    """Write the report of run folders to the file ``out``; return the PNG files written to ``png``.

    Raises UsageError naming what cannot be read or written.
    """
    runs = [read_run(folder) for folder in dict.fromkeys(folders)]
    if not runs:
        raise UsageError("a report needs at least one run folder")
    sections = [_section(run, k) for k, run in enumerate(runs)]
    comparison = _comparison(runs) if len(runs) > 1 else None
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
    return write_page(title, sections, comparison, out, png)


def write_page(
    title: str,
    sections: Sequence[Section],
    comparison: Comparison | None,
    out: Path,
    png: Path | None = None,
) -> list[Path]:
    """Write a page to the file ``out``, and its plots to ``png``; return the latter's files.

    Raises UsageError naming what cannot be written.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("distcl"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("report.html.j2").render(
        title=title,
        sections=sections,
        comparison=comparison,
        colors=plots.COLORS,
        version=__version__,
        written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )
    every = [*(comparison.plots if comparison else []), *(p for s in sections for p in s.plots)]
    written = []
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(out, page)
        if png is not None:
            png.mkdir(parents=True, exist_ok=True)
            for plot in every:
                written.append(png / f"{plot.name}.png")
                plots.save_png(plot.figure, written[-1])
    except OSError as error:
        raise UsageError(
            f"'{error.filename or out}' cannot be written: {error.strerror}"
        ) from error
    return written


# -- one run ------------------------------------------------------------------------------------


def _section(run: Run, index: int) -> Section:
    drawn: list[Plot | None] = [
        _matrix(run),
        _forgetting(run),
        _watched(run),
        _loss(run),
        *(_weights(run, part) for part in _PARTS),
        _most_drawn(run),
        _times(run),
    ]
    prefix = f"{index + 1:02d}-{re.sub(r'[^A-Za-z0-9_.]+', '-', run.name)}-"
    found = [Plot(prefix + p.name, p.title, p.note, p.figure) for p in drawn if p is not None]
    return Section(
        run=run,
        facts=_facts(run),
        tiles=_tiles(run),
        plots=found,
        rounds=[_round_row(report) for report in run.rounds],
        guard=[
            f"Guard, round {report['round']}: {report['guard']['words']}."
            for report in run.rounds
            if report.get("guard", {}).get("words")
        ],
        top=_top(run),
    )


def _tiles(run: Run) -> list[tuple[str, str, str, str]]:
    """Return (name, value, unit, note) of each metric that the run has."""
    percent = run.metric == "accuracy"
    tiles = []
    end = run.summary.get("stream_end")
    if end:
        told = f"{100 * (1 - end['accuracy']):.1f}" if percent else f"{end['r2']:.3f}"
        name, unit = ("error on the stream", "%") if percent else ("R² on the stream", "")
        note = f"at the end, of its last {end['samples']:,} samples"
        tiles.append((name, told.replace("-", "−"), unit, note))
    for key, name, note, unit in _FIGURES:
        figure = run.summary.get(key)
        if figure is not None:
            shown = f"{100 * figure:.1f}" if percent else f"{figure:.3f}"
            if not percent:
                name, unit = name.replace("accuracy", "R²"), ""
            tiles.append((name, shown.replace("-", "−"), unit, note))
    return tiles


def _facts(run: Run) -> list[tuple[str, str]]:
    summary, config = run.summary, run.config
    continual = config.get("continual_learning", {})
    priority = config.get("priority", {})
    stream = config.get("stream", {})
    facts = [("state", run.state + (f": {run.reason}" if run.reason else ""))]
    if stream:
        drift = stream.get("drift", "")
        drift = ", ".join(drift) if isinstance(drift, list) else drift
        facts.append(("stream", f"{stream.get('source')}, drift: {drift}"))
    if continual:
        facts.append(("update mode", str(continual.get("update_mode"))))
        by = f"by {priority.get('signal')}, α = {continual.get('importance_alpha')}"
        facts.append(("draws", by if continual.get("importance_weighting") else "uniform"))
    facts.append(("seed", str(summary.get("seed", config.get("run", {}).get("seed", "?")))))
    if summary:
        facts.append(("ranks", f"{summary['world_size']} ({summary['strategy']})"))
        facts.append(("time", clock(summary["seconds"])))
        if summary.get("samples_per_second"):
            facts.append(("rate", f"{summary['samples_per_second']:,.0f} samples/s"))
        if summary.get("drifts"):
            facts.append(("drifts at", ", ".join(map(str, summary["drifts"]))))
    return facts


def _matrix(run: Run) -> Plot | None:
    rows = run.accuracy
    if not rows or not rows[0]:
        return None
    name, unit = ("accuracy", ", in %") if run.metric == "accuracy" else ("R²", "")
    note = "Rows: after each round. Columns: held-out data of each experience."
    marked = run.untrained
    if marked:
        note += " *: never trained on, and not in the averages."
    figure = plots.matrix(rows, run.row_names, run.metric, marked)
    return Plot("accuracy", f"{name} matrix{unit}", note, figure)


def _forgetting(run: Run) -> Plot | None:
    values = run.matrix().forgetting()
    if not any(value is not None for value in values):
        return None
    name = "accuracy" if run.metric == "accuracy" else "R²"
    note = f"Best {name} before the last round minus {name} after it; below zero: improved."
    figure = plots.forgetting(values, run.metric)
    return Plot("forgetting", "forgetting of each experience", note, figure)


def _watched(run: Run) -> Plot | None:
    metric = run.watched()
    x, y = run.series(f"monitor/{metric}", "position")
    if len(x) < 2:
        return None
    drifts = run.summary.get("drifts") or []
    note = f"{len(drifts)} drifts detected." if len(drifts) != 1 else "One drift detected."
    figure = plots.watched(x, y, drifts, metric)
    return Plot("watched", f"{metric} on the stream", note, figure)


def _loss(run: Run) -> Plot | None:
    x, y = run.series("loss", "step")
    if len(x) < 2:
        return None
    begins: dict[int, int] = {}
    previous = 0
    for line in run.lines:
        if "loss" in line:
            begins.setdefault(line["round"], previous)
            previous = line["step"]
    names = [(step, str(k) if k else "pre") for k, step in begins.items()]
    figure = plots.loss([int(step) for step in x], y, names)
    return Plot(
        "loss", "training loss", "Mean over the steps between two polls. Above: rounds.", figure
    )


def _weights(run: Run, part: str) -> Plot | None:
    numbers = [k for k, arrays in run.draws.items() if f"{part}_counts" in arrays]
    if not numbers:
        return None
    reports = {r["round"]: r.get("priority", {}) for r in run.rounds}
    ess = [reports.get(k, {}).get(part, {}).get("ess_fraction") for k in numbers]
    figure = plots.weights(
        [run.draws[k][f"{part}_counts"] for k in numbers],
        run.draws[numbers[0]][f"{part}_edges"],
        ess,
        [f"round {k}" for k in numbers],
    )
    title = f"priorities of the {_PARTS[part]}"
    note = "How many samples have which draw weight; 1 is the weight of uniform draws."
    return Plot(f"weights-{part}", title, note, figure)


def _most_drawn(run: Run) -> Plot | None:
    numbers = [k for k, arrays in run.draws.items() if arrays["thumbnails"].ndim == 4]
    if not numbers:
        return None
    captions = []
    for k in numbers:
        arrays = run.draws[k]
        names = [f" “{name}”" for name in run.class_names(arrays["labels"])]
        pairs = zip_longest(arrays["counts"].tolist(), names, fillvalue="")
        captions.append([f"×{count}{name}" for count, name in pairs])
    pictures = [run.draws[k]["thumbnails"] for k in numbers]
    figure = plots.most_drawn(pictures, captions, [f"round {k}" for k in numbers])
    note = "How often each was drawn in its round, and its label."
    return Plot("most-drawn", "samples drawn most", note, figure)


def _times(run: Run) -> Plot | None:
    if not run.summary:
        return None
    stages = [*([run.summary["pretrain"]] if run.summary.get("pretrain") else []), *run.rounds]
    names = [f"round {s['round']}" if "round" in s else "pretraining" for s in stages]
    keys = {"training": "train", "priorities": "priority", "evaluation": "evaluate"}
    parts = {
        name: [float(stage.get(f"{key}_seconds") or 0.0) for stage in stages]
        for name, key in keys.items()
    }
    spent = {name: sum(values) for name, values in parts.items()}
    spent["evaluation"] = float(run.summary.get("evaluate_seconds") or spent["evaluation"])
    total = float(run.summary["seconds"])
    if not total or not stages:
        return None
    spent["the rest"] = max(0.0, total - sum(spent.values()))
    shares = ", ".join(f"{name} {s:.1f} s ({s / total:.0%})" for name, s in spent.items() if s)
    note = f"Of {total:.1f} s: {shares}. The rest: starting, watching the stream, and writing."
    return Plot("time", "where the time went", note, plots.times(names, parts))


def _round_row(report: dict[str, Any]) -> list[str]:
    ess = [report.get("priority", {}).get(part, {}).get("ess_fraction") for part in _PARTS]
    draws = report.get("draws") or {}
    seconds = report["train_seconds"] + report["priority_seconds"]
    return [
        str(report["round"]),
        str(report["trigger"]),
        str(report["steps"]),
        _number(report.get("final_loss"), "{:.4f}"),
        *(_number(value, "{:.0%}") for value in ess),
        _number(draws.get("coverage"), "{:.0%}"),
        _number(draws.get("most"), "{}"),
        f"{seconds:.1f}",
    ]


def _top(run: Run) -> list[tuple[str, list[list[str]]]]:
    """Return, by round, rows (experience, row, label, draws) of the samples drawn most."""
    found = []
    for k, arrays in run.draws.items():
        experience, row, _ = unpack_ids(arrays["ids"])
        labels = run.class_names(arrays["labels"]) or ["–"] * len(row)
        columns = [
            [str(e + 1) for e in experience.tolist()],
            [str(r) for r in row.tolist()],
            labels,
            [str(c) for c in arrays["counts"].tolist()],
        ]
        found.append((f"round {k}", [list(cells) for cells in zip(*columns, strict=True)]))
    return found


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else form.format(value)


# -- several runs -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Comparison:
    """Several runs side by side: what is found in a sentence, a table of variants, and plots."""

    header: list[str]
    rows: list[list[str]]
    plots: list[Plot]
    note: str
    found: str = ""
    more: Sequence[tuple[list[str], list[list[str]]]] = ()


def _comparison(runs: Sequence[Run]) -> Comparison:
    done = [run for run in runs if run.summary]
    groups = variants(done)
    figures = [(key, name, unit) for key, name, _, unit in _FIGURES if any(_values(done, key))]
    percent = all(run.metric == "accuracy" for run in done)
    scale, digits, what = (100, 1, "accuracy") if percent else (1, 3, "R²")
    figures = [
        (key, name.replace("accuracy", what), u if percent else "") for key, name, u in figures
    ]
    rows = [
        [
            name,
            str(len(group)),
            *(_spread([scale * v for v in _values(group, key)], digits) for key, _, _ in figures),
            _spread([float(run.summary["seconds"]) for run in group], 1),
        ]
        for name, group in groups.items()
    ]
    header = ["", "runs", *(f"{name}, {u}" if u else name for _, name, u in figures), "seconds"]
    found = []
    average = {
        name: [[scale * v for v in _averages(run)] for run in group]
        for name, group in groups.items()
    }
    label = "accuracy, %" if percent else "R²"
    if any(any(lines) for lines in average.values()):
        found.append(
            Plot(
                "00-accuracy-over-rounds",
                f"average {what} as the runs went on",
                "Over the experiences seen so far. Line: mean over runs; band: standard deviation.",
                plots.curves(average, label),
            )
        )
    for key, title in (("average_accuracy", "at the end"), ("average_forgetting", "forgetting")):
        values = {name: [scale * v for v in _values(group, key)] for name, group in groups.items()}
        values = {name: some for name, some in values.items() if some}
        if values:
            lost = "points forgotten" if percent else "R² forgotten"
            axis = f"average {label}" if title == "at the end" else lost
            note = "A dot is a run; the bar is the mean, with standard deviation."
            name = f"00-{key.replace('_', '-')}"
            heading = f"average {what} at the end" if title == "at the end" else title
            found.append(Plot(name, heading, note, plots.dots(values, axis)))
    unfinished = [f"{run.name} ({run.state})" for run in runs if not run.summary]
    note = "Mean ± standard deviation over runs that differ in nothing but the seed."
    if unfinished:
        note += f" Not over, so not counted: {', '.join(unfinished)}."
    return Comparison(header, rows, found, note)


def _values(runs: Sequence[Run], key: str) -> list[float]:
    return [float(run.summary[key]) for run in runs if run.summary.get(key) is not None]


def _averages(run: Run) -> list[float]:
    """Return, after each evaluation, the mean over the experiences seen by then."""
    trained = [row[: len(row) - len(run.untrained)] for row in run.accuracy]
    rows = [[v for v in row[: i + 1] if v is not None] for i, row in enumerate(trained)]
    return [fmean(row) if row else math.nan for row in rows]


def _spread(values: Sequence[float], digits: int) -> str:
    if not values:
        return "–"
    mean = f"{fmean(values):.{digits}f}"
    return f"{mean} ± {stdev(values):.{digits}f}" if len(values) > 1 else mean


# The page of a comparison: the verdict, the table, and what lies behind them.


def write_comparison(result: Result, out: Path, png: Path | None = None) -> list[Path]:
    """Write the page to the file ``out``, and its plots to ``png``; return the latter's files.

    Raises UsageError naming what cannot be written.
    """
    plan = result.plan
    header, rows = table(result)
    what = "accuracy" if result.metric == "accuracy" else "R²"
    note = (
        f"Mean ± standard deviation over seeds {plan.seeds[0]} to {plan.seeds[-1]}, at equal "
        f"{plan.equal}. Differences are paired by seed, with 95 % intervals; p: of {what}, "
        "Student's t-test, corrected for the number of variants (Holm). Compute: a forward of a "
        "sample is 1, forward and backward 3, scoring included, evaluation not. Forgetting: less "
        f"is better. Runs: {plan.out}."
    )
    more = [differences(result)] if result.differences else []
    comparison = Comparison(header, rows, _plots(result), note, result.verdict, more)
    return write_page(f"{plan.config.name}: comparison", [], comparison, out, png)


def _plots(result: Result) -> list[Plot]:
    percent = result.metric == "accuracy"
    scale, what = (100.0, "accuracy") if percent else (1.0, "R²")
    found = []
    pairs = {}
    for arm, difference in zip(result.arms[1:], result.differences, strict=True):
        values = [scale * d for d in _differences(result.arms[0], arm)]
        a = difference.accuracy
        if values and a.n > 1:
            pairs[arm.variant.name] = (values, scale * a.low, scale * a.high)
    if pairs:
        label = "points" if percent else "R²"
        found.append(
            Plot(
                "compare-differences",
                f"average {what} minus that of '{result.arms[0].variant.name}'",
                "A dot is a pair of runs of equal seed; the bar is the 95 % interval of the mean.",
                plots.differences(pairs, label),
            )
        )
    curves = {
        arm.variant.name: [[scale * v for v in o.curve] for o in arm.outcomes.values() if o.curve]
        for arm in result.arms
    }
    curves = {name: lines for name, lines in curves.items() if lines}
    if curves:
        found.append(
            Plot(
                "compare-curves",
                f"average {what} as the runs went on",
                "Over the experiences seen so far. Line: mean over runs; band: standard deviation.",
                plots.curves(curves, "accuracy, %" if percent else what),
            )
        )
    forgotten = {
        arm.variant.name: [
            scale * o.average_forgetting
            for o in arm.outcomes.values()
            if o.average_forgetting is not None
        ]
        for arm in result.arms
    }
    forgotten = {name: values for name, values in forgotten.items() if values}
    if forgotten:
        found.append(
            Plot(
                "compare-forgetting",
                "forgetting",
                "A dot is a run; the bar is the mean, with standard deviation.",
                plots.dots(forgotten, "points forgotten" if percent else "R² forgotten"),
            )
        )
    return found


def _differences(first: Arm, other: Arm) -> list[float]:
    pairs = [(first.outcomes[seed], other.outcomes[seed]) for seed in sorted(first.outcomes)]
    return [
        b.average_accuracy - a.average_accuracy for a, b in pairs if not (a.diverged or b.diverged)
    ]
