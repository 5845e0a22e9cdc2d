"""Samples dealt out by lanes: each rank holds its own."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch

from distcl.data.ids import BLOCK, blocks
from distcl.distributed.runtime import Runtime
from distcl.priority.weighting import Array, Reduce, Slices
from distcl.types import Ids, frozen, unpack_ids

LanesOf = Callable[[Ids, int], Ids]
"""(ids [N], lanes) -> the lane of each, int64 [N]."""


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
