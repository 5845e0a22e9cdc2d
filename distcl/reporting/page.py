"""``report.html``: one file that shows what a run, or several, kept and forgot. Needs no network.

Every plot is an inline SVG; colours follow the reader's light or dark setting.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import jinja2

from distcl import __version__
from distcl.config.files import write_atomically
from distcl.errors import UsageError
from distcl.reporting import plots
from distcl.reporting.comparison import outcome_of
from distcl.reporting.run_reader import Run, read_run, variants
from distcl.reporting.run_section import Plot, RunSection, run_section
from distcl.reporting.verdict import (
    Groups,
    Result,
    both,
    difference_table,
    table,
    values_of,
    words_for,
)


@dataclass(frozen=True)
class Comparison:
    """Several runs side by side: what is found in a sentence, a table of variants, and plots."""

    header: list[str]
    rows: list[list[str]]
    plots: list[Plot]
    note: str
    found: str = ""
    more: Sequence[tuple[list[str], list[list[str]]]] = ()


def write_report(folders: Sequence[Path], out: Path, png: Path | None = None) -> list[Path]:
    """Write the report of run folders to the file ``out``; return the PNG files written to ``png``.

    Raises UsageError naming what cannot be read or written.
    """
    runs = [read_run(folder) for folder in dict.fromkeys(folders)]
    if not runs:
        raise UsageError("a report needs at least one run folder")
    sections = [run_section(run, k) for k, run in enumerate(runs)]
    comparison = _comparison(runs) if len(runs) > 1 else None
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
    return write_page(title, sections, comparison, out, png)


def write_page(
    title: str,
    sections: Sequence[RunSection],
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


def _comparison(runs: Sequence[Run]) -> Comparison:
    done = [run for run in runs if run.summary]
    groups = {
        name: [outcome_of(run.folder, run.summary) for run in group]
        for name, group in variants(done).items()
    }
    note = f"Mean ± standard deviation over runs that differ in nothing but the seed. {_COMPUTE}"
    unfinished = [f"{run.name} ({run.state})" for run in runs if not run.summary]
    if unfinished:
        note += f" Not over, so not counted: {', '.join(unfinished)}."
    return Comparison(*table(groups), _plots(groups), note)


def write_comparison(result: Result, out: Path, png: Path | None = None) -> list[Path]:
    """Write the page to the file ``out``, and its plots to ``png``; return the latter's files.

    Raises UsageError naming what cannot be written.
    """
    plan = result.plan
    note = (
        f"Mean ± standard deviation over seeds {plan.seeds[0]} to {plan.seeds[-1]}, at equal "
        f"{plan.equal}. Differences are paired by seed, with 95 % intervals; p: of "
        f"{words_for(result.groups).name}, Student's t-test, corrected for the number of variants "
        f"(Holm). {_COMPUTE} Forgetting: less is better. Runs: {plan.out}."
    )
    comparison = Comparison(
        *table(result.groups),
        _paired(result) + _plots(result.groups),
        note,
        result.verdict,
        [difference_table(result)] if result.differences else [],
    )
    return write_page(f"{plan.config.name}: comparison", [], comparison, out, png)


_COMPUTE = (
    "Compute: a forward of a sample is 1, forward and backward 3, scoring included, evaluation not."
)


def _paired(result: Result) -> list[Plot]:
    words, first = words_for(result.groups), result.arms[0]
    found = {}
    for arm, difference in zip(
        result.arms[1:], result.differences, strict=False
    ):  # or no difference
        a = difference.accuracy
        if a.n > 1:
            known = both(first, arm, "average_accuracy")
            values = [words.scale * (theirs - ours) for ours, theirs in known]
            found[arm.variant.name] = (values, words.scale * a.low, words.scale * a.high)
    if not found:
        return []
    title = f"average {words.name} minus that of '{first.variant.name}'"
    note = "A dot is a pair of runs of equal seed; the bar is the 95 % interval of the mean."
    note += "" if words.higher else " Below 0 is better."
    return [Plot("compare-differences", title, note, plots.differences(found, words.gain))]


def _plots(groups: Groups) -> list[Plot]:
    words = words_for(groups)
    found = []
    curves = {
        name: [[words.scale * value for value in o.curve] for o in group if o.curve]
        for name, group in groups.items()
    }
    curves = {name: lines for name, lines in curves.items() if lines}
    if curves:
        title = f"average {words.name} as the runs went on"
        note = "Over the experiences seen so far. Line: mean over runs; band: standard deviation."
        found.append(Plot("compare-curves", title, note, plots.curves(curves, words.label)))
    for key, title, label in (
        ("average_accuracy", f"average {words.name} at the end", f"average {words.label}"),
        ("average_forgetting", "forgetting", f"{words.gain} forgotten"),
    ):
        values = {
            name: [words.scale * value for value in values_of(group, key)]
            for name, group in groups.items()
        }
        values = {name: some for name, some in values.items() if some}
        if values:
            note = "A dot is a run; the bar is the mean, with standard deviation."
            name = f"compare-{key.removeprefix('average_')}"
            found.append(Plot(name, title, note, plots.dots(values, label)))
    return found
