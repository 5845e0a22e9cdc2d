"""Samples dealt out by lanes: each rank holds its own, and sums over all that all ranks hold."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from distcl.data.ids import BLOCK, IdIndex, blocks
from distcl.distributed.runtime import Runtime
from distcl.priority.weighting import Of, summed
from distcl.types import Ids, frozen, unpack_ids

LanesOf = Callable[[Ids, int], Ids]
"""(ids [N], lanes) -> the lane of each, int64 [N]."""
Array = npt.NDArray[Any]
Reduce = Callable[[Array, str], Array]
"""(values, sum or max) -> the same over all ranks. Collective."""


class Dealer:
    """Cuts a source that is read from front to back into lanes, and says whose a lane is.

    Lane l of L belongs to rank l·W // L: to one rank as a whole, so that what is computed lane by
    lane does not depend on the number of ranks W.
    """

    def __init__(
        self,
        lanes: int,
        lanes_of: LanesOf,
        rank: int = 0,
        world_size: int = 1,
        reduce: Reduce | None = None,
    ) -> None:
        self.lanes = lanes
        self.reduce: Reduce = reduce or (lambda values, _: values)
        self._lanes_of = lanes_of
        self.rank, self.world_size = rank, world_size

    @classmethod
    def over(cls, runtime: Runtime, lanes: int, lanes_of: LanesOf) -> Dealer:
        """Return the dealer over the ranks of a runtime."""

        def reduce(values: Array, op: str) -> Array:
            mine = torch.from_numpy(values.copy()).to(runtime.device)
            return runtime.all_reduce(mine, op).cpu().numpy()

        return cls(lanes, lanes_of, runtime.rank, runtime.world_size, reduce)

    @property
    def mine(self) -> list[int]:
        """This rank's lanes, ascending."""
        return [k for k in range(self.lanes) if k * self.world_size // self.lanes == self.rank]

    def own(self, ids: Ids) -> npt.NDArray[np.bool_]:
        """Return which of ``ids`` [N] lie in this rank's lanes, bool [N]. Local."""
        owned: npt.NDArray[np.bool_] = self._owner(ids) == self.rank
        return owned

    def deal(self, ids: Ids) -> Slices:
        """Return this rank's part of unique ``ids`` [N], which all ranks pass. Collective.

        Where they lie together there, in order, they are not copied, and must stay as they are.
        """
        mine = frozen(self._mine(ids))
        starts = range(0, len(mine), BLOCK)
        most = max((int(unpack_ids(some)[0].max()) for some in blocks(mine)), default=0)
        width = 1 + int(self.reduce(np.array([most]), "max")[0])
        sizes, in_order = np.zeros(self.lanes * width, dtype=np.int64), True
        for start in starts:
            some = mine[start : start + BLOCK + 1]  # and the next one, to compare with
            runs = self._runs(some, width)
            sizes += np.bincount(runs[:BLOCK], minlength=len(sizes))
            same = (runs[1:] == runs[:-1]) & (some[1:] >= some[:-1])
            in_order = in_order and bool((same | (runs[1:] > runs[:-1])).all())
        if not in_order:
            mine = mine[np.lexsort((mine, self._runs(mine, width)))]
        of_run = np.repeat(np.arange(self.lanes), width)
        return Slices(mine, sizes, self.reduce(sizes, "sum"), of_run, self.reduce)

    def _mine(self, ids: Ids) -> Ids:
        """Return those of ``ids`` that lie in this rank's lanes, in their order. Local."""
        first, end, number = len(ids), 0, 0
        for k, some in enumerate(blocks(ids)):
            at = k * BLOCK + np.flatnonzero(self.own(some))
            if len(at):
                first, end, number = min(first, int(at[0])), int(at[-1]) + 1, number + len(at)
        if number in (0, end - first):  # they lie together
            return ids[first : first + number]
        mine, end = np.empty(number, dtype=np.int64), 0
        for some in blocks(ids):
            some = some[self.own(some)]
            begin, end = end, end + len(some)
            mine[begin:end] = some
        return mine

    def _runs(self, ids: Ids, width: int) -> Ids:
        return self._lanes_of(ids, self.lanes) * width + unpack_ids(ids)[0]

    def _owner(self, ids: Ids) -> Ids:
        owner: Ids = self._lanes_of(ids, self.lanes) * self.world_size // self.lanes
        return owner


@dataclass(frozen=True, eq=False)
class Slices:
    """The samples of some ids that this rank holds, and how many of them each rank's runs have.

    A run is what one experience has in one lane; runs are numbered over all ranks, lane by lane.
    Arrays [n] beside ``ids`` [n] are summed over all ranks by :meth:`total` and its like (see
    :class:`distcl.priority.weighting.Sums`): run by run, and a run lies on one rank, so that no sum
    depends on the number of ranks. Collective.
    """

    ids: Ids
    """This rank's, int64 [n], in order of run, then of id."""
    sizes: Ids
    """How many of ``ids`` are in each run, int64 [R]; 0 for other ranks' runs."""
    everyones: Ids
    """The same over all ranks, int64 [R]."""
    lanes: Ids
    """The lane of each run, int64 [R]."""
    reduce: Reduce

    def runs(self) -> Iterator[tuple[int, slice]]:
        """Yield (number of the run, its place in ``ids``) of this rank's runs. Local."""
        end = 0
        for run in np.flatnonzero(self.sizes).tolist():
            begin, end = end, end + int(self.sizes[run])
            yield run, slice(begin, end)

    def pieces(self, size: int) -> list[Ids]:
        """Return ``ids`` lane by lane in chunks of ``size``, a lane's last one smaller. Local."""
        found, end = [], 0
        for lane in np.unique(self.lanes).tolist():
            begin, end = end, end + int(self.sizes[self.lanes == lane].sum())
            found += [self.ids[at : min(at + size, end)] for at in range(begin, end, size)]
        return found

    def number(self, _: Array | None = None) -> int:
        """Return how many samples all ranks hold. Local."""
        return int(self.everyones.sum())

    def total(self, values: Array, of: Of | None = None) -> float:
        """Return the sum of values [n], or of a function ``of`` them, over all ranks. Collective.

        In float64.
        """
        sums = np.zeros(len(self.sizes))
        for run, place in self.runs():
            sums[run] = summed(values[place], of)
        return float(self.reduce(sums, "sum").sum())

    def largest(self, values: Array) -> float:
        """Return the largest of values [n] over all ranks, -inf of none. Collective."""
        mine = np.array([values.max(initial=-math.inf)], dtype=np.float64)
        return float(self.reduce(mine, "max")[0])

    def smallest(self, values: Array) -> float:
        """Return the smallest of values [n] over all ranks, inf of none. Collective."""
        mine = np.array([-values.min(initial=math.inf)], dtype=np.float64)
        return -float(self.reduce(mine, "max")[0])

    def count(self, mask: npt.NDArray[np.bool_]) -> int:
        """Return how many of a mask [n] are true over all ranks. Collective."""
        return int(self.reduce(np.array([np.count_nonzero(mask)]), "sum")[0])

    def joined(self, other: Slices) -> Slices:
        """Return both, these first. Local."""
        return Slices(
            np.concatenate([self.ids, other.ids]),
            np.concatenate([self.sizes, other.sizes]),
            np.concatenate([self.everyones, other.everyones]),
            np.concatenate([self.lanes, other.lanes]),
            self.reduce,
        )

    def pick(self, ids: Ids, values: Array) -> Array:
        """Return the values [n] of mine from values [M] of ``ids`` [M], which have them all."""
        picked: Array = values[IdIndex(ids).locate(self.ids)[0]]
        return picked
