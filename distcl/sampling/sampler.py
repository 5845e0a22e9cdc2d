"""A weighted sampler for any number of processes, whose weights may change at any time."""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from operator import attrgetter
from typing import Any, Self

import numpy as np
from torch.utils.data import Sampler

from distcl.data.ids import part_of
from distcl.errors import UsageError
from distcl.sampling.epoch_plan import DRAWS, Credit, DrawOptions, EpochPlan
from distcl.sampling.groups import ArrayLike, Group, Part, ids_at, own, packed, unpacked
from distcl.types import Ids, as_tensor

_DIGEST_BLOCK = 1 << 20


def _option(name: str) -> Any:
    """Return a property that is read from a sampler's options: it cannot be changed later."""
    return property(attrgetter(f"options.{name}"))


class RoundSampler(Sampler[list[int]]):
    """A sampler's place: its round, its epoch and the step at which the next iteration begins."""

    def __init__(self, round_index: int) -> None:
        self.round_index = round_index
        self.epoch = 0
        self._begin = 0

    @property
    def first_step(self) -> int:
        """The step at which the next iteration begins: 0, or where a loaded state goes on."""
        return self._begin

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

    @property
    def sampler(self) -> Self:
        """Itself: Accelerate, Lightning and Fabric look here for ``set_epoch``."""
        return self

    @abstractmethod
    def _restart(self, step: int = 0) -> None:
        """Let go of what is drawn: the next iteration begins at ``step``."""


class DistributedWeightedSampler(RoundSampler):
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

    As with torch's DistributedSampler, call ``set_epoch`` before each epoch. Nothing must shard it
    again: for ``accelerator.prepare`` there is :class:`GlobalView`; a loader of a sampler with
    several ranks raises UsageError there.

    Args:
        batch_size: samples of a global batch, over all ranks; at least ``world_size``.
        window: R, in steps, to change weights within an epoch; None: an epoch at once.
        num_samples: draws of an epoch; None: as many as the groups' draws, or ids.
        rank: this process, below ``world_size``.
        world_size: number of processes.
        seed: from 0 to 2**64 - 1.
        draw: ``multinomial``, ``systematic``, ``without_replacement`` or ``credit``, see draws.py;
            of credit, windows of an epoch go on with what is earned, so ids must stay the same.
        round_index: see ``set_round``.
        drop_last: leave out a smaller last batch.
        stream: keeps apart samplers that share a seed, such as current and history data.
    """

    global_batch_size = _option("global_batch_size")
    window, num_samples, seed = map(_option, ("window", "num_samples", "seed"))
    draw, drop_last, stream = map(_option, ("draw", "drop_last", "stream"))

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
        super().__init__(round_index)
        self.rank = rank
        self.world_size = world_size
        self.options = DrawOptions(batch_size, window, num_samples, seed, draw, drop_last, stream)
        self._handed_out = 0
        self._plan = EpochPlan(self.options, [], round_index, 0)

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
        draws = self.options.num_samples or number
        self.set_groups([Group(ids, weights, draws)], from_step=from_step)

    def set_groups(self, groups: Sequence[Group | Part], *, from_step: int = 0) -> None:
        """Replace what is drawn by several groups, each with its own number of draws an epoch.

        The groups' draws are shuffled together. ``from_step``, for a sampler with a ``window``:
        the first step of a window that is not drawn yet, to a DataLoader that reads ahead for one;
        batches before it stay as they are. The groups must then be as many as before.
        """
        if not groups:
            raise ValueError("there are no groups to draw from")
        held = [own(group) for group in groups]
        if from_step:
            self._plan.change(from_step, held)
        else:
            self._restart(0, [(0, held)])

    def _restart(
        self,
        step: int = 0,
        schedule: Sequence[tuple[int, list[Part]]] | None = None,
        credit: Credit | None = None,
    ) -> None:
        """Begin a new plan, of the newest groups unless a schedule is given."""
        if schedule is None:
            schedule = [(0, held) for _, held in self._plan.schedule[-1:]]
        self._begin = self._handed_out = step
        self._plan = EpochPlan(self.options, schedule, self.round_index, self.epoch, step, credit)

    # ------------------------------------------------------------ the plan

    def __len__(self) -> int:
        """Return the number of steps of an epoch, equal on all ranks."""
        return self._plan.steps

    def __iter__(self) -> Iterator[list[int]]:
        """Yield this rank's part of each batch; after ``load_state_dict``, of those not consumed.

        Raises UsageError when the plan is replaced before the iterator is through.
        """
        plan, first = self._plan, self._begin
        self._begin, self._handed_out = 0, first
        for step in range(first, plan.steps):
            if self._plan is not plan:
                raise UsageError(
                    "the sampler's plan was replaced while it was iterated over: begin a new "
                    "iteration, or give the sampler a window, and set_weights a from_step"
                )
            self._handed_out = step + 1
            begin, end = plan.span(step)
            lo, hi = part_of(end - begin, self.rank, self.world_size)
            yield ids_at(*plan.read(step, begin + lo, begin + hi)).tolist()

    @property
    def batch_size(self) -> int:
        """The global batch size, on one process. With several, what reads this shards again."""
        if self.world_size > 1:
            raise UsageError(
                "DistributedWeightedSampler already gives each rank its part of every batch: make "
                "it without rank and world_size and prepare a DataLoader with batch_sampler="
                "distcl.GlobalView(sampler, accelerator); or leave its DataLoader out of "
                "accelerator.prepare, and move batches with .to(accelerator.device). Lightning and "
                "Fabric need use_distributed_sampler=False"
            )
        size: int = self.global_batch_size
        return size

    def total(self, step: int) -> int:
        """Return the size of a global batch."""
        begin, end = self._plan.span(step)
        return end - begin

    def view(self, step: int) -> tuple[int, ...]:
        """Return (seed, round, epoch) of a step, by which random transforms draw.

        In windows, an epoch ends when as many are drawn as the groups say.
        """
        epoch = self.epoch
        if self.options.window:
            epoch = (epoch * len(self) + step) * self.global_batch_size // self._plan.passes
        return self.options.seed, self.round_index, epoch

    def global_batch(self, step: int) -> Ids:
        """Return the ids of all ranks' parts of a batch, int64 [b], in order of rank.

        In windows, steps come in order; one may go back as far as the window before the newest.
        """
        return ids_at(*self._plan.read(step, *self._plan.span(step)))

    def parts(self, step: int) -> list[tuple[int, Ids]]:
        """Return a global batch as (0, its ids), see LaneSampler."""
        return [(0, self.global_batch(step))]

    def groups(self, step: int) -> list[Part]:
        """Return what a step's batch was drawn from; steps as for :meth:`global_batch`."""
        return self._plan.window(step)[1]

    def plan_digest(self, steps: int | None = None) -> str:
        """Return the SHA-256, in hex, of the ids of the first ``steps`` global batches (or all).

        As little-endian int64; equal on every rank. In windows, by the weights known now; of
        ``credit``, not once a window is gone (UsageError).
        """
        digest, window = hashlib.sha256(), self.options.window
        steps = len(self) if steps is None else steps
        end = self._plan.span(steps - 1)[1] if steps else 0
        size = window * self.global_batch_size if window else max(end, 1)
        for index, (positions, groups) in enumerate(self._plan.known(-(-end // size))):
            positions = positions[: end - index * size]
            for begin in range(0, len(positions), _DIGEST_BLOCK):
                ids = ids_at(positions[begin : begin + _DIGEST_BLOCK], groups)
                digest.update(ids.astype("<i8", copy=False).tobytes())
        return digest.hexdigest()

    def state_dict(self, consumed: int | None = None) -> dict[str, Any]:
        """Return all that a resume needs: ints, strings and tensors (ids and weights included).

        ``consumed``: the steps trained on so far. None takes the steps handed out, which a
        DataLoader with workers lets run ahead. The same at every rank and world size.
        """
        step = self._handed_out if consumed is None else consumed
        if not 0 <= step <= len(self):
            raise ValueError(f"consumed must be from 0 to {len(self)} steps, not {step}")
        earned = {g: as_tensor(held.copy()) for g, held in self._plan.credit_at(step).items()}
        return {
            **asdict(self.options),
            **({"credit": earned} if earned else {}),
            "round": self.round_index,
            "epoch": self.epoch,
            "step": step,
            "schedule": [
                {"window": first, "groups": [packed(group) for group in groups]}
                for first, groups in self._plan.schedule_at(step)
            ],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where ``state_dict`` was called, at any world size.

        Raises ValueError if this sampler would draw other batches: constructed with another
        batch size, window, seed, stream, draw, num_samples or drop_last.
        """
        for name, value in asdict(self.options).items():
            if name not in state or state[name] != value:
                raise ValueError(
                    f"the sampler's state was saved with {name} = {state.get(name)!r}, but this "
                    f"sampler has {value!r}"
                )
        self.round_index, self.epoch = state["round"], state["epoch"]
        schedule = [
            (entry["window"], [unpacked(group) for group in entry["groups"]])
            for entry in state["schedule"]
        ]
        credit = {g: held.numpy() for g, held in state.get("credit", {}).items()}
        self._restart(state["step"], schedule, credit)
