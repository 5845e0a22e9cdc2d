"""What a comparison found: paired differences against the first variant, and a sentence."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from distcl.config.files import write_atomically
from distcl.errors import UsageError
from distcl.reporting.comparison import MEASURES, TOLERANCE, Arm, Outcome, Plan
from distcl.reporting.figures import FIGURES, Words, spread, words_of
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

    Accuracies and forgetting are shares, not points; other scores are what they are.
    ``p_holm``: ``accuracy.p`` corrected for the number of variants. ``cost``: mean of what was to
    be equal, relative to the first variant's.
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


Groups = Mapping[str, Sequence[Outcome]]
"""Variants by name, each with what its runs came to."""


@dataclass(frozen=True, slots=True)
class Result:
    """A whole comparison."""

    plan: Plan
    arms: list[Arm]
    differences: list[Difference]
    verdict: str

    @property
    def groups(self) -> Groups:
        """The outcomes of each variant, by its name."""
        return {arm.variant.name: list(arm.outcomes.values()) for arm in self.arms}


def conclude(plan: Plan, arms: list[Arm]) -> Result:
    """Compare every arm with the first; where they are judged by different scores, none."""
    first, *others = arms
    kinds = judged({arm.variant.name: list(arm.outcomes.values()) for arm in arms})
    if len(kinds) > 1:
        ways = (f"{name} ({'more' if higher else 'less'} is better)" for name, higher in kinds)
        verdict = f"The variants are judged by different scores, {', '.join(ways)}: no verdict."
        return Result(plan, arms, [], verdict)
    accuracy = [_compared(first, arm, "average_accuracy") for arm in others]
    corrected = holm([one.p for one in accuracy])
    measure = MEASURES[plan.equal]
    differences = [
        Difference(
            variant=arm.variant.name,
            accuracy=accuracy[k],
            p_holm=corrected[k],
            forgetting=_compared(first, arm, "average_forgetting"),
            anytime=_compared(first, arm, "average_anytime_accuracy"),
            cost=_ratio(pairs(first, arm), measure),
            seconds=_ratio(pairs(first, arm), "seconds"),
        )
        for k, arm in enumerate(others)
    ]
    words = words_for({arm.variant.name: list(arm.outcomes.values()) for arm in arms})
    verdict = _verdict(first, others, differences, words)
    uneven = [d.variant for d in differences if abs(d.cost - 1) > TOLERANCE]
    if uneven:
        verdict += f" (The cost of {', '.join(uneven)} could not be made equal: see the table.)"
    return Result(plan, arms, differences, verdict)


def pairs(first: Arm, other: Arm) -> list[tuple[Outcome, Outcome]]:
    """Return the outcomes of each seed on which neither diverged."""
    both = [(first.outcomes[s], other.outcomes[s]) for s in sorted(first.outcomes)]
    return [(a, b) for a, b in both if not (a.diverged or b.diverged)]


def both(first: Arm, other: Arm, figure: str) -> list[tuple[float, float]]:
    """Return a figure of both runs of each such pair that has it."""
    values = [(a.figures[figure], b.figures[figure]) for a, b in pairs(first, other)]
    return [(a, b) for a, b in values if a is not None and b is not None]


def _compared(first: Arm, other: Arm, figure: str) -> Paired:
    known = both(first, other, figure)
    return paired([b for _, b in known], [a for a, _ in known])


def _ratio(pairs: Sequence[tuple[Outcome, Outcome]], name: str) -> float:
    if not pairs:
        return math.nan
    return fmean(b.cost[name] for _, b in pairs) / fmean(a.cost[name] for a, _ in pairs)


# -- words --------------------------------------------------------------------------------------


def _verdict(
    first: Arm, others: Sequence[Arm], differences: Sequence[Difference], told: Words
) -> str:
    lost = [
        f"{_diverged(arm)} of '{arm.variant.name}'" for arm in (first, *others) if _diverged(arm)
    ]
    note = f" Diverged, so left out: {', '.join(lost)}." if lost else ""
    if all(d.accuracy.n < 2 for d in differences):
        return "There are fewer than two pairs of runs: no verdict; give more --seeds." + note

    def gain(d: Difference) -> float:
        return told.better(d.accuracy.mean, 0.0)

    found = [d for d in differences if d.significant]
    found.sort(key=gain, reverse=True)
    better = [d for d in found if gain(d) > 0]
    worse = [d for d in found if gain(d) < 0]
    open_ = [d for d in differences if not d.significant and d.accuracy.n > 1]
    names, advice = _words(others)
    said = {d.variant: f"{names[d.variant]} by {_size(d, told)}" for d in found}
    if better:
        best, *next_ = (d.variant for d in better)
        text = f"{names[best]} is better here by {_size(better[0], told)}"
        text += "".join(f", so is {said[name]}" for name in next_)
        text += "".join(f", worse is {said[d.variant]}" for d in worse)
        text += f"{_unshown(open_, names)}; "
        text += f"the best is {names[best]}: " * (len(found) > 1) + advice[best]
    elif worse:
        than = " than any of the others" * (1 < len(worse) == len(differences))
        parts = [f"by {_size(d, told)}" for d in worse]
        if len(differences) > 1:
            pairs = zip(parts, worse, strict=True)
            parts = [f"{part} against {names[d.variant]}" for part, d in pairs]
        text = f"{names['']} is better here{than} {', '.join(parts)}{_unshown(open_, names)}; "
        text += advice[""]
    else:
        widest = max(open_, key=gain)
        text = (
            f"no difference is shown here: {names[widest.variant]} minus {names['']} is "
            f"{_size(widest, told, signed=True)}; take what is simpler, or more --seeds"
        )
    return text[0].upper() + text[1:] + "." + note


def _unshown(differences: Sequence[Difference], names: Mapping[str, str]) -> str:
    if not differences:
        return ""
    return f"; no difference is shown of {', '.join(names[d.variant] for d in differences)}"


def _size(d: Difference, told: Words, signed: bool = False) -> str:
    mean, low, high = d.accuracy.mean, d.accuracy.low, d.accuracy.high
    if not signed and mean < 0:
        mean, low, high = -mean, -high, -low
    p = f"p = {d.p_holm:.2g}" if d.p_holm >= 1e-4 else "p < 0.0001"
    shown, *ends = told.number(mean, "+" if signed else ""), told.number(low), told.number(high)
    interval = f"95 % interval {' to '.join(ends)}, {p}, n = {d.accuracy.n}"
    less = ", less is better" if signed and not told.higher else ""
    return f"{shown} {told.gain}{less} ({interval})"


def _words(others: Sequence[Arm]) -> tuple[dict[str, str], dict[str, str]]:
    """Return names of the variants, the first as '', and what to do if one is the best."""
    only = others[0].variant if len(others) == 1 else None
    if only is not None and len(only.overrides) == 1 and only.name.startswith(_IMPORTANCE):
        off = only.name.removeprefix(_IMPORTANCE).strip() == "false"
        first, second = ("prioritized sampling", "uniform")[:: 1 if off else -1]
        is_on, switch = ("on", "off") if off else ("off", "on")
        advice = {"": f"leave importance {is_on}", only.name: f"switch importance {switch}"}
        return {"": first, only.name: second}, advice
    given = [arm.variant.name for arm in others]
    names = {"": "the configuration as it is"} | {name: f"'{name}'" for name in given}
    return names, {"": "leave it"} | dict.fromkeys(given, "set it")


def _diverged(arm: Arm) -> int:
    return sum(outcome.diverged for outcome in arm.outcomes.values())


# -- tables -------------------------------------------------------------------------------------


Table = tuple[list[str], list[list[str]]]
"""A header and rows."""


def judged(groups: Groups) -> list[tuple[str, bool]]:
    """Return the scores that runs are judged by, and whether more of each is better."""
    every = [o for group in groups.values() for o in group if not o.diverged]
    return sorted({(o.metric, o.higher_is_better) for o in every})


def words_for(groups: Groups) -> Words:
    """Return the words in which the figures of all these runs are told."""
    kinds = judged(groups)
    return words_of(*(name for name, _ in kinds), higher=all(higher for _, higher in kinds))


def values_of(group: Sequence[Outcome], key: str) -> list[float]:
    """Return a figure, or a cost, of each run that has it: not of those that diverged."""
    values = [{**o.figures, **o.cost}[key] for o in group if not o.diverged]
    return [value for value in values if value is not None]


def table(groups: Groups, keys: Collection[str] = ()) -> Table:
    """Return a row per variant: means ± standard deviation, and what it took; of some figures."""
    words = words_for(groups)
    shown = [
        figure
        for figure in FIGURES
        if (not keys or figure.key in keys)
        and any(values_of(group, figure.key) for group in groups.values())
    ]
    rows = []
    for name, group in groups.items():
        lost = sum(o.diverged for o in group)
        rows.append(
            [
                name,
                str(len(group) - lost) + (f" ({lost} diverged)" if lost else ""),
                *(spread(values_of(group, f.key), words.digits, words.scale) for f in shown),
                *(_mean(values_of(group, key)) for key in ("steps", "units")),
                spread(values_of(group, "seconds"), 1),
            ]
        )
    named = [", ".join(filter(None, words.named(figure))) for figure in shown]
    return ["", "runs", *named, "steps", "compute", "seconds"], rows


def _mean(values: Sequence[float]) -> str:
    return f"{fmean(values):,.0f}" if any(values) else "–"


def difference_table(result: Result) -> Table:
    """Return a row per variant but the first: what it has more than that."""
    words = words_for(result.groups)
    rows = [
        [
            d.variant,
            *(
                f"{words.number(p.mean, '+')} ({words.number(p.low, '+')}…"
                f"{words.number(p.high, '+')})"
                for p in (d.accuracy, d.forgetting, d.anytime)
            ),
            f"{d.p_holm:.2g}",
        ]
        for d in result.differences
    ]
    return [
        "minus first",
        words.name + words.hint,
        "forgetting",
        f"anytime {words.name}",
        "p (Holm)",
    ], rows


# -- files --------------------------------------------------------------------------------------


def as_json(result: Result) -> dict[str, Any]:
    """Return everything as plain values; what is not known is None."""
    plan, kinds = result.plan, judged(result.groups)
    found = {
        "schema": SCHEMA,
        "config": str(plan.config),
        "overrides": list(plan.overrides),
        "command": plan.command,
        "equal": plan.equal,
        "seeds": list(plan.seeds),
        "metric": ", ".join(sorted({name for name, _ in kinds})) or "accuracy",
        "higher_is_better": None if len(kinds) > 1 else words_for(result.groups).higher,
        "arms": [
            {
                "name": arm.variant.name,
                "overrides": list(arm.variant.overrides),
                "step_factor": arm.step_factor,
                "runs": [_flat(arm.outcomes[seed]) for seed in plan.seeds],
            }
            for arm in result.arms
        ],
        "differences": [asdict(difference) for difference in result.differences],
        "verdict": result.verdict,
    }
    cleaned: dict[str, Any] = finite(found)
    return cleaned


def _flat(outcome: Outcome) -> dict[str, Any]:
    found: dict[str, Any] = asdict(outcome)
    for part in ("figures", "cost"):
        found |= found.pop(part)
    return found


def write_json(result: Result, path: Path) -> None:
    """Write the result; raises UsageError naming the file if that fails."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(as_json(result), indent=2, allow_nan=False) + "\n")
    except OSError as error:
        raise UsageError(f"'{path}' cannot be written: {error.strerror}") from error
