"""Scores that training gives away: what the forward of each batch says, kept by id (``online``)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils._pytree import tree_map

from distcl.data.loader import iterate_chunks
from distcl.errors import ConfigError
from distcl.priority.scoring import Weights, checked, require_finite
from distcl.runtime import Runtime
from distcl.types import Batch, Ids, Outputs, PrioritySignal, PyTree, Source, unpack_ids

_CHUNK = 1024
_UNKNOWN = -1


class SignalTable:
    """Scores by id, approximate: the last that each sample got. The same on every rank. Local.

    A sample never seen counts as the mean of its (experience, class), of those seen; where none
    is, or the class is unknown, as the mean of all. Of M ids held it keeps 24 M bytes.
    """

    def __init__(self, classes: int = 0) -> None:
        self._classes = classes
        self.ids: Ids = np.empty(0, dtype=np.int64)  # sorted
        self._scores = np.empty(0)  # NaN: never seen
        self._labels: Ids = np.empty(0, dtype=np.int64)
        self._asked: Ids | None = None  # the ids of the last read, and where they are
        self._sort_into_cells()

    def keep(self, ids: Ids) -> None:
        """Hold exactly these ids [M]: new ones are not seen yet, those left out are forgotten."""
        old_ids, old_scores, old_labels = self.ids, self._scores, self._labels
        self.ids = np.unique(ids)
        self._scores = np.full(len(self.ids), np.nan)
        self._labels = np.full(len(self.ids), _UNKNOWN)
        at, known = _find(self.ids, old_ids)
        self._scores[at[known]] = old_scores[known]
        self._labels[at[known]] = old_labels[known]
        self._sort_into_cells()

    def write(self, ids: Ids, scores: Weights, labels: Ids) -> None:
        """Take scores [N] in the order of draws: the last of an id counts; ids not held do not.

        ``labels`` [N]: classes, or -1 where unknown.
        """
        at, held = _find(self.ids, ids)
        last, first = np.unique(at[held][::-1], return_index=True)
        scores, labels = scores[held][::-1][first], labels[held][::-1][first]
        old = self._scores[last]
        fresh = np.isnan(old)
        self._labels[last] = np.where(fresh, self._valid(labels), self._labels[last])
        cells = self._cells(last)
        gain = scores - np.where(fresh, 0.0, old)
        self._sums += np.bincount(cells, gain, minlength=len(self._sums))
        self._counts += np.bincount(cells[fresh], minlength=len(self._counts))
        self._scores[last] = scores

    def label(self, ids: Ids, labels: Ids) -> None:
        """Tell the classes [N] of ids that were never seen; -1 where unknown."""
        self._labels[_find(self.ids, ids)[0]] = self._valid(labels)

    def unseen(self, ids: Ids) -> Ids:
        """Return those of ``ids``, all held, that were never seen and whose class is unknown."""
        at, _ = _find(self.ids, ids)
        unseen: Ids = ids[np.isnan(self._scores[at]) & (self._labels[at] == _UNKNOWN)]
        return unseen

    def read(self, ids: Ids) -> Weights:
        """Return scores float64 [N] of ids, all of which are held."""
        if ids is not self._asked:  # a round asks for the same again and again
            self._asked, self._asked_at = ids, _find(self.ids, ids)[0]
        at = self._asked_at
        scores = self._scores[at]
        missing = np.isnan(scores)
        if missing.any():
            scores[missing] = self._means(at[missing])
        return scores

    def _means(self, at: Ids) -> Weights:
        seen = self._counts.sum()
        overall = self._sums.sum() / seen if seen else 1.0
        cells = self._cells(at)
        counts = np.where(self._labels[at] == _UNKNOWN, 0, self._counts[cells])
        means: Weights = np.where(counts > 0, self._sums[cells] / np.maximum(counts, 1), overall)
        return means

    def _valid(self, labels: Ids) -> Ids:
        valid: Ids = np.where(labels < self._classes, labels, _UNKNOWN)
        return valid

    def _cells(self, at: Ids) -> Ids:
        cells: Ids = self._first_cell[at] + self._labels[at]
        return cells

    def _sort_into_cells(self) -> None:
        """Give every (experience, class) a cell, unknown classes one too; sum what is seen."""
        experiences, rank = np.unique(unpack_ids(self.ids)[0], return_inverse=True)
        self._first_cell = rank * (self._classes + 1) + 1
        seen = np.flatnonzero(~np.isnan(self._scores))
        number = len(experiences) * (self._classes + 1)
        sums = np.bincount(self._cells(seen), self._scores[seen], minlength=number)
        self._sums = sums.astype(np.float64)  # of nothing they are integers
        self._counts = np.bincount(self._cells(seen), minlength=number)
        self._asked = None

    def state_dict(self) -> dict[str, Any]:
        """Return ids int64 [M], scores float64 [M] (NaN: never seen) and labels int64 [M]."""
        return {
            "ids": torch.from_numpy(self.ids),
            "scores": torch.from_numpy(self._scores),
            "labels": torch.from_numpy(self._labels),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        self.ids = state["ids"].numpy().copy()
        self._scores = state["scores"].numpy().copy()
        self._labels = state["labels"].numpy().copy()
        self._sort_into_cells()


def _find(held: Ids, ids: Ids) -> tuple[Ids, npt.NDArray[np.bool_]]:
    """Return (position in the sorted ``held``, whether it is there) of each id, [N] each."""
    at = np.searchsorted(held, ids)
    at = np.minimum(at, max(len(held) - 1, 0))
    known = held[at] == ids if len(held) else np.zeros(len(ids), dtype=np.bool_)
    return at, known


@dataclass(frozen=True, slots=True)
class _Seen:
    """What one training forward told of this rank's part of a batch, on the device."""

    ids: torch.Tensor
    scores: torch.Tensor
    losses: torch.Tensor
    labels: torch.Tensor
    total: int


class Ledger:
    """Takes the scores of every training batch and, now and then, shares them among ranks.

    The updater calls :meth:`observe` in every training forward (``Updater.losses_of`` does it);
    the feed calls :meth:`gather` every few steps. So ``table`` is the same on every rank whenever
    weights are made from it.
    """

    def __init__(self, runtime: Runtime, signal: PrioritySignal, classes: int) -> None:
        self.table = SignalTable(classes)
        self._runtime = runtime
        self._signal = signal
        self._classes = classes
        self._window: list[_Seen] = []
        self._round = -1

    def observe(self, batch: Batch, outputs: PyTree, losses: torch.Tensor) -> None:
        """Score this rank's part of a training batch [B] by its outputs and losses. Local."""
        losses = losses.detach()
        with torch.no_grad():
            if len(batch):
                now = Outputs(losses, tree_map(torch.Tensor.detach, outputs))
                scores = checked(self._signal, self._signal.score(batch, now, None), len(batch))
            else:
                scores = losses
        known = self._classes and _is_label(batch.y)
        labels = batch.y if known else torch.full_like(losses, _UNKNOWN)
        self._window.append(_Seen(batch.ids, scores, losses, labels, batch.total))

    def gather(self) -> None:
        """Put what was observed since the last time into the table. Collective.

        Samples are written in the order in which they were drawn. One whose loss is not finite is
        left to the loss watch. Raises ConfigError naming signal and sample id for a bad score.
        """
        window, self._window = self._window, []
        if not window:
            raise ConfigError(
                "priority.source = 'online' has had no training forward to take scores from; "
                "continual_learning.update_mode must compute its losses by Updater.losses or "
                "Updater.losses_of"
            )
        rows = self._gathered(window).cpu().numpy()
        ids, scores, labels = rows[:, 0], rows[:, 1].view(np.float64), rows[:, 2]
        bad = ~(np.isfinite(scores) & (scores >= 0))
        if bad.any():
            what = f"the score of signal '{type(self._signal).__name__}'"
            require_finite(torch.from_numpy(scores), ids, what, ConfigError)
        self.table.write(ids, scores, labels)

    def _gathered(self, window: list[_Seen]) -> torch.Tensor:
        """Return (id, bits of the score, label), int64 [N, 3], of all ranks in order of draws."""
        run = self._runtime
        ids = torch.cat([seen.ids for seen in window]).to(run.device, non_blocking=True)
        losses = torch.cat([seen.losses for seen in window])
        scores = torch.cat([seen.scores for seen in window]).double()
        labels = torch.cat([seen.labels for seen in window]).long()
        ids = ids.where(losses.isfinite(), _UNKNOWN)
        mine = torch.stack([ids, scores.view(torch.int64), labels], dim=1)
        if run.world_size > 1:
            mine = self._of_all_ranks(mine, window)
        return mine[mine[:, 0] >= 0]

    def _of_all_ranks(self, mine: torch.Tensor, window: list[_Seen]) -> torch.Tensor:
        """Gather rows [n, 3] of this rank, batch by batch, and in each rank by rank.

        A rank's part of a batch has ceil(total / W) rows at most, one more if it is two in one.
        """
        run = self._runtime
        space = [-(-seen.total // run.world_size) + 1 for seen in window]
        starts = np.cumsum([0, *space])
        own = [
            start + np.arange(len(seen.ids))
            for start, seen in zip(starts[:-1], window, strict=True)
        ]
        each = int(starts[-1])
        padded = torch.full((each, 3), _UNKNOWN, dtype=torch.int64, device=run.device)
        padded[torch.from_numpy(np.concatenate(own)).to(run.device)] = mine
        every = run.all_gather(padded, each * run.world_size)
        of_batch = np.tile(np.repeat(np.arange(len(space)), space), run.world_size)
        order = np.argsort(of_batch, kind="stable")
        return every[torch.from_numpy(order).to(run.device)]

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
            if _is_label(batch.y):
                mine[k * _CHUNK : k * _CHUNK + len(batch)] = batch.y
        labels = self._runtime.all_gather(mine.to(self._runtime.device), len(unseen))
        self.table.label(unseen, labels.cpu().numpy())

    def state_dict(self) -> dict[str, Any]:
        """Return the table, and what this rank observed since the last :meth:`gather`."""
        window = [{f: getattr(seen, f) for f in _Seen.__slots__} for seen in self._window]
        return {"table": self.table.state_dict(), "round": self._round, "window": window}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned, on the same rank."""
        self.table.load_state_dict(state["table"])
        self._round = state["round"]
        self._window = [_Seen(**seen) for seen in state["window"]]


def _is_label(y: PyTree) -> bool:
    return isinstance(y, torch.Tensor) and y.ndim == 1 and not y.is_floating_point()
