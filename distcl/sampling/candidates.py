"""Choosing a batch among freshly scored candidates (``priority.source = "candidates"``)."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch.utils._pytree import tree_map_only

from distcl.data.ids import part_of
from distcl.data.transforms import training_view
from distcl.priority.round_weights import Shape
from distcl.priority.scoring import Scorer
from distcl.priority.weighting import Weights, WeightVector
from distcl.sampling.draw_log import BINS, Drawn, binned
from distcl.sampling.draws import generator, without_replacement
from distcl.types import Batch, Ids, Source


class Chooser:
    """Keeps one in ``of`` candidates of each batch, by weight without replacement.

    Each rank scores its part of the candidates, the scores are gathered, and every rank makes the
    same choice, a pure function of (seed, stream, round, step, scores). What is kept is dealt out
    evenly: a rank trains on those that it has scored, as far as its part reaches; only what is left
    over is read again, by a rank with room.

    ``histogram`` counts the weights of all candidates, in means of their batch, between ``EDGES``.
    ``forwards`` counts samples passed through the model, over all ranks together; ``seconds`` is
    the time that choosing took.
    """

    def __init__(
        self, scorer: Scorer, source: Source, shape: Shape, of: int, seed: int, stream: int
    ) -> None:
        self._scorer = scorer
        self._source = source
        self._shape = shape
        self._of = of
        self._seed = seed
        self._stream = stream
        self.forwards = 0
        self.seconds = 0.0
        self._number = 0
        self._low, self._high, self._sums = np.inf, 0.0, np.zeros(3)
        self.histogram = np.zeros(BINS, dtype=np.int64)

    def choose(
        self,
        round_index: int,
        batches: Iterable[tuple[Batch, Drawn]],
        first_step: int = 0,
        view: Callable[[int], tuple[int, ...] | None] = lambda step: None,
    ) -> Iterator[tuple[Batch, Drawn]]:
        """Yield (this rank's part, all ids) of what is kept of each (part, all ids). Collective.

        Ids are those of all ranks, so none are drawn in lanes. ``view(step)``: by what random
        transforms drew; what is read again must look the same.
        """
        for step, (batch, [(_, ids)]) in enumerate(batches, start=first_step):
            clock, forwards = time.perf_counter(), self._scorer.forward.forwards
            scores = self._scorer.score_batch(batch, ids).cpu().numpy().astype(np.float64)
            weights = self._shape.weights(WeightVector(ids, scores))
            rng = generator(self._seed, self._stream, round_index, step)
            kept = without_replacement(weights.held, len(ids) // self._of, rng)
            self._note(self._shape.priorities(scores), weights)
            with training_view(view(step)):
                part = self._dealt(batch, ids, kept)
            self.seconds += time.perf_counter() - clock
            self.forwards += self._scorer.forward.forwards - forwards
            yield part, [(0, ids[kept])]

    def _dealt(self, batch: Batch, ids: Ids, kept: Ids) -> Batch:
        """Return this rank's part of the candidates at the positions ``kept`` of ``ids``."""
        run = self._scorer.forward.runtime
        starts = [part_of(len(ids), rank, run.world_size)[0] for rank in range(run.world_size)]
        owner = np.searchsorted(starts, kept, side="right") - 1
        mine = deal_kept(owner, run.world_size) == run.rank
        own = torch.from_numpy(kept[mine & (owner == run.rank)] - starts[run.rank])
        x, y = tree_map_only(
            torch.Tensor, lambda t: t[own.to(t.device, non_blocking=True)], (batch.x, batch.y)
        )
        part = Batch(batch.ids[own], x, y, len(kept))
        others = ids[kept[mine & (owner != run.rank)]]
        if not len(others):
            return part
        read = self._source.read(others).to(run.device, run.dtype)
        both = part.joined(read)
        return Batch(both.ids, both.x, both.y, len(kept))

    def _note(self, priorities: Weights, weights: WeightVector) -> None:
        n = weights.number
        self._number += n
        self._low, self._high = min(self._low, priorities.min()), max(self._high, priorities.max())
        self.histogram += binned(weights.held, n / weights.sum())
        self._sums += [priorities.sum(), np.square(priorities).sum(), n * weights.ess()]

    def statistics(self) -> dict[str, float]:
        """Return n, min, mean, max, std of all priorities, and the mean ESS of a step's weights."""
        mean, square, ess = self._sums / self._number
        return {
            "n": self._number,
            "min": float(self._low),
            "mean": float(mean),
            "max": float(self._high),
            "std": float(max(square - mean**2, 0.0) ** 0.5),
            "ess_fraction": float(ess),
        }

    def state_dict(self) -> dict[str, Any]:
        """Return what has been counted so far."""
        return {
            "forwards": self.forwards,
            "seconds": self.seconds,
            "number": self._number,
            "range": [float(self._low), float(self._high)],
            "sums": self._sums.tolist(),
            "histogram": self.histogram.tolist(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        self.forwards, self.seconds = state["forwards"], state["seconds"]
        self._number = state["number"]
        self._low, self._high = state["range"]
        self._sums = np.array(state["sums"])
        self.histogram = np.array(state["histogram"])


def deal_kept(owner: Ids, world_size: int) -> Ids:
    """Return the rank, int64 [n], that takes each of n samples, of which ``owner`` [n] has each.

    Ranks take as many as :func:`part_of` says; owners keep theirs, in order, up to that.
    """
    quota = np.diff(
        [part_of(len(owner), rank, world_size)[0] for rank in range(world_size)] + [len(owner)]
    )
    order = np.argsort(owner, kind="stable")
    has = np.bincount(owner, minlength=world_size)
    turn = np.empty(len(owner), dtype=np.int64)  # how many of its owner's come before it
    turn[order] = np.arange(len(owner)) - np.repeat(np.cumsum(has) - has, has)
    spare = turn >= quota[owner]
    taker = owner.astype(np.int64)
    taker[spare] = np.repeat(np.arange(world_size), np.maximum(quota - has, 0))
    return taker
