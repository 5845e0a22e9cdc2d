"""Weighted draws from data that are read from front to back, the same at every world size."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from distcl.distributed.memory import large_arrays
from distcl.errors import UsageError
from distcl.priority.weighting import Positions, Slices, Weights
from distcl.sampling import draws
from distcl.sampling.groups import Part
from distcl.sampling.sampler import RoundSampler
from distcl.types import ROW_BITS, Ids

_ROWS = (1 << ROW_BITS) - 1
_BLOCK = 1 << 16  # weights quantized together


class LaneSampler(RoundSampler):
    """Yields this rank's part, a list of ids, of each global batch of a sequential source.

    The source is cut into lanes, each read in order; a lane belongs to one rank, which alone has
    the weights of its samples. Of the others it knows one number a run (what an experience has in
    a lane), the sum of the run's weights in int64 fixed point. A sample is drawn a *number of
    times* (:func:`distcl.sampling.draws.systematic_counts_local`), so a pass over the data is one
    pass over the shards, and what has count 0 is passed over undecoded. Draws are shuffled within
    windows of ``window`` neighbouring samples of a run; the windows begin elsewhere in every
    epoch. Runs are merged evenly, each in proportion to its number of draws.

    So the global batches are a pure function of (seed, stream, round, epoch, ids, weights), at any
    world size; a rank's part may be large, small or empty, and every rank has every step. All but
    ``set_groups`` is local. Memory: 4 bytes for each of this rank's draws.
    """

    def __init__(
        self,
        batch_size: int,
        *,
        window: int,
        seed: int = 0,
        round_index: int = 0,
        stream: int = 0,
    ) -> None:
        super().__init__(round_index)
        self.batch_size = batch_size
        self._window = window
        self._seed = seed
        self._stream = stream
        self._identity = [seed, stream, batch_size, window]
        self._groups: list[Part] = []
        self._sums: list[Ids] = []  # of each group's weights in fixed point, by run
        self._exponents: list[int] = []
        self._total = 0
        self._plan: _Plan | None = None

    def _restart(self, step: int = 0) -> None:
        self._begin = step
        self._plan = None

    def set_groups(self, groups: Sequence[Part]) -> None:
        """Replace what is drawn: exactly ``draws`` of each part, which has slices.

        Without weights every sample is drawn as often as any other, but for one. Collective.
        Raises ValueError naming the id of a bad weight.
        """
        self._groups, self._sums, self._exponents = list(groups), [], []
        for group in groups:
            held = _slices(group)
            if held.number == 0:
                raise ValueError("there are no ids to draw from")
            if group.values is None:
                self._exponents.append(0)
                self._sums.append(held.everyones)
                continue
            group.check()
            exponent = draws.fixed_point_exponent(group.max(), held.number)
            sums = np.zeros(len(held.sizes), dtype=np.int64)
            for run, place in held.runs():
                units = _units(group.values[place], place.stop - place.start, exponent)
                sums[run] = sum(int(block.sum()) for block in units)
            self._exponents.append(exponent)
            self._sums.append(held.reduce(sums, "sum"))
        self._total = sum(group.draws for group in groups)
        self._restart()

    def __len__(self) -> int:
        """Return the number of steps of an epoch, equal on all ranks."""
        if not self._total:
            raise UsageError("the sampler has nothing to draw from: call set_groups first")
        return -(-self._total // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        """Yield this rank's part of each batch; after a resume, of those not consumed."""
        first, self._begin = self._begin, 0
        for step in range(first, len(self)):
            yield [id_ for _, ids in self.parts(step) for id_ in ids.tolist()]

    @property
    def readers(self) -> int:
        """The number of lanes in which this rank has samples."""
        return len(self._lanes())

    def _lanes(self) -> list[int]:
        held = [_slices(group).lanes[_slices(group).sizes > 0] for group in self._groups]
        return [int(lane) for lane in np.unique(np.concatenate([np.empty(0, np.int64), *held]))]

    def cut(self, step: int, readers: int) -> list[list[int]]:
        """Return this rank's part of a batch as ``readers`` parts, each of its own lanes."""
        lanes, found = self._lanes(), [list[int]() for _ in range(readers)]
        for lane, ids in self.parts(step):
            found[lanes.index(lane) * readers // len(lanes)] += ids.tolist()
        return found

    def total(self, step: int) -> int:
        """Return the size of a global batch."""
        return min(self.batch_size, self._total - step * self.batch_size)

    def view(self, step: int) -> tuple[int, ...]:
        """Return (seed, round, epoch) of a step, by which random transforms draw."""
        return self._seed, self.round_index, self.epoch

    def groups(self, step: int) -> list[Part]:
        """Return what a batch is drawn from."""
        return self._groups

    def parts(self, step: int) -> list[tuple[int, Ids]]:
        """Return (lane, ids int64 [b]) of this rank's part of a batch, in order of lanes, runs."""
        if self._plan is None:
            with large_arrays():
                key = self._seed, self._stream, self.round_index, self.epoch
                self._plan = _Plan(self._groups, self._sums, self._exponents, self._window, key)
        plan, begin = self._plan, step * self.batch_size
        first, last = plan.merged(begin), plan.merged(begin + self.total(step))
        return [
            (lane, ids[drawn[first[run] : last[run]]])
            for run, (lane, ids, drawn) in plan.mine.items()
            if first[run] < last[run]
        ]

    def state_dict(self, consumed: int) -> dict[str, Any]:
        """Return where a resume after ``consumed`` steps of this epoch goes on, at any world size.

        Plain values, the same on every rank; what is drawn is not among them.
        """
        return {
            "round": self.round_index,
            "epoch": self.epoch,
            "step": consumed,
            "identity": self._identity,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where ``state_dict`` was taken, with the same groups, set before. Local.

        Raises ValueError if seed, batch size or window differ.
        """
        if state["identity"] != self._identity:
            raise ValueError(
                f"the saved draws are of (seed, stream, batch size, window) "
                f"{state['identity']}, not {self._identity}"
            )
        self.round_index, self.epoch = state["round"], state["epoch"]
        self._restart(state["step"])


def _units(weights: Weights | None, number: int, exponent: int) -> Iterator[Ids]:
    """Yield weights [n] in fixed point, blocks after one another; None: ones."""
    for start in range(0, number, _BLOCK):
        size = min(_BLOCK, number - start)
        if weights is None:
            yield np.ones(size, dtype=np.int64)
        else:
            yield draws.quantize(weights[start : start + size], exponent)


class _Plan:
    """The draws of an epoch: how often each run of all ranks is drawn, and this rank's in order.

    ``key``: (seed, stream, round, epoch). ``sums`` and ``exponents``: of each group's weights in
    fixed point, by run.
    """

    def __init__(
        self,
        groups: Sequence[Part],
        sums: Sequence[Ids],
        exponents: Sequence[int],
        window: int,
        key: tuple[int, int, int, int],
    ) -> None:
        self._window = window
        self._key = key
        self.mine: dict[int, tuple[int, Ids, Positions]] = {}
        """(lane, ids, positions in these as drawn) of this rank's runs, by their number."""
        rng = draws.generator(*key)
        shift = int(rng.integers(window))
        counts: list[Ids] = []
        first = 0  # the group's first run
        for group, of_runs, exponent in zip(groups, sums, exponents, strict=True):
            u, total, held = rng.random(), int(of_runs.sum()), _slices(group)
            counts.append(draws.systematic_counts_local(of_runs, 0, total, group.draws, u))
            offsets = np.cumsum(of_runs) - of_runs
            for run, place in held.runs():
                if not counts[-1][run]:
                    continue
                weights = None if group.values is None else group.values[place]
                ids = held.ids[place]
                number = draws.systematic_count_blocks(
                    _units(weights, len(ids), exponent),
                    int(offsets[run]),
                    total,
                    group.draws,
                    u,
                )
                drawn = np.empty(counts[-1][run], dtype=draws.index_type(len(ids) + 1))
                end = 0
                for block, start in zip(number, range(0, len(ids), _BLOCK), strict=True):
                    begin, end = end, end + int(block.sum())
                    drawn[begin:end] = np.repeat(np.arange(start, start + len(block)), block)
                self._shuffle(ids, drawn, shift, first + run)
                self.mine[first + run] = int(held.lanes[run]), ids, drawn
            first += len(of_runs)
        in_order = sorted(self.mine.items(), key=lambda item: (item[1][0], item[0]))
        self.mine = dict(in_order)  # lane by lane
        self._counts = np.concatenate(counts)
        self._total = int(self._counts.sum())
        # how far the k-th draw of all may be from a run's share of k, in draws of the run
        self._spare = np.ceil(len(self._counts) * self._counts / self._total).astype(np.int64) + 1
        self._last: dict[int, Ids] = {}

    def _shuffle(self, ids: Ids, drawn: Positions, shift: int, run: int) -> None:
        """Bring positions in a run's ids, ascending so far, into random order in each window."""
        rng = draws.generator(*self._key, 1 + run)
        low, high = ids[drawn[[0, -1]]]
        first, last = (int(low) & _ROWS) + shift, (int(high) & _ROWS) + shift
        starts = np.arange(first // self._window + 1, last // self._window + 1) * self._window
        edges = np.searchsorted(ids, starts - first + low).astype(drawn.dtype)
        ends = np.searchsorted(drawn, edges).tolist()
        for begin, end in itertools.pairwise([0, *ends, len(drawn)]):
            keys = rng.random(end - begin)
            drawn[begin:end] = drawn[begin:end][np.argsort(keys, kind="stable")]

    def merged(self, number: int) -> Ids:
        """Return how many of the first ``number`` draws of the epoch are of each run, int64 [R].

        Draw j of the C of a run is due at (j + 1/2) / C of the epoch; equal ones in order of run.
        """
        if number not in self._last:
            found = self._merge(number)
            self._last = dict([*self._last.items()][-1:])  # a batch begins where another ends
            self._last[number] = found
        return self._last[number]

    def _merge(self, number: int) -> Ids:
        near = np.rint(self._counts * (number / self._total)).astype(np.int64)
        low = np.clip(near - self._spare, 0, self._counts)
        width = np.clip(near + self._spare, 0, self._counts) - low
        run = np.repeat(np.arange(len(width)), width)
        draw = np.arange(len(run)) - (np.cumsum(width) - width)[run] + low[run]
        due = (draw + 0.5) / self._counts[run]
        first = np.argsort(due, kind="stable")[: number - int(low.sum())]
        merged: Ids = low + np.bincount(run[first], minlength=len(low))
        return merged


def _slices(group: Part) -> Slices:
    assert group.slices is not None
    return group.slices
