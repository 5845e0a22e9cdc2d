"""Whether sampling by priority is likely to hurt: figures of a round, words, and a decision."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from distcl.ids import among
from distcl.priority.shaping import WHOLE, Sums, Weights
from distcl.priority.weights import RoundWeights
from distcl.priority.windows import Part
from distcl.runtime import Runtime
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

_LOOKS = 8
_FEWEST = 50
_BLOCK = 1 << 16  # weights looked at together

HeldOut = Sequence[tuple[Ids, float | None]]
"""Of each experience learned so far: ids of its training samples, and 1 - accuracy (or R²) on its
held-out ones, None where it was not measured."""


def rank_correlation(a: npt.NDArray[np.float64], b: npt.NDArray[np.float64]) -> float | None:
    """Return Spearman's correlation of two rows [N], ties at their mean rank. Local.

    None of fewer than 50 pairs, or where one row is constant. The order of pairs is of no matter.
    """
    if len(a) < _FEWEST or not (np.ptp(a) and np.ptp(b)):
        return None
    return float(np.corrcoef(_ranks(a), _ranks(b))[0, 1])


def _ranks(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return the rank of each value [N]. Importing scipy.stats takes longer than a short round."""
    _, place, ties = np.unique(values, return_inverse=True, return_counts=True)
    ranks: npt.NDArray[np.float64] = np.cumsum(ties) - (ties - 1) / 2
    return ranks[place]


class Freshness:
    """Compares weights with the losses that training finds: ``staleness`` of a round.

    At up to 8 steps of a round, evenly spread, it takes the batch's samples; later it looks up the
    weights, in means, by which they were drawn, and keeps them with their losses. The same on every
    rank.
    """

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self.begin(0)

    def begin(self, steps: int) -> None:
        """Start a round of so many steps by weights; 0: without any. Local."""
        self._every = max(1, steps // _LOOKS) if steps else 0
        self._waiting: list[tuple[torch.Tensor, torch.Tensor, list[Part]]] = []
        self._mine: list[npt.NDArray[np.float64]] = []  # looked up, not gathered yet
        self._pairs: npt.NDArray[np.float64] = np.empty((0, 2))

    def wants(self, step: int) -> bool:
        """Whether to look at the round's ``step``-th step, from 1. Local; equal on all ranks."""
        return self._every > 0 and step % self._every == 0

    def take(self, drawn: torch.Tensor, losses: torch.Tensor, groups: Sequence[Part]) -> None:
        """Take the ids ``drawn`` and losses [B] of this rank's samples of a step. Local.

        ``groups``: what they were drawn from; samples of those without weights do not count. They
        are held until the samples are looked up, which for large ones is at once.
        """
        weighted = [group for group in groups if group.weights is not None]
        self._waiting.append((drawn, losses, weighted))
        if sum(len(group.ids) for group in weighted) > _BLOCK:
            self._look_up()

    def _look_up(self) -> None:
        """Look up the weights of this rank's samples that wait. Local."""
        self._mine += [self._pairs_of(*looked) for looked in self._waiting]
        self._waiting = []

    def _settle(self) -> None:
        """Gather what was looked up. Collective."""
        self._look_up()
        if not self._mine:  # on no rank: all take the same steps
            return
        mine = torch.from_numpy(np.concatenate(self._mine)).to(self._runtime.device)
        self._mine = []
        pairs = self._of_all(mine).cpu().numpy()
        self._pairs = np.concatenate([self._pairs, pairs[np.isfinite(pairs).all(axis=1)]])

    @staticmethod
    def _pairs_of(
        drawn: torch.Tensor, losses: torch.Tensor, groups: list[Part]
    ) -> npt.NDArray[np.float64]:
        """Return the samples' weights, in means, and losses, float64 [n, 2], where both are."""
        wanted, place = np.unique(drawn.cpu().numpy(), return_inverse=True)
        found = np.full(len(wanted), np.nan)
        for group in groups if len(wanted) else []:
            assert group.weights is not None
            mean = group.weights.mean() if group.over is WHOLE else 1.0
            for start in range(0, len(group.ids), _BLOCK):
                ids = group.ids[start : start + _BLOCK]
                at = np.searchsorted(wanted, ids).clip(max=len(wanted) - 1)
                held = np.flatnonzero(wanted[at] == ids)
                found[at[held]] = group.weights[start + held] / mean
        pairs = np.stack([found[place], losses.double().cpu().numpy()], axis=1)
        known: npt.NDArray[np.float64] = pairs[np.isfinite(pairs).all(axis=1)]
        return known

    def _of_all(self, mine: torch.Tensor) -> torch.Tensor:
        if self._runtime.world_size == 1:
            return mine
        most = torch.tensor(len(mine), device=mine.device)
        each = max(1, int(self._runtime.all_reduce(most, "max")))
        padded = mine.new_full((each, 2), torch.nan)
        padded[: len(mine)] = mine
        return self._runtime.all_gather(padded, each * self._runtime.world_size, each)

    @property
    def correlation(self) -> float | None:
        """Rank correlation of weights and losses so far, None: it cannot be told. Collective."""
        self._settle()
        return rank_correlation(self._pairs[:, 0], self._pairs[:, 1])

    def state_dict(self) -> dict[str, Any]:
        """Return what the round has shown so far, the same on every rank. Collective."""
        self._settle()
        return {"every": self._every, "pairs": torch.from_numpy(self._pairs)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        self.begin(0)
        self._every, self._pairs = state["every"], state["pairs"].numpy()


def aim(ids: Ids, weights: Weights, held_out: HeldOut, over: Sums = WHOLE) -> float | None:
    """Return how the draws aim at what is wrong on held-out data; collective if ``over`` is.

    With m_e the share of the weights [N] on experience e, s_e its share of the samples and r_e its
    held-out error: sum m_e r_e / sum s_e r_e - 1. Above 0, draws prefer experiences of more error;
    below, they prefer those that are learned already, and uniform draws are better. 0 for uniform
    weights; None of fewer than two experiences, without any error, or if none of theirs is drawn.
    """
    mass, share, total = 0.0, 0.0, np.zeros(2)
    known = 0
    for members, error in held_out:
        if error is None:
            continue
        inside = among(ids, members)
        chosen = np.where(inside, weights, 0.0), inside.astype(np.float64)
        of = np.array([over.total(part) for part in chosen])
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


def judge(
    runtime: Runtime, auto: bool, weights: RoundWeights, history: Ids, held_out: HeldOut
) -> Judgement:
    """Judge a round's weights by themselves and by held-out data. Collective.

    ``auto``: doubts make the round uniform. The verdict is rank 0's.
    """
    if not weights.parts:
        return Judgement()
    aimed = None
    if weights.history is not None:
        _, stored = weights.held(history, history)
        aimed = aim(stored, weights.history, held_out, weights.over[1])
    found = doubts(weights.report, aimed)
    return runtime.broadcast(Judgement(aimed, found, auto and bool(found)))
