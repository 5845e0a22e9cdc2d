"""Scores that training gives away: what the forward of each batch says, kept by id (``online``)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch.utils._pytree import tree_leaves, tree_map

from distcl.data.loader import iterate_chunks
from distcl.distributed.runtime import Runtime
from distcl.errors import ConfigError
from distcl.priority.scoring import score_of_each, unsound
from distcl.priority.signal_table import _UNKNOWN, SignalTable
from distcl.priority.weighting import Weights
from distcl.types import Batch, Ids, Outputs, PrioritySignal, PyTree, Source

_CHUNK = 1024
_MOST_WAITING = 1 << 22  # elements of outputs


@dataclass(frozen=True, slots=True)
class _Seen:
    """What training forwards told of this rank's parts of some batches, on the device."""

    ids: torch.Tensor
    scores: torch.Tensor
    losses: torch.Tensor
    labels: torch.Tensor


class Ledger:
    """Takes the scores of every training batch and, now and then, shares them among ranks.

    The updater calls :meth:`observe` in every training forward (``Updater.losses_of`` does it);
    RoundLoader calls :meth:`gather` every few steps. So ``table`` is the same on every rank when
    weights are made from it.
    """

    def __init__(self, runtime: Runtime, signal: PrioritySignal, classes: int) -> None:
        self.table = SignalTable(classes)
        self._runtime = runtime
        self._signal = signal
        self._classes = classes
        self._can_wait = not getattr(signal, "needs_inputs", True)
        self._sizes: list[tuple[int, int]] = []  # of each batch: of this rank's part, of all parts
        self._waiting: list[tuple[PyTree, ...]] = []  # ids, x, y, outputs, losses: not scored yet
        self._elements = 0  # of the outputs that wait
        self._seen: list[_Seen] = []
        self._heard = False  # of any training forward
        self._round = -1

    def observe(self, batch: Batch, outputs: PyTree, losses: torch.Tensor) -> None:
        """Take outputs and losses [B] of this rank's part of a training batch. Local.

        A signal that needs no inputs scores several batches at once, which is cheaper, while they
        have the same shapes.
        """
        n = len(batch)
        self._sizes.append((n, batch.total))
        if not n:
            return
        one = isinstance(outputs, torch.Tensor)
        outputs = outputs.detach() if one else tree_map(torch.Tensor.detach, outputs)
        x = None if self._can_wait else batch.x
        new = (batch.ids, x, batch.y, outputs, losses.detach())
        if self._waiting and _shapes(self._waiting[-1]) != _shapes(new):
            self._score()
        self._waiting.append(new)
        self._elements += outputs.numel() if one else sum(z.numel() for z in tree_leaves(outputs))
        if not self._can_wait or self._elements > _MOST_WAITING:
            self._score()

    def _score(self) -> None:
        """Score what waits."""
        if not self._waiting:
            return
        columns = zip(*self._waiting, strict=True)
        ids, x, y, logits, loss = map(_cat, columns)
        self._waiting, self._elements = [], 0
        with torch.no_grad():
            scores = self._signal.score(Batch(ids, x, y, len(ids)), Outputs(loss, logits), None)
        labels = y if self._classes and _is_label(y) else torch.full_like(loss, _UNKNOWN)
        self._seen.append(_Seen(ids, score_of_each(self._signal, scores, len(ids)), loss, labels))

    @property
    def waits(self) -> bool:
        """Whether something was observed since the last :meth:`gather`; equal on all ranks."""
        return bool(self._sizes)

    def gather(self) -> None:
        """Put what was observed since the last time into the table. Collective.

        How often it is called makes no difference to the table. Samples are written in the order
        in which they were drawn. One whose loss is not finite is left to the loss watch. Raises
        DivergenceError or ConfigError naming signal and sample id for a bad score.
        """
        self._score()
        if not self._sizes and self._heard:
            return
        if not self._sizes:
            raise ConfigError(
                "priority.source = 'online' has had no training forward to take scores from; "
                "continual_learning.update_mode must compute its losses by Updater.losses or "
                "Updater.losses_of"
            )
        ids, scores, labels = self._gathered()
        self._sizes, self._seen, self._heard = [], [], True
        what = f"the score of signal '{type(self._signal).__name__}'"
        if (error := unsound(torch.from_numpy(scores), ids, what)) is not None:
            raise error
        self.table.write(ids, scores, labels)

    def _gathered(self) -> tuple[Ids, Weights, Ids]:
        """Return ids, scores and labels, [N] each, of all ranks' samples in the order of draws."""
        columns = [_cat(tuple(getattr(seen, f) for seen in self._seen)) for f in _Seen.__slots__]
        if self._runtime.world_size > 1:
            columns = self._of_all_ranks(columns)
        ids, scores, losses, labels = columns
        rows = (ids, scores.double(), losses.double(), labels.long())
        ids, scores, losses, labels = (row.cpu().numpy() for row in rows)
        good = np.isfinite(losses) & (ids >= 0)
        if not good.all():
            ids, scores, labels = ids[good], scores[good], labels[good]
        return ids, scores, labels

    def _of_all_ranks(self, columns: list[torch.Tensor]) -> list[torch.Tensor]:
        """Gather this rank's columns [n], batch by batch, and in each rank by rank.

        Rows that are not filled have the id -1.
        """
        run = self._runtime
        own, order = _layout(tuple(self._sizes), run.world_size)
        each = len(order) // run.world_size
        padded = torch.full((each, 4), _UNKNOWN, dtype=torch.int64, device=run.device)
        if columns[0] is not None:
            ids, scores, losses, labels = (column.to(run.device) for column in columns)
            bits = [value.double().view(torch.int64) for value in (scores, losses)]
            padded[own.to(run.device)] = torch.stack([ids, *bits, labels.long()], dim=1)
        every = run.all_gather(padded, len(order)).cpu()[order]
        ids, scores, losses, labels = every.T.contiguous()
        return [ids, scores.view(torch.float64), losses.view(torch.float64), labels]

    def expect(self, round_index: int, source: Source, current: Ids, history: Ids) -> None:
        """Get ready for a round over these ids, once per round. Collective.

        The labels of history that was never seen are read, each rank its share.
        """
        if round_index == self._round:
            return
        self._round = round_index
        self.table.keep(np.concatenate([history, current]))
        unseen = self.table.unseen(history)
        if not (self._classes and len(unseen)):
            return
        lo, hi = self._runtime.share(len(unseen))
        mine = torch.full((hi - lo,), _UNKNOWN, dtype=torch.int64)
        for k, batch in enumerate(iterate_chunks(source, unseen[lo:hi], _CHUNK)):
            if _is_label(batch.y):  # of those asked for, should others have been read for them
                asked = torch.from_numpy(unseen[lo:hi][k * _CHUNK :][: len(batch)])
                right = torch.where(batch.ids == asked, batch.y, _UNKNOWN)
                mine[k * _CHUNK : k * _CHUNK + len(batch)] = right
        labels = self._runtime.all_gather(mine.to(self._runtime.device), len(unseen))
        self.table.label(unseen, labels.cpu().numpy())

    def state_dict(self) -> dict[str, Any]:
        """Return the table, the same on every rank. Call it when nothing waits: :meth:`gather`."""
        return {"table": self.table.state_dict(), "round": self._round, "heard": self._heard}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned, at any world size."""
        self.table.load_state_dict(state["table"])
        self._round, self._heard = state["round"], state["heard"]


@lru_cache(maxsize=2)
def _layout(sizes: tuple[tuple[int, int], ...], world: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return where a rank's rows go among its own, and the order of all ranks' rows.

    ``sizes``: of each batch, this rank's part and all parts. A rank has room for ceil(total / W)
    rows of a batch, and one more: it may be two in one. Most windows have the same sizes.
    """
    room = [-(-total // world) + 1 for _, total in sizes]
    starts = np.cumsum([0, *room])
    own = np.concatenate([starts[k] + np.arange(n) for k, (n, _) in enumerate(sizes)])
    of_batch = np.tile(np.repeat(np.arange(len(room)), room), world)
    return torch.from_numpy(own), torch.from_numpy(np.argsort(of_batch, kind="stable"))


def _shapes(row: tuple[PyTree, ...]) -> list[torch.Size]:
    """Return the shapes of samples, of what belongs to a batch."""
    return [leaf.shape[1:] for leaf in tree_leaves(row) if leaf is not None]


def _cat(some: tuple[PyTree, ...]) -> PyTree:
    """Join pytrees of the same form along the batch; None stays None, nothing becomes None."""
    if not some:
        return None
    if isinstance(some[0], torch.Tensor):
        return some[0] if len(some) == 1 else torch.cat(some)
    return None if some[0] is None else tree_map(lambda *t: torch.cat(t), *some)


def _is_label(y: PyTree) -> bool:
    return isinstance(y, torch.Tensor) and y.ndim == 1 and not y.is_floating_point()
