"""Weighted draws from data that are read from front to back, the same at every world size."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from distcl.errors import UsageError
from distcl.priority import draws
from distcl.priority.sampler import Group
from distcl.types import Ids, unpack_ids

_BITS = 22  # of the number of an experience

LanesOf = Callable[[Ids, int], Ids]


class LaneSampler:
    """Yields this rank's part, a list of ids, of each global batch of a sequential source.

    The source's shards are cut into lanes, each read in order; a lane belongs to one rank. A sample
    is drawn a *number of times* (:func:`distcl.priority.draws.systematic_counts`; once each where
    there are no weights), so a pass over the data is one pass over the shards, and what has count 0
    is passed over undecoded. Draws are shuffled within windows of ``window`` neighbouring samples
    in a lane, for each experience by itself, and the windows begin elsewhere in every epoch; then
    lanes and experiences are merged evenly, each in proportion to its number of draws.

    So the global batches are a pure function of (seed, stream, round, epoch, ids, weights), at any
    world size; a rank's part may be large, small or empty, and every rank has every step. Weights
    must be equal on all ranks. Local.

    ``lanes``: how many; ``lanes_of(ids, lanes)`` [N] says which each sample is in.
    """

    def __init__(
        self,
        batch_size: int,
        lanes: int,
        lanes_of: LanesOf,
        *,
        window: int,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        round_index: int = 0,
        stream: int = 0,
    ) -> None:
        self.batch_size = batch_size
        self.round_index = round_index
        self.epoch = 0
        self._lanes = lanes
        self._lanes_of = lanes_of
        self._window = window
        self._rank = rank
        self._world_size = world_size
        self._seed = seed
        self._stream = stream
        self._groups: list[tuple[Ids, draws.Weights | None, int]] = []
        self._total = 0
        self._restart()

    def _restart(self, step: int = 0) -> None:
        self._begin = self._handed_out = step
        self._plan: tuple[Ids, Ids] | None = None

    def set_groups(self, groups: Sequence[Group]) -> None:
        """Replace what is drawn, as :meth:`DistributedWeightedSampler.set_groups` does."""
        self._groups = []
        for group in groups:
            ids = np.array(group.ids, dtype=np.int64)
            if len(ids) == 0:
                raise ValueError("there are no ids to draw from")
            weights = group.weights
            if weights is not None:
                weights = draws.check_weights(np.array(weights, dtype=np.float64), ids)
            self._groups.append((ids, weights, group.draws))
        self._total = sum(number for _, _, number in self._groups)
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
            self._handed_out = step + 1
            ids, lanes = self._batch(step)
            mine = lanes * self._world_size // self._lanes == self._rank
            yield ids[mine].tolist()

    def global_batch(self, step: int) -> Ids:
        """Return the ids of all ranks' parts of a batch, int64 [b]."""
        return self._batch(step)[0].copy()

    def _batch(self, step: int) -> tuple[Ids, Ids]:
        if self._plan is None:
            self._plan = self._draw()
        part = slice(step * self.batch_size, (step + 1) * self.batch_size)
        return self._plan[0][part], self._plan[1][part]

    def _draw(self) -> tuple[Ids, Ids]:
        """Return (id, lane) of every draw of the epoch, in order, int64 [T] each."""
        rng = draws.generator(self._seed, self._stream, self.round_index, self.epoch)
        ids = np.concatenate([group[0] for group in self._groups])
        counts = np.concatenate([_counts(*group[1:], len(group[0]), rng) for group in self._groups])
        lanes = self._lanes_of(ids, self._lanes)
        # a run: one experience's samples in one lane, which one cursor reads
        experience, row, _ = unpack_ids(ids)
        _, run = np.unique(lanes << _BITS | experience, return_inverse=True)
        order = np.lexsort((ids, run))  # as the shards are read
        ids, counts, lanes, run = ids[order], counts[order], lanes[order], run[order]
        window = (row[order] + int(rng.integers(self._window))) // self._window
        drawn = np.repeat(np.arange(len(ids)), counts)
        drawn = drawn[np.lexsort((rng.random(len(drawn)), window[drawn], run[drawn]))]
        lanes, run = lanes[drawn], run[drawn]
        # draw j of the C of a run is due at (j + 1/2) / C of the epoch
        sizes = np.bincount(run)
        due = (np.arange(len(drawn)) - (np.cumsum(sizes) - sizes)[run] + 0.5) / sizes[run]
        merged = np.argsort(due, kind="stable")
        return ids[drawn[merged]], lanes[merged]

    def state_dict(self, consumed: int | None = None) -> dict[str, Any]:
        """Return all that a resume needs: ints and tensors (ids and weights included).

        ``consumed``: the steps trained on so far; None: those handed out.
        """
        step = self._handed_out if consumed is None else consumed
        groups = [
            (torch.from_numpy(ids), None if w is None else torch.from_numpy(w), number)
            for ids, w, number in self._groups
        ]
        return {
            "round": self.round_index,
            "epoch": self.epoch,
            "step": step,
            "groups": groups,
            "identity": self._identity(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where ``state_dict`` was taken, at any world size.

        Raises ValueError if seed, batch size, lanes or window differ.
        """
        if state["identity"] != self._identity():
            raise ValueError(
                f"the saved draws are of (seed, stream, batch size, lanes, window) "
                f"{state['identity']}, not {self._identity()}"
            )
        self._groups = [
            (ids.numpy(), None if w is None else w.numpy(), number)
            for ids, w, number in state["groups"]
        ]
        self._total = sum(number for _, _, number in self._groups)
        self.round_index, self.epoch = state["round"], state["epoch"]
        self._restart(state["step"])

    def _identity(self) -> list[int]:
        return [self._seed, self._stream, self.batch_size, self._lanes, self._window]


def _counts(
    weights: draws.Weights | None, n: int, number: int, rng: np.random.Generator
) -> draws.Positions:
    """Return how often each of ``number`` samples is drawn, of ``n`` draws."""
    u = rng.random()
    if weights is not None:
        return draws.systematic_counts(weights, n, u)
    if n == number:
        return np.ones(number, dtype=np.int64)
    return draws.systematic_counts(np.ones(number), n, u)
