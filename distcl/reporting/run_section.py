"""One run's part of the report: its facts, figures and plots."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Any

from markupsafe import Markup
from matplotlib.figure import Figure

from distcl.reporting import plots
from distcl.reporting.figures import (
    SPENT,
    Summary,
    clock,
    figures_of,
    further_scores,
    row_names,
    stages,
    stream_end,
    time_spent,
    untrained,
    words_in,
)
from distcl.reporting.run_reader import Run
from distcl.types import GENERAL, unpack_ids

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
class RunSection:
    """A run's part of the page."""

    run: Run
    facts: list[tuple[str, str]]
    tiles: list[tuple[str, str, str, str]]
    plots: list[Plot]
    rounds: list[list[str]]
    guard: list[str]
    scores: list[tuple[str, list[str], list[list[str]]]]
    top: list[tuple[str, list[list[str]]]]


def plots_of(run: Run) -> list[Plot]:
    """Return the plots that there are of a run."""
    drawn: list[Plot | None] = [
        _matrix(run),
        _forgetting(run),
        _confusion(run),
        _watched(run),
        _loss(run),
        *(_weights(run, part) for part in _PARTS),
        _most_drawn(run),
        _times(run),
    ]
    return [plot for plot in drawn if plot is not None]


def run_section(run: Run, index: int) -> RunSection:
    """Return the part of a run; ``index``: its place in the page, from 0."""
    prefix = f"{index + 1:02d}-{re.sub(r'[^A-Za-z0-9_.]+', '-', run.name)}-"
    found = [replace(plot, name=prefix + plot.name) for plot in plots_of(run)]
    return RunSection(
        run=run,
        facts=_facts(run),
        tiles=[
            (name, value.replace("-", "−"), unit, note)
            for name, value, unit, note in stream_end(run.summary) + figures_of(run.summary)
        ],
        plots=found,
        rounds=[_round_row(report) for report in run.rounds],
        guard=[
            f"Guard, round {report['round']}: {report['guard']['words']}."
            for report in run.rounds
            if report.get("guard", {}).get("words")
        ],
        scores=[_further(one) for one in further_scores(run.summary)] + _by_class(run),
        top=_top(run),
    )


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
    note = "Rows: after each round. Columns: held-out data of each experience."
    marked = untrained(run.summary)
    if marked:
        note += " *: never trained on, and not in the averages."
    words = run.words
    if not words.higher:
        note += " Less is better: the darker, the better."
    figure = plots.matrix(rows, run.row_names, words, marked)
    title = f"{words.name} matrix" + (f", in {words.unit}" if words.unit else "")
    return Plot("accuracy", title, note, figure)


def _forgetting(run: Run) -> Plot | None:
    values = run.matrix().forgetting()
    if not any(value is not None for value in values):
        return None
    name = run.words.name
    note = f"Best {name} before the last round minus {name} after it; below zero: improved."
    if not run.words.higher:
        note = f"{name} after the last round minus the best before it; below zero: improved."
    figure = plots.forgetting(values, run.words)
    return Plot("forgetting", "forgetting of each experience", note, figure)


def _confusion(run: Run) -> Plot | None:
    told = run.summary.get("classes") or {}
    if not told.get("confusion"):
        return None
    pairs = zip(told["accuracy"], told["names"], strict=True)
    known = [(value, name) for value, name in pairs if value is not None]
    worst = ", ".join(f"{name} {value:.0%}" for value, name in sorted(known)[:3])
    note = (
        "Held-out samples of all experiences trained on, after the last round. Rows: true classes; "
        f"colour: share of the row. Lowest accuracy of a class (its recall): {worst}."
    )
    figure = plots.confusion(told["confusion"], told["names"])
    return Plot("confusion", "which class is taken for which", note, figure)


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
    figure = plots.weight_histograms(
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
    told, parts = time_spent(run.summary), stages(run.summary)
    if not told or not parts:
        return None
    names = [f"round {s['round']}" if "round" in s else "pretraining" for s in parts]
    seconds = {
        name: [float(stage.get(f"{key}_seconds") or 0.0) for stage in parts]
        for name, key in SPENT.items()
    }
    note = f"Of {told}. The rest: starting, watching the stream, and writing."
    return Plot("time", "where the time went", note, plots.times(names, seconds))


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


def _further(one: Summary) -> tuple[str, list[str], list[list[str]]]:
    """Return a line on a further score, and its matrix: header and rows."""
    words, rows = words_in(one), one["accuracy"]
    told = "; ".join(f"{name} {value} {unit}".rstrip() for name, value, unit, _ in figures_of(one))
    marked = untrained(one)
    width = len(rows[0]) if rows else 0
    header = ["", *(f"{k + 1}{'*' if k in marked else ''}" for k in range(width))]
    cells = [
        [name, *(words.number(value) for value in row)]
        for name, row in zip(row_names(one), rows, strict=True)
    ]
    return f"{words.label}: {told}", header, cells


def _by_class(run: Run) -> list[tuple[str, list[str], list[list[str]]]]:
    """Return a line on the accuracy of each class and its table, or nothing."""
    told = run.summary.get("classes") or {}
    if not told.get("by_experience"):
        return []
    columns = [told["names"]]
    for values in (told["accuracy"], *told["by_experience"]):
        columns.append([_number(value, "{:.1%}") for value in values])
    header = ["class", "all", *(str(k + 1) for k in range(len(told["by_experience"])))]
    line = "Accuracy of each class (its recall) after the last round; all: experiences trained on"
    return [(line, header, [list(cells) for cells in zip(*columns, strict=True)])]


def _top(run: Run) -> list[tuple[str, list[list[str]]]]:
    """Return, by round, rows (experience, row, label, draws) of the samples drawn most."""
    found = []
    for k, arrays in run.draws.items():
        experience, row, _ = unpack_ids(arrays["ids"])
        labels = run.class_names(arrays["labels"]) or ["–"] * len(row)
        columns = [
            ["general" if e == GENERAL else str(e + 1) for e in experience.tolist()],
            [str(r) for r in row.tolist()],
            labels,
            [str(c) for c in arrays["counts"].tolist()],
        ]
        found.append((f"round {k}", [list(cells) for cells in zip(*columns, strict=True)]))
    return found


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else form.format(value)
