"""A weighted sampler for any number of processes, whose weights may change at any time."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import numpy.typing as npt
from torch.utils.data import Sampler

from distcl.distributed.memory import large_arrays
from distcl.distributed.runtime import part_of
from distcl.errors import UsageError
from distcl.priority import weighting
from distcl.sampling import draws
from distcl.sampling.groups import (
    ArrayLike,
    Group,
    Part,
    Permutations,
    ids_at,
    own,
    packed,
    unpacked,
)
from distcl.types import Ids

DRAWS = {
    "multinomial": draws.multinomial,
    "systematic": draws.systematic,
    "without_replacement": draws.without_replacement,
}
_IDENTITY = ("seed", "stream", "draw", "global_batch_size", "num_samples", "drop_last", "window")
_DIGEST_BLOCK = 1 << 20


class DistributedWeightedSampler(Sampler[list[int]]):
    """Yields this rank's part, a list of ids, of each global batch: a ``batch_sampler``.

    ``DataLoader(dataset, batch_sampler=sampler)`` works in any training loop; ids are then
    positions in the dataset. Every method is local: all ranks compute the same plan, a pure
    function of (seed, stream, round, epoch, draw, ids, weights), and each takes its part. So
    weights must be equal on all ranks to the last bit (gather scores first; broadcast the weights
    if the ranks' CPUs differ), and ranks draw the same global batches at every world size.

    A global batch of b ids is cut into contiguous parts whose sizes differ by at most one, larger
    ones first. The last batch of an epoch may be smaller, and a rank's part of it empty; the rank
    has the step all the same. (torch's default collate refuses an empty list: in a loop that
    cannot take one, use ``drop_last``.)

    An epoch is drawn at once, or, with ``window`` = R, R steps at a time, each window when its
    first step is asked for: then weights may change on the way, at the cost of the draws of R
    steps. In windows every batch has ``batch_size`` samples, of each group the same number, in
    proportion to the groups' draws (at least one), mixed evenly; groups without weights go through
    one permutation after another.

    As with torch's DistributedSampler, call ``set_epoch`` before each epoch. Accelerate must not
    shard it again: ``accelerator.prepare`` of its DataLoader raises UsageError at world_size > 1;
    leave the loader out and move batches with ``.to(accelerator.device)``. On one process the
    batches stay, but its loader counts epochs itself: when resuming, set
    ``loader.iteration = sampler.epoch``.

    Args:
        batch_size: samples of a global batch, over all ranks; at least ``world_size``.
        window: R, in steps, to change weights within an epoch; None: an epoch at once.
        num_samples: draws of an epoch; None: as many as the groups' draws, or ids.
        rank: this process, below ``world_size``.
        world_size: number of processes.
        seed: from 0 to 2**64 - 1.
        draw: ``multinomial``, ``systematic`` or ``without_replacement``, see draws.py.
        round_index: see ``set_round``.
        drop_last: leave out a smaller last batch.
        stream: keeps apart samplers that share a seed, such as current and history data.
    """

    def __init__(
        self,
        batch_size: int,
        *,
        window: int | None = None,
        num_samples: int | None = None,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        draw: str = "multinomial",
        round_index: int = 0,
        drop_last: bool = False,
        stream: int = 0,
    ) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(
                f"rank must be from 0 to world_size - 1 = {world_size - 1}, not {rank}"
            )
        if batch_size < world_size:
            raise ValueError(
                f"a global batch of {batch_size} cannot be split over {world_size} ranks"
            )
        for name, value in (("num_samples", num_samples), ("window", window)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        if draw not in DRAWS:
            raise ValueError(f"unknown draw '{draw}'; known: {', '.join(DRAWS)}")
        self.global_batch_size = batch_size
        self.window = window
        self.num_samples = num_samples
        self.rank = rank
        self.world_size = world_size
        self.seed = seed
        self.draw = draw
        self.drop_last = drop_last
        self.stream = stream
        self.round_index = round_index
        self.epoch = 0
        self._schedule: list[tuple[int, list[Part]]] = []  # what is drawn, from a window on
        self._sizes: list[int] = []  # of each group in a batch, in windows
        self._permutations: list[Permutations] = []  # of each group, in windows
        self._order: npt.NDArray[np.intp] = np.empty(0, dtype=np.intp)  # of a batch, in windows
        self._total = 0  # draws of an epoch
        self._restart()

    def _restart(self, step: int = 0) -> None:
        self._begin = self._handed_out = step
        self._next = step // self.window if self.window else 0  # the first window not drawn
        self._drawn: dict[int, tuple[weighting.Positions, list[Part]]] = {}
        self._plan = object()  # a new plan, to iterators of an old one

    def set_weights(
        self, ids: ArrayLike | int, weights: ArrayLike | None = None, *, from_step: int = 0
    ) -> None:
        """Replace what is drawn: ``ids`` int64 [N], or an int N for 0 … N-1, and weights [N].

        ``weights`` None draws uniformly without replacement (permutations). Both are copied unless
        they are read-only arrays, which must stay as they are. The plan begins anew at step 0,
        unless ``from_step`` is given, see :meth:`set_groups`.
        Raises ValueError for weights that are NaN, infinite, negative or all zero, naming the id.
        """
        number = int(ids) if isinstance(ids, int | np.integer) else int(np.prod(np.shape(ids)))
        self.set_groups([Group(ids, weights, self.num_samples or number)], from_step=from_step)

    def set_groups(self, groups: Sequence[Group], *, from_step: int = 0) -> None:
        """Replace what is drawn by several groups, each with its own number of draws an epoch.

        The groups' draws are shuffled together. ``from_step``, for a sampler with a ``window``:
        the first step of a window that is not drawn yet, to a DataLoader that reads ahead for one;
        batches before it stay as they are. The groups must then be as many as before.
        """
        if not groups:
            raise ValueError("there are no groups to draw from")
        held = [own(group) for group in groups]
        if from_step:
            self._schedule.append((self._window_from(from_step, len(held)), held))
            return
        self._schedule = [(0, held)]
        self._set_total()
        self._restart()

    def _set_total(self) -> None:
        groups = self._schedule[0][1]
        self._total = sum(group.draws for group in groups)
        if not self.window:
            return
        size, number = self.global_batch_size, self.num_samples or self._total
        steps = number // size if self.drop_last else -(-number // size)
        self._sizes = draws.apportion(size, [group.draws for group in groups])
        evenly = [(np.arange(size) + 0.5) / size for size in self._sizes]
        self._order = np.argsort(np.concatenate(evenly), kind="stable")
        self._permutations = [Permutations(self.seed, self.stream) for _ in groups]
        self._total = steps * size

    def _window_from(self, step: int, number: int) -> int:
        """Return the window that begins at ``step``, if ``number`` groups may hold from there."""
        if not self.window:
            raise UsageError("weights change within an epoch only in windows: give window")
        first, rest = divmod(step, self.window)
        before = len(self._schedule[0][1]) if self._schedule else 0
        if rest or first < self._next or number != before:
            raise UsageError(
                f"{number} groups from step {step} on: the plan has {before}, and windows of "
                f"{self.window} steps, drawn up to step {self._next * self.window}"
            )
        return first

    def set_epoch(self, epoch: int) -> None:
        """Begin another epoch, with other draws; no effect if it is the present one."""
        if epoch != self.epoch:
            self.epoch = epoch
            self._schedule = [(0, held) for _, held in self._schedule[-1:]]
            self._restart()

    def set_round(self, round_index: int) -> None:
        """Begin another round, with other draws, at epoch 0; no effect if it is the present one."""
        if round_index != self.round_index:
            self.round_index, self.epoch = round_index, 0
            self._schedule = [(0, held) for _, held in self._schedule[-1:]]
            self._restart()

    # ------------------------------------------------------------ the plan

    def __len__(self) -> int:
        """Return the number of steps of an epoch, equal on all ranks."""
        if not self._schedule:
            raise UsageError("the sampler has nothing to draw from: call set_weights first")
        full, rest = divmod(self._total, self.global_batch_size)
        return full + (rest > 0 and not self.drop_last)

    @property
    def first_step(self) -> int:
        """The step at which the next iteration begins: 0, or where a loaded state goes on."""
        return self._begin

    def __iter__(self) -> Iterator[list[int]]:
        """Yield this rank's part of each batch; after ``load_state_dict``, of those not consumed.

        Raises UsageError when the plan is replaced before the iterator is through.
        """
        plan, first = self._plan, self._begin
        self._begin, self._handed_out = 0, first
        for step in range(first, len(self)):
            if self._plan is not plan:
                raise UsageError(
                    "the sampler's plan was replaced while it was iterated over: begin a new "
                    "iteration, or give the sampler a window, and set_weights a from_step"
                )
            self._handed_out = step + 1
            begin, end = self._span(step)
            lo, hi = part_of(end - begin, self.rank, self.world_size)
            yield self._read(step, begin + lo, begin + hi).tolist()

    @property
    def batch_size(self) -> int:
        """The global batch size, on one process. With several, what reads this shards again."""
        if self.world_size > 1:
            raise UsageError(
                "DistributedWeightedSampler already gives each rank its part of every batch: leave "
                "its DataLoader out of accelerator.prepare, and move batches with "
                ".to(accelerator.device)"
            )
        return self.global_batch_size

    def total(self, step: int) -> int:
        """Return the size of a global batch."""
        begin, end = self._span(step)
        return end - begin

    def view(self, step: int) -> tuple[int, ...]:
        """Return (seed, round, epoch) of a step, by which random transforms draw.

        In windows, an epoch ends when as many are drawn as the groups say.
        """
        epoch = self.epoch
        if self.window:
            drawn = (epoch * len(self) + step) * self.global_batch_size
            epoch = drawn // sum(group.draws for group in self._schedule[0][1])
        return self.seed, self.round_index, epoch

    def global_batch(self, step: int) -> Ids:
        """Return the ids of all ranks' parts of a batch, int64 [b], in order of rank.

        In windows, steps come in order; one may go back as far as the window before the newest.
        """
        return self._read(step, *self._span(step))

    def parts(self, step: int) -> list[tuple[int, Ids]]:
        """Return a global batch as (0, its ids), see LaneSampler."""
        return [(0, self.global_batch(step))]

    def groups(self, step: int) -> list[Part]:
        """Return what a step's batch was drawn from; steps as for :meth:`global_batch`."""
        return self._window(step)[1]

    def plan_digest(self, steps: int | None = None) -> str:
        """Return the SHA-256, in hex, of the ids of the first ``steps`` global batches (or all).

        As little-endian int64; equal on every rank. In windows, by the weights known now.
        """
        digest = hashlib.sha256()
        steps = len(self) if steps is None else steps
        end = self._span(steps - 1)[1] if steps else 0
        size = self.window * self.global_batch_size if self.window else max(end, 1)
        for index in range(-(-end // size)):
            positions, groups = self._drawn.get(index) or self._draw(index)
            positions = positions[: end - index * size]
            for begin in range(0, len(positions), _DIGEST_BLOCK):
                ids = ids_at(positions[begin : begin + _DIGEST_BLOCK], groups)
                digest.update(ids.astype("<i8", copy=False).tobytes())
        return digest.hexdigest()

    def _span(self, step: int) -> tuple[int, int]:
        """Return the first draw of a step and the one after its last."""
        if not 0 <= step < len(self):
            raise ValueError(f"step {step} is not among the {len(self)} steps of the epoch")
        begin = step * self.global_batch_size
        return begin, min(begin + self.global_batch_size, self._total)

    def _read(self, step: int, begin: int, end: int) -> Ids:
        """Return the ids of draws ``begin`` to ``end``, which are of a step."""
        positions, groups = self._window(step)
        first = step // self.window * self.window * self.global_batch_size if self.window else 0
        return ids_at(positions[begin - first : end - first], groups)

    def _window(self, step: int) -> tuple[weighting.Positions, list[Part]]:
        """Return the draws of the window of a step, or of the epoch, and what they are from."""
        index = step // self.window if self.window else 0
        while self._next <= index:
            with large_arrays() if self.window is None else nullcontext():
                self._drawn[self._next] = self._draw(self._next)
            self._drawn.pop(self._next - 2, None)
            self._next += 1
        while len(self._schedule) > 1 and self._schedule[1][0] < self._next:
            del self._schedule[0]
        return self._drawn[index]

    def _draw(self, index: int) -> tuple[weighting.Positions, list[Part]]:
        """Draw a window, or the epoch: positions for ``_at``, and the groups that they are in."""
        groups = [groups for first, groups in self._schedule if first <= index][-1]
        kind = draws.index_type(sum(len(group.ids) for group in groups))
        rng = draws.generator(self.seed, self.stream, self.round_index, self.epoch)
        parts, offset = [], 0
        for g, group in enumerate(groups):
            drawn = self._of_window(index, g, group) if self.window else self._of_epoch(group, rng)
            part = drawn.astype(kind, copy=False)
            if offset:
                part += kind(offset)
            parts.append(part)
            offset += len(group.ids)
        if self.window:
            columns = [p.reshape(-1, size) for p, size in zip(parts, self._sizes, strict=True)]
            return np.concatenate(columns, axis=1)[:, self._order].ravel(), groups
        if len(parts) == 1:
            return parts[0], groups
        joined = np.concatenate(parts)
        rng.shuffle(joined)
        return joined, groups

    def _of_epoch(self, group: Part, rng: np.random.Generator) -> weighting.Positions:
        if group.weights is None:
            return draws.uniform(len(group.ids), group.draws, rng)
        return DRAWS[self.draw](group.weights, group.draws, rng)

    def _of_window(self, index: int, g: int, group: Part) -> weighting.Positions:
        """Return a group's draws in a window; steps and windows count on over epochs."""
        assert self.window
        steps, size = len(self), self._sizes[g]
        first = self.epoch * steps + index * self.window
        number = size * min(self.window, steps - index * self.window)
        if group.weights is None:
            return self._permutations[g].take(
                self.round_index, len(group.ids), first * size, number, kind=2 * g + 1
            )
        window = self.epoch * -(-steps // self.window) + index
        rng = draws.generator(self.seed, self.stream, self.round_index, window, 2 * g)
        return DRAWS[self.draw](group.weights, number, rng)

    def state_dict(self, consumed: int | None = None) -> dict[str, Any]:
        """Return all that a resume needs: ints, strings and tensors (ids and weights included).

        ``consumed``: the steps trained on so far. None takes the steps handed out, which a
        DataLoader with workers lets run ahead. The same at every rank and world size.
        """
        step = self._handed_out if consumed is None else consumed
        if not 0 <= step <= len(self):
            raise ValueError(f"consumed must be from 0 to {len(self)} steps, not {step}")
        index = step // self.window if self.window else 0
        if index < self._next and index not in self._drawn:
            raise UsageError(f"step {step} is of a window that is gone")
        now = [(index, self._drawn[index][1])] if index in self._drawn else []
        ahead = [(first, groups) for first, groups in self._schedule if first > index or not now]
        return {
            **{name: getattr(self, name) for name in _IDENTITY},
            "round": self.round_index,
            "epoch": self.epoch,
            "step": step,
            "schedule": [
                {"window": first, "groups": [packed(group) for group in groups]}
                for first, groups in now + ahead
            ],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where ``state_dict`` was called, at any world size.

        Raises ValueError if this sampler would draw other batches: constructed with another
        batch size, window, seed, stream, draw, num_samples or drop_last.
        """
        for name in _IDENTITY:
            if name not in state or state[name] != getattr(self, name):
                raise ValueError(
                    f"the sampler's state was saved with {name} = {state.get(name)!r}, but this "
                    f"sampler has {getattr(self, name)!r}"
                )
        self._schedule = [
            (entry["window"], [unpacked(group) for group in entry["groups"]])
            for entry in state["schedule"]
        ]
        self.round_index, self.epoch = state["round"], state["epoch"]
        self._set_total()
        self._restart(state["step"])
