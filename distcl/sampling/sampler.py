"""A weighted sampler for any number of processes, whose weights may change at any time."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Sampler

from distcl.distributed.memory import large_arrays
from distcl.distributed.runtime import part_of
from distcl.errors import UsageError
from distcl.priority import weighting
from distcl.sampling import draws
from distcl.sampling.draws import apportion
from distcl.types import Ids, as_tensor

DRAWS = {
    "multinomial": draws.multinomial,
    "systematic": draws.systematic,
    "without_replacement": draws.without_replacement,
}
_IDENTITY = ("seed", "stream", "draw", "global_batch_size", "num_samples", "drop_last")
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

    As with torch's DistributedSampler, call ``set_epoch`` before each epoch.

    Accelerate must not shard it a second time: on several processes ``accelerator.prepare`` of
    its DataLoader raises UsageError (at world_size > 1), so leave the loader out of ``prepare``
    and move batches with ``.to(accelerator.device)``. On one process ``prepare`` keeps the
    batches as they are, but its loader sets the epoch by a count of its own: when resuming, set
    ``loader.iteration = sampler.epoch``.

    Args:
        batch_size: samples of a global batch, over all ranks; at least ``world_size``.
        num_samples: draws of an epoch; None: as many as there are ids.
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
        if num_samples is not None and num_samples < 1:
            raise ValueError(f"num_samples must be at least 1, not {num_samples}")
        if draw not in DRAWS:
            raise ValueError(f"unknown draw '{draw}'; known: {', '.join(DRAWS)}")
        self.global_batch_size = batch_size
        self.num_samples = num_samples
        self.rank = rank
        self.world_size = world_size
        self.seed = seed
        self.draw = draw
        self.drop_last = drop_last
        self.stream = stream
        self.round_index = round_index
        self.epoch = 0
        self._ids: list[Ids | int] = []  # of each group; an int n stands for range(n)
        self._weights: list[weighting.Weights | None] = []  # of each group
        self._sizes: list[int] = []  # ids of each group
        self._quotas: list[int] = []  # draws of each group in an epoch
        self._kept: list[int] = []  # those of them that are in _drawn
        self._total = 0  # draws of an epoch
        self._restart()

    def _restart(self, step: int = 0) -> None:
        """Forget the plan; the next iterator begins at ``step``."""
        self._begin = self._handed_out = step
        self._revision = 0
        self._drawn = np.empty(0, dtype=np.int64)  # ids drawn from weights since replaced
        self._kept = [0] * len(self._sizes)
        self._positions: weighting.Positions | None = None  # what follows, once drawn
        self._plan = object()  # a new plan, to iterators of an old one

    # ------------------------------------------------------------ what is drawn

    def set_weights(
        self,
        ids: ArrayLike | int,
        weights: ArrayLike | None = None,
        *,
        from_step: int = 0,
    ) -> None:
        """Replace what is drawn: ``ids`` int64 [N], or an int N for 0 … N-1, and weights [N].

        ``weights`` None draws uniformly without replacement (permutations). Both are copied unless
        they are read-only arrays, which must stay as they are. The plan begins anew at step 0,
        unless ``from_step`` is given: then batches before that step stay as they were drawn, and
        the rest of the epoch is drawn from the new weights (and may repeat ids drawn before,
        without replacement too). Steps that were already handed out, a DataLoader's prefetching
        included, or that an earlier ``from_step`` fixed, must stay.
        Raises ValueError for weights that are NaN, infinite, negative or all zero, naming the id.
        """
        number = int(ids) if isinstance(ids, int | np.integer) else int(np.prod(np.shape(ids)))
        self.set_groups([Group(ids, weights, self.num_samples or number)], from_step=from_step)

    def set_groups(self, groups: Sequence[Group], *, from_step: int = 0) -> None:
        """Replace what is drawn by several groups, each with its own number of draws an epoch.

        The groups' draws are shuffled together. Otherwise as :meth:`set_weights`; with
        ``from_step`` the groups must be as many as before, with the same draws each.
        """
        if not groups:
            raise ValueError("there are no groups to draw from")
        ids, weights = [], []
        for group in groups:
            ids.append(own_ids(group.ids))
            number = size_of(ids[-1])
            if number < 1:
                raise ValueError("there are no ids to draw from")
            if group.draws < 0:
                raise ValueError(f"a group's draws must not be negative, not {group.draws}")
            weights.append(None if group.weights is None else own_weights(group.weights))
            if (given := weights[-1]) is not None:
                if given.shape != (number,):
                    raise ValueError(f"weights of shape {given.shape} for {number} ids")
                weighting.check_weights(given, None if isinstance(ids[-1], int) else ids[-1])
        quotas = [group.draws for group in groups]
        if from_step:
            self._keep_until(from_step, quotas)
        self._ids, self._weights, self._sizes = ids, weights, [size_of(i) for i in ids]
        if not from_step:
            self._quotas, self._total = quotas, sum(quotas)
            self._restart()

    def _keep_until(self, step: int, quotas: list[int]) -> None:
        """Fix the batches before ``step``; the others are to be drawn anew."""
        fixed = max(self._handed_out, -(-len(self._drawn) // self.global_batch_size))
        if not fixed <= step <= len(self):
            raise ValueError(
                f"from_step must be from {fixed} to {len(self)}, not {step}: the steps before were "
                "handed out, or fixed by an earlier from_step"
            )
        if quotas != self._quotas:
            raise ValueError(
                f"an epoch of {self._quotas} draws cannot go on with {quotas}; give num_samples "
                "if the number of ids changes within an epoch"
            )
        end = min(step * self.global_batch_size, self._total)
        drawn = self._read(0, end).copy()
        if self._positions is not None:
            fresh = self._positions[: end - len(self._drawn)]
            ends = np.cumsum(self._sizes)
            counts = np.bincount(np.searchsorted(ends, fresh, side="right"), minlength=len(ends))
            self._kept = [kept + int(n) for kept, n in zip(self._kept, counts, strict=True)]
        self._drawn = drawn
        self._positions = None
        self._revision += 1

    def set_epoch(self, epoch: int) -> None:
        """Begin another epoch, with other draws; no effect if it is the present one."""
        if epoch != self.epoch:
            self.epoch = epoch
            self._restart()

    def set_round(self, round_index: int) -> None:
        """Begin another round, with other draws, at epoch 0; no effect if it is the present one."""
        if round_index != self.round_index:
            self.round_index, self.epoch = round_index, 0
            self._restart()

    # ------------------------------------------------------------ the plan

    def __len__(self) -> int:
        """Return the number of steps of an epoch, equal on all ranks."""
        if not self._total:
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
                    "iteration, or give set_weights a from_step"
                )
            self._handed_out = step + 1
            begin, end = self._span(step)
            lo, hi = part_of(end - begin, self.rank, self.world_size)
            yield self._read(begin + lo, begin + hi).tolist()

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
        """Return (seed, round, epoch) of a step, by which random transforms draw."""
        return self.seed, self.round_index, self.epoch

    def global_batch(self, step: int) -> Ids:
        """Return the ids of all ranks' parts of a batch, int64 [b], in order of rank."""
        return self._read(*self._span(step)).copy()

    def plan_digest(self, steps: int | None = None) -> str:
        """Return the SHA-256, in hex, of the ids of the first ``steps`` global batches (or all).

        Digested as little-endian int64, so it is equal on every rank and at every world size.
        """
        digest = hashlib.sha256()
        steps = len(self) if steps is None else steps
        end = self._span(steps - 1)[1] if steps else 0
        for begin in range(0, end, _DIGEST_BLOCK):
            ids = self._read(begin, min(begin + _DIGEST_BLOCK, end))
            digest.update(ids.astype("<i8", copy=False).tobytes())
        return digest.hexdigest()

    def _span(self, step: int) -> tuple[int, int]:
        """Return the first draw of a step and the one after its last."""
        if not 0 <= step < len(self):
            raise ValueError(f"step {step} is not among the {len(self)} steps of the epoch")
        begin = step * self.global_batch_size
        return begin, min(begin + self.global_batch_size, self._total)

    def _read(self, begin: int, end: int) -> Ids:
        """Return the ids of draws ``begin`` to ``end``."""
        kept = len(self._drawn)
        if end <= kept:
            return self._drawn[begin:end]
        if self._positions is None:
            with large_arrays():
                self._positions = self._draw()
        positions = self._positions[max(begin - kept, 0) : end - kept]
        ids = self._at(positions)
        return ids if begin >= kept else np.concatenate([self._drawn[begin:kept], ids])

    def _at(self, positions: weighting.Positions) -> Ids:
        """Return the ids at positions, which count through the groups one after another."""
        if len(self._ids) == 1:
            ids = self._ids[0]
            return positions.astype(np.int64) if isinstance(ids, int) else ids[positions]
        found, first = positions.astype(np.int64), 0
        for ids, size in zip(self._ids, self._sizes, strict=True):
            here = np.flatnonzero((positions >= first) & (positions < first + size))
            local = positions[here] - first
            found[here] = local if isinstance(ids, int) else ids[local]
            first += size
        return found

    def _draw(self) -> weighting.Positions:
        """Return positions for ``_at``: of each group what it has left to draw, shuffled."""
        rng = draws.generator(self.seed, self.stream, self.round_index, self.epoch, self._revision)
        parts, offset, kind = [], 0, draws.index_type(sum(self._sizes))
        for size, weights, quota, kept in zip(
            self._sizes, self._weights, self._quotas, self._kept, strict=True
        ):
            n = quota - kept
            if weights is None:
                part = draws.uniform(size, n, rng)
            else:
                part = DRAWS[self.draw](weights, n, rng)
            part = part.astype(kind, copy=False)
            if offset:
                part += offset
            parts.append(part)
            offset += size
        if len(parts) == 1:
            return parts[0]
        joined = np.concatenate(parts)
        rng.shuffle(joined)
        return joined

    # ------------------------------------------------------------ state

    def state_dict(self, consumed: int | None = None) -> dict[str, Any]:
        """Return all that a resume needs: ints, strings and tensors (ids and weights included).

        ``consumed``: the steps trained on so far. None takes the steps handed out, which a
        DataLoader with workers lets run ahead. The same at every rank and world size.
        """
        step = self._handed_out if consumed is None else consumed
        if not 0 <= step <= len(self):
            raise ValueError(f"consumed must be from 0 to {len(self)} steps, not {step}")
        ids = self._ids[0] if self._ids else 0
        if len(self._ids) > 1:
            ids = np.concatenate([as_ids(some) for some in self._ids])
        return {
            **{name: getattr(self, name) for name in _IDENTITY},
            "round": self.round_index,
            "epoch": self.epoch,
            "step": step,
            "revision": self._revision,
            "sizes": self._sizes,
            "quotas": self._quotas,
            "kept": self._kept,
            "ids": ids if isinstance(ids, int) else as_tensor(ids),
            "weights": [as_tensor(w) for w in self._weights],
            "drawn": as_tensor(self._drawn),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where ``state_dict`` was called, at any world size.

        Raises ValueError if this sampler would draw other batches: constructed with another
        batch size, seed, stream, draw, num_samples or drop_last.
        """
        for name in _IDENTITY:
            if name not in state or state[name] != getattr(self, name):
                raise ValueError(
                    f"the sampler's state was saved with {name} = {state.get(name)!r}, but this "
                    f"sampler has {getattr(self, name)!r}"
                )
        ids = own_ids(state["ids"])
        self._weights = [None if w is None else own_weights(w) for w in state["weights"]]
        self._sizes, self._quotas = list(state["sizes"]), list(state["quotas"])
        ends = np.cumsum(self._sizes)[:-1]
        self._ids = [ids] if isinstance(ids, int) else list(np.split(ids, ends))
        self._total = sum(self._quotas)
        self.round_index, self.epoch = state["round"], state["epoch"]
        self._restart(state["step"])
        self._kept, self._revision = list(state["kept"]), state["revision"]
        self._drawn = as_ids(own_ids(state["drawn"]))


# What a sampler draws from: groups of ids, each with weights or none, and draws of its own.


ArrayLike = npt.ArrayLike | torch.Tensor


@dataclass(frozen=True, slots=True)
class Group:
    """A part of what is drawn in an epoch: exactly ``draws`` of ``ids``, by ``weights``.

    ids: int64 [N], or an int N for 0 … N-1; weights: [N], or None for uniform permutations.
    """

    ids: ArrayLike | int
    weights: ArrayLike | None
    draws: int


def own_ids(values: ArrayLike | int) -> Ids | int:
    """Return ids that nobody else changes: a copy, but of a read-only array."""
    if isinstance(values, int | np.integer):
        return int(values)
    array = values.detach().cpu().numpy() if isinstance(values, torch.Tensor) else values
    array = np.asarray(array)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise ValueError(f"ids must be one row of integers, not {array.dtype} {array.shape}")
    return array.astype(np.int64, copy=array.flags.writeable)


def size_of(ids: Ids | int) -> int:
    """Return how many ids these are."""
    return ids if isinstance(ids, int) else len(ids)


def as_ids(ids: Ids | int) -> Ids:
    """Return ids, or 0 … N-1 for an int N, as int64 [N]."""
    return np.arange(ids, dtype=np.int64) if isinstance(ids, int) else ids


def own_weights(values: ArrayLike) -> weighting.Weights:
    """Return weights that nobody else changes: a copy, but of a read-only array."""
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu().double().numpy()
    array = np.asarray(values)
    return array.astype(np.float64, copy=array.flags.writeable)


# Global batches drawn a window of steps at a time, so that new weights may come on the way.


@dataclass(frozen=True, slots=True)
class Part(Group):
    """A group whose ids int64 [N] and weights float64 [N] (None: permutations) are arrays.

    They are all there are, or this rank's, which ``over`` sums.
    """

    ids: Ids
    weights: weighting.Weights | None
    over: weighting.Sums = weighting.WHOLE


class WindowPlan:
    """This rank's part of each global batch of a round, for :class:`BatchLoader`. All is local.

    Window j is the steps from j·R on, R of them. It is drawn when its first step is asked for, by
    the groups in force for it; all ranks draw the same, a pure function of (seed, stream, round,
    window, draw, groups). So new weights cost the draws of R steps, however large an epoch is.

    Every batch holds the same number of samples of each group, in proportion to the groups' draws
    (at least one), mixed evenly. Groups without weights go through one permutation after another.

    Args:
        batch_size: samples of a global batch.
        window: R, in steps.
        rank: this process, below ``world_size``.
        world_size: number of processes.
        seed: from 0 to 2**64 - 1.
        draw: ``multinomial`` or ``systematic``, the latter over each window by itself.
        stream: keeps apart plans that share a seed.
    """

    def __init__(
        self,
        batch_size: int,
        window: int,
        rank: int,
        world_size: int,
        seed: int,
        draw: str,
        stream: int,
    ) -> None:
        self.batch_size = batch_size
        self.window = window
        self._rank, self._world = rank, world_size
        self._seed, self._stream = seed, stream
        self._draw = DRAWS[draw]

    def begin(self, round_index: int, groups: Sequence[Part], steps: int) -> None:
        """Plan a round of ``steps`` steps; nothing is copied."""
        self._round, self._steps, self.first_step = round_index, steps, 0
        self._schedule: list[tuple[int, list[Part]]] = [(0, list(groups))]  # from a window on
        self._next = 0  # the first window not drawn
        self._drawn: dict[int, tuple[Ids, list[Part]]] = {}
        self._sizes = apportion(self.batch_size, [g.draws for g in groups])
        evenly = [(np.arange(size) + 0.5) / size for size in self._sizes]
        self._order = np.argsort(np.concatenate(evenly), kind="stable")
        self._uniform = [Permutations(self._seed, self._stream) for _ in groups]

    def set_groups(self, groups: Sequence[Part], *, from_step: int) -> None:
        """Draw by these groups from a window on that is not drawn yet; they are as many as before.

        Raises UsageError if ``from_step`` is not the first step of a window, or was handed out, to
        a DataLoader that reads ahead for one.
        """
        first, rest = divmod(from_step, self.window)
        if rest or first < self._next or len(groups) != len(self._sizes):
            raise UsageError(
                f"{len(groups)} groups from step {from_step} on: the plan has {len(self._sizes)}, "
                f"and windows of {self.window} steps, drawn up to step {self._next * self.window}"
            )
        self._schedule.append((first, list(groups)))

    def groups(self, step: int) -> list[Part]:
        """Return what a step's batch was drawn from; steps as for :meth:`global_batch`."""
        return self._of_window(step // self.window)[1]

    def __len__(self) -> int:
        return self._steps

    def __iter__(self) -> Iterator[list[int]]:
        """Yield this rank's part of each batch, a list of ids, from ``first_step`` on."""
        for step in range(self.first_step, self._steps):
            ids = self.global_batch(step)
            lo, hi = part_of(len(ids), self._rank, self._world)
            yield ids[lo:hi].tolist()

    def total(self, step: int) -> int:
        """Return the size of a global batch; steps as for :meth:`global_batch`."""
        return len(self.global_batch(step))

    def view(self, step: int) -> tuple[int, ...]:
        """Return (seed, round, epoch) of a step; an epoch has as many draws as the groups say."""
        epoch = step * self.batch_size // sum(group.draws for group in self._schedule[0][1])
        return self._seed, self._round, epoch

    def global_batch(self, step: int) -> Ids:
        """Return the ids of all ranks' parts of a batch, int64 [B].

        Steps come in order; one may go back as far as the window before the newest.
        """
        index, row = divmod(step, self.window)
        ids: Ids = self._of_window(index)[0][row]
        return ids

    def _of_window(self, index: int) -> tuple[Ids, list[Part]]:
        while self._next <= index:
            self._drawn[self._next] = self._draw_window(self._next)
            self._drawn.pop(self._next - 2, None)
            self._next += 1
        return self._drawn[index]

    def _draw_window(self, index: int) -> tuple[Ids, list[Part]]:
        """Return ids int64 [steps, B], and the groups that they are drawn from."""
        while len(self._schedule) > 1 and self._schedule[1][0] <= index:
            del self._schedule[0]
        groups = self._schedule[0][1]
        first = index * self.window
        steps = min(self.window, self._steps - first)
        columns = []
        for g, (group, size) in enumerate(zip(groups, self._sizes, strict=True)):
            if group.weights is None:
                at = self._uniform[g].take(
                    self._round, len(group.ids), first * size, steps * size, kind=2 * g + 1
                )
            else:
                rng = draws.generator(self._seed, self._stream, self._round, index, 2 * g)
                at = self._draw(group.weights, steps * size, rng)
            columns.append(group.ids[at].reshape(steps, size))
        return np.concatenate(columns, axis=1)[:, self._order], groups

    def state_dict(self, consumed: int) -> dict[str, Any]:
        """Return what a resume after ``consumed`` steps needs: ints and tensors."""
        index = consumed // self.window
        now = [(index, self._drawn[index][1])] if index in self._drawn else []
        ahead = [(first, groups) for first, groups in self._schedule if first > index or not now]
        return {
            "round": self._round,
            "steps": self._steps,
            "consumed": consumed,
            "schedule": [
                {"window": first, "groups": [_packed(group) for group in groups]}
                for first, groups in now + ahead
            ],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where ``state_dict`` was called, at any world size."""
        schedule = [(e["window"], [_unpacked(g) for g in e["groups"]]) for e in state["schedule"]]
        self.begin(state["round"], schedule[0][1], state["steps"])
        self._schedule = schedule
        self.first_step = state["consumed"]
        self._next = self.first_step // self.window


class Permutations:
    """Permutations of N positions, one after another without end, read at any place.

    The k-th is a function of (seed, k and the counters), so any rank and a resumed run read the
    same. Holds one, 4 N bytes (8 N from 2**32 positions on).
    """

    def __init__(self, seed: int, stream: int) -> None:
        self._seed = seed
        self._stream = stream
        self._held: tuple[tuple[int, ...], weighting.Positions] | None = None

    def take(
        self, round_index: int, number: int, first: int, n: int, kind: int = 0
    ) -> weighting.Positions:
        """Return draws ``first`` to ``first`` + n of ``number`` positions, [n]."""
        found = []
        while n:
            index, at = divmod(first, number)
            key = (self._stream, round_index, index, kind)
            if self._held is None or self._held[0] != (number, *key):
                drawn = draws.uniform(number, number, draws.generator(self._seed, *key))
                self._held = (number, *key), drawn
            found.append(self._held[1][at : at + n])
            first, n = first + len(found[-1]), n - len(found[-1])
        return np.concatenate(found)


def _packed(group: Part) -> dict[str, Any]:
    weights = as_tensor(group.weights)
    return {"ids": as_tensor(group.ids), "weights": weights, "draws": group.draws}


def _unpacked(packed: dict[str, Any]) -> Part:
    weights = None if packed["weights"] is None else packed["weights"].numpy()
    return Part(packed["ids"].numpy(), weights, packed["draws"])
