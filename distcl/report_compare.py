"""The page of a comparison: the verdict, the table, and what lies behind them."""

from __future__ import annotations

from pathlib import Path

from distcl import plots
from distcl.compare import Arm
from distcl.report import Comparison, Plot, write_page
from distcl.verdict import Result, differences, table


def write_comparison(result: Result, out: Path, png: Path | None = None) -> list[Path]:
    """Write the page to the file ``out``, and its plots to ``png``; return the latter's files.

    Raises UsageError naming what cannot be written.
    """
    plan = result.plan
    header, rows = table(result)
    note = (
        f"Mean ± standard deviation over seeds {plan.seeds[0]} to {plan.seeds[-1]}, at equal "
        f"{plan.equal}. Differences are paired by seed, with 95 % intervals; p: of accuracy, "
        "Student's t-test, corrected for the number of variants (Holm). Compute: a forward of a "
        "sample is 1, forward and backward 3, scoring included, evaluation not. Forgetting: less "
        f"is better. Runs: {plan.out}."
    )
    more = [differences(result)] if result.differences else []
    comparison = Comparison(header, rows, _plots(result), note, result.verdict, more)
    return write_page(f"{plan.config.name}: comparison", [], comparison, out, png)


def _plots(result: Result) -> list[Plot]:
    percent = result.metric == "accuracy"
    scale, unit = (100.0, "%") if percent else (1.0, "R²")
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
                f"average accuracy minus that of '{result.arms[0].variant.name}'",
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
                "average accuracy as the runs went on",
                "Over the experiences seen so far. Line: mean over runs; band: standard deviation.",
                plots.curves(curves, f"accuracy, {unit}" if percent else unit),
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
                plots.dots(forgotten, "points forgotten"),
            )
        )
    return found


def _differences(first: Arm, other: Arm) -> list[float]:
    pairs = [(first.outcomes[seed], other.outcomes[seed]) for seed in sorted(first.outcomes)]
    return [
        b.average_accuracy - a.average_accuracy for a, b in pairs if not (a.diverged or b.diverged)
    ]
