"""Weighted draws from data that are read from front to back, the same at every world size."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from distcl.distributed.memory import large_arrays
from distcl.errors import UsageError
from distcl.priority import weighting
from distcl.priority.population import Array, Slices
from distcl.priority.weighting import Sums
from distcl.sampling import draws
from distcl.sampling.groups import Part
from distcl.types import ROW_BITS, Ids

_ROWS = (1 << ROW_BITS) - 1
_BLOCK = 1 << 16  # weights quantized together


class LaneSampler:
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
        self.batch_size = batch_size
        self.round_index = round_index
        self.epoch = 0
        self._window = window
        self._seed = seed
        self._stream = stream
        self._groups: list[Part] = []
        self._sums: list[Array] = []  # of each group's weights in fixed point, by run
        self._exponents: list[int] = []
        self._total = 0
        self._restart()

    def _restart(self, step: int = 0) -> None:
        self._begin = step
        self._plan: _Plan | None = None

    def set_groups(self, groups: Sequence[Part]) -> None:
        """Replace what is drawn: exactly ``draws`` of each part, whose ``over`` is a Slices.

        Without weights every sample is drawn as often as any other, but for one. Collective.
        Raises ValueError naming the id of a bad weight.
        """
        self._groups, self._sums, self._exponents = list(groups), [], []
        for group in groups:
            held, number = _slices(group.over), _slices(group.over).number()
            if number == 0:
                raise ValueError("there are no ids to draw from")
            if group.weights is None:
                self._exponents.append(0)
                self._sums.append(held.everyones)
                continue
            weights = weighting.check_weights(group.weights, held.ids, held)
            exponent = draws.fixed_point_exponent(held.largest(weights), number)
            sums = np.zeros(len(held.sizes), dtype=np.int64)
            for run, place in held.runs():
                units = _units(weights[place], place.stop - place.start, exponent)
                sums[run] = sum(int(block.sum()) for block in units)
            self._exponents.append(exponent)
            self._sums.append(held.reduce(sums, "sum"))
        self._total = sum(group.draws for group in groups)
        self._restart()

    def set_round(self, round_index: int) -> None:
        """Begin another round, with other draws, at epoch 0; no effect if it is the present one."""
        if round_index != self.round_index:
            self.round_index, self.epoch = round_index, 0
            self._restart()

    def set_epoch(self, epoch: int) -> None:
        """Begin another epoch, with other draws; no effect if it is the present one."""
        if epoch != self.epoch:
            self.epoch = epoch
            self._restart()

    def __len__(self) -> int:
        """Return the number of steps of an epoch, equal on all ranks."""
        if not self._total:
            raise UsageError("the sampler has nothing to draw from: call set_groups first")
        return -(-self._total // self.batch_size)

    @property
    def first_step(self) -> int:
        """The step at which the next iteration begins: 0, or where a loaded state goes on."""
        return self._begin

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
        held = [_slices(group.over).lanes[_slices(group.over).sizes > 0] for group in self._groups]
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
                self._plan = self._draw()
        plan, begin = self._plan, step * self.batch_size
        first, last = plan.merged(begin), plan.merged(begin + self.total(step))
        return [
            (lane, ids[drawn[first[run] : last[run]]])
            for run, (lane, ids, drawn) in plan.mine.items()
            if first[run] < last[run]
        ]

    def _draw(self) -> _Plan:
        """Draw an epoch: how often each run is drawn, and this rank's draws in order."""
        rng = self._generator(0)
        shift = int(rng.integers(self._window))
        counts: list[Ids] = []
        mine: dict[int, tuple[int, Ids, weighting.Positions]] = {}
        first = 0  # the group's first run
        for group, sums, exponent in zip(self._groups, self._sums, self._exponents, strict=True):
            u, total, held = rng.random(), int(sums.sum()), _slices(group.over)
            counts.append(draws.systematic_counts_local(sums, 0, total, group.draws, u))
            offsets = np.cumsum(sums) - sums
            for run, place in held.runs():
                if not counts[-1][run]:
                    continue
                weights = None if group.weights is None else group.weights[place]
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
                mine[first + run] = int(held.lanes[run]), ids, drawn
            first += len(sums)
        in_order = sorted(mine.items(), key=lambda item: (item[1][0], item[0]))  # lane by lane
        return _Plan(np.concatenate(counts), dict(in_order))

    def _shuffle(self, ids: Ids, drawn: weighting.Positions, shift: int, run: int) -> None:
        """Bring positions in a run's ids, ascending so far, into random order in each window."""
        rng = self._generator(1 + run)
        low, high = ids[drawn[[0, -1]]]
        first, last = (int(low) & _ROWS) + shift, (int(high) & _ROWS) + shift
        starts = np.arange(first // self._window + 1, last // self._window + 1) * self._window
        edges = np.searchsorted(ids, starts - first + low).astype(drawn.dtype)
        ends = np.searchsorted(drawn, edges).tolist()
        for begin, end in itertools.pairwise([0, *ends, len(drawn)]):
            keys = rng.random(end - begin)
            drawn[begin:end] = drawn[begin:end][np.argsort(keys, kind="stable")]

    def _generator(self, last: int) -> np.random.Generator:
        return draws.generator(self._seed, self._stream, self.round_index, self.epoch, last)

    def state_dict(self, consumed: int) -> dict[str, Any]:
        """Return where a resume after ``consumed`` steps of this epoch goes on, at any world size.

        Plain values, the same on every rank; what is drawn is not among them.
        """
        identity = self._identity()
        return {
            "round": self.round_index,
            "epoch": self.epoch,
            "step": consumed,
            "identity": identity,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where ``state_dict`` was taken, with the same groups, set before. Local.

        Raises ValueError if seed, batch size or window differ.
        """
        if state["identity"] != self._identity():
            raise ValueError(
                f"the saved draws are of (seed, stream, batch size, window) "
                f"{state['identity']}, not {self._identity()}"
            )
        self.round_index, self.epoch = state["round"], state["epoch"]
        self._restart(state["step"])

    def _identity(self) -> list[int]:
        return [self._seed, self._stream, self.batch_size, self._window]


def _units(weights: weighting.Weights | None, number: int, exponent: int) -> Iterator[Ids]:
    """Yield weights [n] in fixed point, blocks after one another; None: ones."""
    for start in range(0, number, _BLOCK):
        size = min(_BLOCK, number - start)
        if weights is None:
            yield np.ones(size, dtype=np.int64)
        else:
            yield draws.quantize(weights[start : start + size], exponent)


class _Plan:
    """The draws of an epoch: ``counts`` [R] of each run of all ranks, and this rank's."""

    def __init__(self, counts: Ids, mine: dict[int, tuple[int, Ids, weighting.Positions]]) -> None:
        self.mine = mine
        """(lane, ids, positions in these as drawn) of this rank's runs, by their number."""
        self._counts = counts
        self._total = int(counts.sum())
        # how far the k-th draw of all may be from a run's share of k, in draws of the run
        self._spare = np.ceil(len(counts) * counts / self._total).astype(np.int64) + 1
        self._last: dict[int, Ids] = {}

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


def _slices(over: Sums) -> Slices:
    assert isinstance(over, Slices)
    return over
