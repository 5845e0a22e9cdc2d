"""What a comparison found: paired differences against the first variant, and a sentence."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np

from distcl.config.files import write_atomically
from distcl.errors import UsageError
from distcl.reporting.comparison import MEASURES, TOLERANCE, Arm, Outcome, Plan
from distcl.reporting.status import finite

LEVEL = 0.95
"""Of the confidence intervals."""


@dataclass(frozen=True, slots=True)
class Paired:
    """Mean of the differences of n pairs, its confidence interval, and p; NaN where n is small.

    p: of Student's paired t-test, two-sided. The interval needs two pairs, as p does.
    """

    n: int
    mean: float
    low: float
    high: float
    p: float


def paired(theirs: Sequence[float], ours: Sequence[float]) -> Paired:
    """Compare ``theirs`` minus ``ours``, [n] each, pair by pair.

    Equal differences have no spread: the interval is a point, p is 1 if they are zero, else 0.
    """
    differences = np.asarray(theirs, dtype=float) - np.asarray(ours, dtype=float)
    n = len(differences)
    mean = float(differences.mean()) if n else math.nan
    if n < 2:
        return Paired(n, mean, math.nan, math.nan, math.nan)
    if np.ptp(differences) <= 1e-12 * max(1.0, abs(mean)):
        return Paired(n, mean, mean, mean, 1.0 if abs(mean) <= 1e-12 else 0.0)
    from scipy import stats

    test = stats.ttest_rel(theirs, ours)
    low, high = test.confidence_interval(LEVEL)
    return Paired(n, mean, float(low), float(high), float(test.pvalue))


def holm(p: Sequence[float]) -> list[float]:
    """Return p-values corrected for their number (Holm 1979), in the same order; NaN stays NaN.

    The k-th smallest of m is multiplied by m - k + 1; then none is smaller than one before it.
    """
    known = sorted((value, k) for k, value in enumerate(p) if not math.isnan(value))
    corrected, largest = list(p), 0.0
    for rank, (value, k) in enumerate(known):
        largest = max(largest, min(1.0, (len(known) - rank) * value))
        corrected[k] = largest
    return corrected


SCHEMA = 1
SIGNIFICANT = 0.05

_IMPORTANCE = "continual_learning.importance_weighting="


@dataclass(frozen=True, slots=True)
class Difference:
    """A variant minus the first one, over the seeds that neither diverged on.

    Accuracies and forgetting are shares, not points; R² in regression. ``p_holm``: ``accuracy.p``
    corrected for the number of variants. ``cost``: mean of what was to be equal, relative to the
    first variant's.
    """

    variant: str
    accuracy: Paired
    p_holm: float
    forgetting: Paired
    anytime: Paired
    cost: float
    seconds: float

    @property
    def significant(self) -> bool:
        """Whether the corrected p is below 0.05."""
        return self.p_holm < SIGNIFICANT


@dataclass(frozen=True, slots=True)
class Result:
    """A whole comparison."""

    plan: Plan
    arms: list[Arm]
    differences: list[Difference]
    verdict: str

    @property
    def metric(self) -> str:
        """What is compared: accuracy or r2."""
        return next((o.metric for arm in self.arms for o in arm.outcomes.values()), "accuracy")


def judge(plan: Plan, arms: list[Arm]) -> Result:
    """Compare every arm with the first."""
    first, *others = arms
    pairs = [_pairs(first, arm) for arm in others]
    accuracy = [_of(pair, "average_accuracy") for pair in pairs]
    corrected = holm([one.p for one in accuracy])
    measure = MEASURES[plan.equal]
    differences = [
        Difference(
            variant=arm.variant.name,
            accuracy=accuracy[k],
            p_holm=corrected[k],
            forgetting=_of(pairs[k], "average_forgetting"),
            anytime=_of(pairs[k], "average_anytime_accuracy"),
            cost=_ratio(pairs[k], measure),
            seconds=_ratio(pairs[k], "seconds"),
        )
        for k, arm in enumerate(others)
    ]
    percent = all(o.metric == "accuracy" for arm in arms for o in arm.outcomes.values())
    verdict = _verdict(first, others, differences, percent)
    uneven = [d.variant for d in differences if abs(d.cost - 1) > TOLERANCE]
    if uneven:
        verdict += f" (The cost of {', '.join(uneven)} could not be made equal: see the table.)"
    return Result(plan, arms, differences, verdict)


def _pairs(first: Arm, other: Arm) -> list[tuple[Outcome, Outcome]]:
    both = [(first.outcomes[s], other.outcomes[s]) for s in sorted(first.outcomes)]
    return [(a, b) for a, b in both if not (a.diverged or b.diverged)]


def _of(pairs: Sequence[tuple[Outcome, Outcome]], name: str) -> Paired:
    values = [(getattr(a, name), getattr(b, name)) for a, b in pairs]
    known = [(a, b) for a, b in values if a is not None and b is not None]
    return paired([b for _, b in known], [a for a, _ in known])


def _ratio(pairs: Sequence[tuple[Outcome, Outcome]], name: str) -> float:
    if not pairs:
        return math.nan
    return fmean(getattr(b, name) for _, b in pairs) / fmean(getattr(a, name) for a, _ in pairs)


# -- words --------------------------------------------------------------------------------------


def _verdict(
    first: Arm, others: Sequence[Arm], differences: Sequence[Difference], percent: bool
) -> str:
    lost = [
        f"{_diverged(arm)} of '{arm.variant.name}'" for arm in (first, *others) if _diverged(arm)
    ]
    note = f" Diverged, so left out: {', '.join(lost)}." if lost else ""
    if all(d.accuracy.n < 2 for d in differences):
        return "There are fewer than two pairs of runs: no verdict; give more --seeds." + note
    found = [d for d in differences if d.significant]
    found.sort(key=lambda d: d.accuracy.mean, reverse=True)
    better = [d for d in found if d.accuracy.mean > 0]
    worse = [d for d in found if d.accuracy.mean < 0]
    open_ = [d for d in differences if not d.significant and d.accuracy.n > 1]
    names, advice = _words(first, others)
    said = {d.variant: f"{names[d.variant]} by {_size(d, percent)}" for d in found}
    if better:
        best, *next_ = (d.variant for d in better)
        text = f"{names[best]} is better here by {_size(better[0], percent)}"
        text += "".join(f", so is {said[name]}" for name in next_)
        text += "".join(f", worse is {said[d.variant]}" for d in worse)
        text += f"{_unshown(open_, names)}; "
        text += f"the best is {names[best]}: " * (len(found) > 1) + advice[best]
    elif worse:
        than = " than any of the others" * (1 < len(worse) == len(differences))
        parts = [f"by {_size(d, percent)}" for d in worse]
        if len(differences) > 1:
            pairs = zip(parts, worse, strict=True)
            parts = [f"{part} against {names[d.variant]}" for part, d in pairs]
        text = f"{names['']} is better here{than} {', '.join(parts)}{_unshown(open_, names)}; "
        text += advice[""]
    else:
        widest = max(open_, key=lambda d: d.accuracy.mean)
        text = (
            f"no difference is shown here: {names[widest.variant]} minus {names['']} is "
            f"{_size(widest, percent, signed=True)}; take what is simpler, or more --seeds"
        )
    return text[0].upper() + text[1:] + "." + note


def _unshown(differences: Sequence[Difference], names: Mapping[str, str]) -> str:
    if not differences:
        return ""
    return f"; no difference is shown of {', '.join(names[d.variant] for d in differences)}"


def _size(d: Difference, percent: bool, signed: bool = False) -> str:
    scale, unit = (100.0, " points") if percent else (1.0, " R²")
    a = d.accuracy
    mean, low, high = (scale * v for v in (a.mean, a.low, a.high))
    if not signed and mean < 0:
        mean, low, high = -mean, -high, -low
    digits = 1 if percent else 3
    shown = f"{mean:+.{digits}f}" if signed else f"{mean:.{digits}f}"
    p = f"p = {d.p_holm:.2g}" if d.p_holm >= 1e-4 else "p < 0.0001"
    return f"{shown}{unit} (95 % interval {low:.{digits}f} to {high:.{digits}f}, {p}, n = {a.n})"


def _words(first: Arm, others: Sequence[Arm]) -> tuple[dict[str, str], dict[str, str]]:
    """Return names of the variants, the first as '', and what to do if one is the best."""
    names = {"": "the configuration as it is"}
    advice = {"": "leave it"}
    for arm in others:
        names[arm.variant.name] = f"'{arm.variant.name}'"
        advice[arm.variant.name] = "set it"
    only = others[0].variant if len(others) == 1 else None
    if only is not None and len(only.overrides) == 1 and only.name.startswith(_IMPORTANCE):
        off = only.name.removeprefix(_IMPORTANCE).strip() == "false"
        names = {"": "prioritized sampling", only.name: "uniform"}
        advice = {"": "leave importance on", only.name: "switch importance off"}
        if not off:
            names = {"": "uniform", only.name: "prioritized sampling"}
            advice = {"": "leave importance off", only.name: "switch importance on"}
    return names, advice


def _diverged(arm: Arm) -> int:
    return sum(outcome.diverged for outcome in arm.outcomes.values())


# -- tables -------------------------------------------------------------------------------------


def table(result: Result) -> tuple[list[str], list[list[str]]]:
    """Return header and rows, a row per variant: means ± standard deviation, and what it took."""
    percent = result.metric == "accuracy"
    scale, digits = (100.0, 1) if percent else (1.0, 3)
    name = "accuracy, %" if percent else "R²"
    rows = []
    for arm in result.arms:
        good = [o for o in arm.outcomes.values() if not o.diverged]
        lost = [o.average_forgetting for o in good if o.average_forgetting is not None]
        rows.append(
            [
                arm.variant.name,
                str(len(good)) + (f" ({_diverged(arm)} diverged)" if _diverged(arm) else ""),
                _spread([scale * o.average_accuracy for o in good], digits),
                _spread([scale * value for value in lost], digits),
                f"{fmean(o.steps for o in good):,.0f}" if good else "–",
                f"{fmean(o.units for o in good):,.0f}" if good else "–",
                f"{fmean(o.seconds for o in good):.1f}" if good else "–",
            ]
        )
    return ["", "runs", name, "forgetting", "steps", "compute", "seconds"], rows


def differences(result: Result) -> tuple[list[str], list[list[str]]]:
    """Return header and rows, a row per variant but the first: what it has more than that."""
    scale, digits = (100.0, 1) if result.metric == "accuracy" else (1.0, 3)
    rows = [
        [
            d.variant,
            *(
                f"{scale * p.mean:+.{digits}f} ({scale * p.low:+.{digits}f}…"
                f"{scale * p.high:+.{digits}f})"
                for p in (d.accuracy, d.forgetting, d.anytime)
            ),
            f"{d.p_holm:.2g}",
        ]
        for d in result.differences
    ]
    name = "accuracy" if result.metric == "accuracy" else "R²"
    return ["minus first", name, "forgetting", f"anytime {name}", "p (Holm)"], rows


def _spread(values: Sequence[float], digits: int) -> str:
    if not values:
        return "–"
    mean = f"{fmean(values):.{digits}f}"
    return f"{mean} ± {stdev(values):.{digits}f}" if len(values) > 1 else mean


# -- files --------------------------------------------------------------------------------------


def as_json(result: Result) -> dict[str, Any]:
    """Return everything as plain values; what is not known is None."""
    plan = result.plan
    found = {
        "schema": SCHEMA,
        "config": str(plan.config),
        "overrides": list(plan.overrides),
        "command": plan.command,
        "equal": plan.equal,
        "seeds": list(plan.seeds),
        "metric": result.metric,
        "arms": [
            {
                "name": arm.variant.name,
                "overrides": list(arm.variant.overrides),
                "step_factor": arm.step_factor,
                "runs": [asdict(arm.outcomes[seed]) for seed in plan.seeds],
            }
            for arm in result.arms
        ],
        "differences": [asdict(difference) for difference in result.differences],
        "verdict": result.verdict,
    }
    cleaned: dict[str, Any] = finite(found)
    return cleaned


def write_json(result: Result, path: Path) -> None:
    """Write the result; raises UsageError naming the file if that fails."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(as_json(result), indent=2, allow_nan=False) + "\n")
    except OSError as error:
        raise UsageError(f"'{path}' cannot be written: {error.strerror}") from error
