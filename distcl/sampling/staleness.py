"""Whether scores of the start of a round still order the samples later in it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from distcl.data.ids import BLOCK
from distcl.distributed.runtime import Runtime
from distcl.sampling.groups import Part

_LOOKS = 8
_FEWEST = 50


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

    def __init__(self, runtime: Runtime, steps: int = 0, groups: Sequence[Part] = ()) -> None:
        """Begin a round of so many steps by weights; 0: without any.

        ``groups``: what all its looks will show, where their weights lie in slices: these have the
        mean of all ranks' weights, which a look cannot ask for. Collective then, else local.
        """
        self._runtime = runtime
        self._every = max(1, steps // _LOOKS) if steps else 0
        self._waiting: list[tuple[torch.Tensor, torch.Tensor, list[Part]]] = []
        self._mine: list[npt.NDArray[np.float64]] = []  # looked up, not gathered yet
        self._pairs: npt.NDArray[np.float64] = np.empty((0, 2))
        self._means = _means([group for group in groups if group.slices is not None])

    def wants(self, step: int) -> bool:
        """Whether to look at the round's ``step``-th step, from 1. Local; equal on all ranks."""
        return self._every > 0 and step % self._every == 0

    def take(self, drawn: torch.Tensor, losses: torch.Tensor, groups: Sequence[Part]) -> None:
        """Take the ids ``drawn`` and losses [B] of this rank's samples of a step. Local.

        ``groups``: what they were drawn from; samples of those without weights do not count. They
        are held until the samples are looked up, which for large ones is at once.
        """
        weighted = [group for group in groups if group.values is not None]
        self._waiting.append((drawn, losses, weighted))
        if sum(len(group.ids) for group in weighted) > BLOCK:
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
        every = self._runtime.gather_objects(np.concatenate(self._mine))
        self._mine, self._pairs = [], np.concatenate([self._pairs, *every])

    def _pairs_of(
        self, drawn: torch.Tensor, losses: torch.Tensor, groups: list[Part]
    ) -> npt.NDArray[np.float64]:
        """Return the samples' weights, in means, and losses, float64 [n, 2], where both are. Local.

        Both are rounded to float32: ties must be ties, whatever last bits a cut of a batch leaves.
        """
        wanted, place = np.unique(drawn.cpu().numpy(), return_inverse=True)
        found = np.full(len(wanted), np.nan)
        for group, mean in zip(groups, self._means or _means(groups), strict=True):
            values = group.lookup(wanted)
            found = np.where(np.isnan(values), found, values / mean)
        pairs = np.stack([found[place], losses.double().cpu().numpy()], axis=1)
        pairs = pairs.astype(np.float32).astype(np.float64)
        known: npt.NDArray[np.float64] = pairs[np.isfinite(pairs).all(axis=1)]
        return known

    @property
    def correlation(self) -> float | None:
        """Rank correlation of weights and losses so far, None: it cannot be told. Collective."""
        self._settle()
        return rank_correlation(self._pairs[:, 0], self._pairs[:, 1])

    def state_dict(self) -> dict[str, Any]:
        """Return what the round has shown so far, the same on every rank. Collective."""
        self._settle()
        pairs = torch.from_numpy(self._pairs)
        return {"every": self._every, "pairs": pairs, "means": self._means}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        self._every, self._pairs = state["every"], state["pairs"].numpy()
        self._means = state["means"]


def _means(groups: Sequence[Part]) -> list[float]:
    """Return the mean weight of each group. Collective if one lies in slices."""
    return [group.sum() / group.number for group in groups if group.values is not None]
