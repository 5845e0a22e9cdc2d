"""Whether sampling by priority is likely to hurt: figures of a round, words, and a decision."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from distcl.data.ids import among
from distcl.distributed.runtime import Runtime
from distcl.priority.round_weights import RoundWeights
from distcl.priority.weighting import WeightVector
from distcl.types import Ids

LOW_ESS = 0.4
"""An effective sample size below this share of N warns: in a sketch, prioritized runs that lost to
uniform draws had 4 to 40 %, and those that won were kept at 50 %."""
LOW_AIM = -0.02
"""An aim below this warns. Of weights on a pool of 2,000 ids with half that effective sample size,
whose experiences differ by a third in their error, chance alone moves it by 0.3 / sqrt(1000), about
0.01 (one standard deviation)."""
STALE = 0.1
"""A rank correlation of weights and losses below this warns. Weights that tell nothing have 0, and
over the 400 samples or more that most rounds look at it strays by 0.05 (one standard deviation)."""

HeldOut = Sequence[tuple[Ids, float | None]]
"""Of each experience learned so far: ids of its training samples, and how wrong the model is on its
held-out ones (1 - accuracy, or R²; the loss; …), None where it was not measured."""


def aim(weights: WeightVector, held_out: HeldOut) -> float | None:
    """Return how the draws aim at what is wrong on held-out data. Collective over slices.

    With m_e the share of the weights on experience e, s_e its share of the samples and r_e its
    held-out error: sum m_e r_e / sum s_e r_e - 1. Above 0, draws prefer experiences of more error;
    below, they prefer those that are learned already, and uniform draws are better. 0 for uniform
    weights; None of fewer than two experiences, without any error, or if none of theirs is drawn.
    """
    mass, share, total = 0.0, 0.0, np.zeros(2)
    known = 0
    for members, error in held_out:
        if error is None:
            continue
        inside = among(weights.ids, members)
        chosen = np.where(inside, weights.held, 0.0), inside.astype(np.float64)
        of = np.array([weights.sum(part) for part in chosen])
        known += bool(of[1])
        mass, share, total = mass + error * of[0], share + error * of[1], total + of
    if known < 2 or share <= 0 or total[0] <= 0:
        return None
    return float(mass / total[0] / (share / total[1]) - 1)


def doubts(
    report: dict[str, dict[str, float]], aimed: float | None, staleness: float | None = None
) -> list[str]:
    """Return, in words, why sampling by these weights is likely to hurt; [] if it is not. Local.

    ``report``: of each weighted part, as in summary.json.
    """
    found = []
    for part, stats in report.items():
        if stats["ess_fraction"] < LOW_ESS:
            top = stats.get("top_share")
            found.append(
                f"draws of {part} are worth {stats['ess_fraction']:.0%} of its samples (effective "
                f"sample size, below {LOW_ESS:.0%}"
                + ("" if top is None else f"; 1 % of them get {top:.0%} of the draws")
                + "); priority.min_ess = 0.5 evens them out"
            )
    if aimed is not None and aimed < LOW_AIM:
        found.append(
            "draws prefer experiences that are learned already: the held-out error where they go "
            f"is {-aimed:.1%} below that of uniform draws"
        )
    if staleness is not None and staleness < STALE:
        found.append(
            "the weights tell little of the losses that training finds "
            f"(rank correlation {staleness:.2f}, below {STALE:g})"
        )
    return found


@dataclass(frozen=True, slots=True)
class Judgement:
    """Of a round before its first step: how its draws aim, doubts in words, and what follows."""

    aim: float | None = None
    doubts: list[str] = field(default_factory=list)
    uniform: bool = False
    """Whether the round is to be drawn uniformly instead."""


def judge(runtime: Runtime, auto: bool, weights: RoundWeights, held_out: HeldOut) -> Judgement:
    """Judge a round's weights by themselves and by held-out data. Collective.

    ``auto``: doubts make the round uniform. The verdict is rank 0's.
    """
    if not weights.parts:
        return Judgement()
    stored = weights.parts.get("hist")
    aimed = None if stored is None else aim(stored, held_out)
    found = doubts(weights.report, aimed)
    return runtime.broadcast(Judgement(aimed, found, auto and bool(found)))
