"""The scoring pass: every candidate once (or twice), each rank its own slice, all-gathered."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from distcl.data.ids import part_of
from distcl.data.loader import as_source
from distcl.distributed.memory import give_back, large_arrays
from distcl.distributed.runtime import Runtime, raise_together
from distcl.errors import ConfigError, DistclError, DivergenceError
from distcl.parallel.anchor import Anchor
from distcl.parallel.inference import ShardedForward
from distcl.parallel.partition import create_partition
from distcl.priority.loss_cache import LossCache, weights_checksum
from distcl.priority.signals import create_signal
from distcl.priority.weighting import Slices, Weights
from distcl.types import Batch, Ids, Outputs, PrioritySignal, Source, UnreducedLoss


class Scorer:
    """Scores samples by a signal under the weights as they are and, if needed, theta_star."""

    def __init__(
        self,
        forward: ShardedForward,
        anchor: Anchor,
        signal: PrioritySignal,
        batch_size: int,
        min_score: float = 1e-8,
    ) -> None:
        self.forward = forward
        self.anchor = anchor
        self.signal = signal
        self.batch_size = batch_size
        self.min_score = min_score
        self.cache = LossCache()
        self._name = type(signal).__name__

    def score(self, source: Source, ids: Ids) -> torch.Tensor:
        """Return the scores [N] of ``ids``, on every rank, in the model's dtype. Collective.

        Samples whose loss under theta_star is in the cache cost one forward, others two.
        Raises DivergenceError naming the first id whose score is not finite, ConfigError on a
        score of the wrong shape.
        """
        run, size, n = self.forward.runtime, self.batch_size, len(ids)
        if n == 0:
            return torch.empty(0, dtype=run.dtype)
        mine = self.forward.mine(ids, size)
        pieces = [mine[start : start + size] for start in range(0, len(mine), size)]
        rows = [*self._rows(source, ids, mine, pieces)]
        self.forward.forwards += n
        chunks = -(-n // size)
        share = -(-chunks // run.world_size) * size  # samples a rank

        def columns() -> Iterator[torch.Tensor]:  # one by one: they are of all samples
            while rows:
                with large_arrays():
                    gathered = self.forward.gather(rows.pop(), n, size)
                yield gathered

        return self._scores(columns(), ids, lambda row: row // share, keep=True)

    def priorities(self, source: Source, ids: Ids, alpha: float) -> Weights:
        """Return max(score, min_score) ** alpha of ``ids``, float64 [N]. Collective."""
        scores = self.score(source, ids).detach().cpu().numpy().astype(np.float64)
        return np.power(np.maximum(scores, self.min_score), alpha)

    def score_slices(self, source: Source, ids: Ids, slices: Slices) -> torch.Tensor:
        """Return the scores [n] of this rank's part of ``ids``, in the order of ``slices.ids``.

        Nothing is gathered, and the cache keeps this rank's losses only. Collective. Raises as
        :meth:`score`.
        """
        scores, losses = self._rows(source, ids, slices.ids, slices.pieces(self.batch_size))
        self.forward.forwards += slices.number
        rank = self.forward.runtime.rank
        columns = iter((losses, scores))
        return self._scores(columns, slices.ids, lambda _: rank, keep=True, sliced=True)

    def _rows(
        self, source: Source, ids: Ids, mine: Ids, pieces: list[Ids]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return scores and losses, [n] each, of my part of ``ids``, given whole and cut.

        Collective.
        """
        run = self.forward.runtime
        self.forward.partition.sync_buffers()
        anchors: list[Outputs] | None = None
        if self.signal.needs_anchor:
            anchors, losses = self._anchor_passes(source, ids, mine, pieces)
        with large_arrays():
            scores, end = torch.empty(len(mine), dtype=run.dtype, device=run.device), 0
            if anchors is None:
                losses = torch.empty_like(scores)
        with self.forward.inferring(source, ids, len(pieces)):
            for k, batch in enumerate(self._read(source, pieces)):
                begin, end = end, end + len(batch)
                scores[begin:end], now = self._row(batch, anchors[k] if anchors else None)
                losses[begin:end] = now  # theta_star's, until here
        del anchors
        give_back()  # of reading and computing so many batches
        return scores, losses

    def _read(self, source: Source, pieces: list[Ids]) -> Iterator[Batch]:
        for piece in pieces:
            yield from self.forward.chunks(source, piece, len(piece))

    def _scores(
        self,
        columns: Iterator[torch.Tensor],
        ids: Ids,
        rank_of: Callable[[int], int],
        keep: bool,
        sliced: bool = False,
    ) -> torch.Tensor:
        """Return the scores [N], second of ``columns``, once they and the losses are sound.

        ``rank_of``: which rank has computed that of a position; ``keep``: keep the losses, first
        of ``columns``, for the next round; ``sliced``: each rank has its own. Collective.
        """

        def check(values: torch.Tensor, what: str) -> None:
            error = unsound(values, ids, what, rank_of)
            if sliced:
                raise_together(self.forward.runtime, error)
            elif error is not None:
                raise error

        losses = next(columns)
        check(losses, "the loss")
        if keep and self.signal.needs_anchor and not self.signal.needs_logits:
            partition = self.forward.partition
            owned = partition.owned()
            self.cache.put(weights_checksum(owned, partition, self.forward.runtime), ids, losses)
        del losses
        scores = next(columns)
        check(scores, f"the score of signal '{self._name}'")
        return scores

    def score_batch(self, batch: Batch, ids: Ids) -> torch.Tensor:
        """Return the scores of a global batch, in the order of its ``ids`` [N]. Collective.

        ``batch`` is this rank's part, on the device. One forward, and one under each anchor if the
        signal needs them. Raises as :meth:`score`.
        """
        run, n, anchor = self.forward.runtime, len(batch), None
        if not n:  # join the collectives of a forward, if it has any
            x, y = tree_map_only(
                torch.Tensor, lambda t: t.new_zeros((1, *t.shape[1:])), (batch.x, batch.y)
            )
            batch = Batch(torch.zeros(1, dtype=torch.int64), x, y)
        backs = range(1 + len(self.anchor.older)) if self.signal.needs_anchor else ()
        for back in backs:
            with self.anchor.swapped_in(back), self.forward.inference():
                outputs = self.forward.outputs(batch)
            anchor = replace(anchor, older=(*anchor.older, outputs)) if anchor else outputs
        with self.forward.inference():
            row = torch.stack(self._row(batch, anchor), dim=1)[:n]
        self.forward.forwards += len(ids) * (1 + len(backs))
        each = -(-len(ids) // run.world_size)
        every = run.all_gather(row, each * run.world_size, each)
        parts = [part_of(len(ids), rank, run.world_size) for rank in range(run.world_size)]
        rows = [rank * each + k for rank, (lo, hi) in enumerate(parts) for k in range(hi - lo)]
        ranks = np.repeat(np.arange(run.world_size), [hi - lo for lo, hi in parts])
        scores, losses = every[rows].unbind(1)
        return self._scores(iter((losses, scores)), ids, lambda row: int(ranks[row]), keep=False)

    def _row(self, batch: Batch, anchor: Outputs | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Return scores and losses, [B] each, of a chunk under the weights as they are."""
        now = self.forward.outputs(batch)
        score = score_of_each(self.signal, self.signal.score(batch, now, anchor), len(batch))
        return score.to(now.loss), now.loss

    def _anchor_passes(
        self, source: Source, ids: Ids, mine: Ids, pieces: list[Ids]
    ) -> tuple[list[Outputs], torch.Tensor]:
        """Return theta_star's outputs for each of my chunks, and [n], in which its losses lie.

        Those under older anchors are in the outputs. Collective.
        """
        run = self.forward.runtime
        weights = weights_checksum(self.anchor.theta_star, self.forward.partition, run)
        with large_arrays():
            known, losses = self.cache.get(weights, mine)
        if self.signal.needs_logits:  # those are not cached
            known = torch.zeros_like(known)
        sizes = [len(piece) for piece in pieces]
        hits = torch.split(known, sizes)
        losses = losses.to(run.device, run.dtype)
        found = [Outputs(loss=loss) for loss in torch.split(losses, sizes)]
        unknown = int(run.all_reduce((~known).sum().to(run.device)))
        calls = sum(not bool(hit.all()) for hit in hits)
        if unknown:
            with self.anchor.swapped_in(), self.forward.inferring(source, ids, calls):
                for k, (piece, hit) in enumerate(zip(pieces, hits, strict=True)):
                    missing = piece[~hit.numpy()]
                    for batch in self.forward.chunks(source, missing, len(piece)):
                        out = self.forward.outputs(batch)
                        found[k].loss[(~hit).to(run.device)] = out.loss
                        if self.signal.needs_logits:
                            found[k] = out
            self.forward.forwards += unknown
        for back in range(1, 1 + len(self.anchor.older)):
            with self.anchor.swapped_in(back), self.forward.inferring(source, ids, len(pieces)):
                for k, batch in enumerate(self._read(source, pieces)):
                    older = (*found[k].older, self.forward.outputs(batch))
                    found[k] = replace(found[k], older=older)
            self.forward.forwards += len(ids)
        return found, losses


def unsound(
    values: torch.Tensor, ids: Ids, what: str, rank_of: Callable[[int], int] | None = None
) -> DistclError | None:
    """Return an error naming the first of ``ids`` whose value [N] is no number from 0 up, or None.

    DivergenceError if one is NaN or infinite, else ConfigError. ``rank_of``: which rank has
    computed that of a position.
    """
    if not len(values) or 0 <= values.min() <= values.max() < torch.inf:  # NaN fails each
        return None
    bad = torch.nonzero(~torch.isfinite(values))[:, 0]
    error: type[DistclError] = DivergenceError
    if not len(bad):
        bad, error = torch.nonzero(values < 0)[:, 0], ConfigError
    if not len(bad):
        return None
    at = int(bad[0])
    more = f" (and of {len(bad) - 1} more)" if len(bad) > 1 else ""
    where = "" if rank_of is None else f", on rank {rank_of(at)}"
    return error(f"{what} of sample id {int(ids[at])}{more} is {float(values[at])}{where}")


def score_of_each(signal: PrioritySignal, score: Any, number: int) -> torch.Tensor:
    """Return what a signal returned, if it is one score a sample; else raise ConfigError."""
    if not isinstance(score, torch.Tensor) or score.shape != (number,):
        shape = tuple(score.shape) if isinstance(score, torch.Tensor) else type(score).__name__
        raise ConfigError(
            f"signal '{type(signal).__name__}' returned {shape}; "
            f"it must return one score per sample, shape ({number},)"
        )
    return score


def compute_sample_priorities(
    model: nn.Module,
    anchor: Anchor,
    source: Source | Any,
    criterion: UnreducedLoss,
    *,
    runtime: Runtime,
    ids: Ids | None = None,
    alpha: float = 1.0,
    signal: str = "loss_delta",
    options: dict[str, Any] | None = None,
    min_score: float = 1e-8,
    batch_size: int = 512,
) -> tuple[Ids, Weights]:
    """Return (ids int64 [N], priorities float64 [N]) of a dataset's samples. Collective.

    priority_i = max(L(w_now, x_i) - L(theta_star, x_i), min_score) ** alpha, or another signal,
    made with ``options``, in the place of the difference. What ``[priority]`` does to weights
    (cap, min_ess, floor) is :meth:`distcl.priority.weighting.WeightVector.shaped`.

    Every rank scores its own contiguous slice; all ranks get the whole result. ``source`` is a
    Source, or any map-style dataset of (x, y) pairs, whose ids are its positions. ``criterion``
    returns unreduced losses [B], for example ``CrossEntropyLoss(reduction="none")``. The model
    runs in eval mode and is left as it was. Call it before ``anchor.refresh()``.
    """
    source = as_source(source)
    ids = np.arange(len(source), dtype=np.int64) if ids is None else ids
    forward = ShardedForward(runtime, model, create_partition(runtime, model), criterion)
    made = create_signal(signal, options, criterion=criterion)
    scorer = Scorer(forward, anchor, made, batch_size, min_score)
    return ids, scorer.priorities(source, ids, alpha)
