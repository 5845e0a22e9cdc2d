"""What is known of each sample's signal."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from distcl.data.ids import IdIndex
from distcl.priority.weighting import Positions, Weights
from distcl.types import Ids, unpack_ids

_UNKNOWN = -1


class SignalTable:
    """Scores by id, approximate: the last that each sample got. The same on every rank. Local.

    A sample never seen counts as the mean of its (experience, class), of those seen; where none
    is, or the class is unknown, as the mean of all. Of M ids held it keeps 25 M bytes or less.
    """

    def __init__(self, classes: int = 0) -> None:
        self._classes = classes
        self.ids: Ids = np.empty(0, dtype=np.int64)  # sorted
        self._index = IdIndex(self.ids)
        self._scores = np.empty(0)  # NaN: never seen
        self._labels: Ids = np.empty(0, dtype=np.int64)
        self._found: list[tuple[Ids, Ids]] = []  # what was read, and where it is

    def _hold(self, ids: Ids) -> None:
        self.ids = ids  # sorted
        self._index = IdIndex(ids)
        self._scores = np.full(len(ids), np.nan)  # NaN: never seen
        self._labels = np.full(len(ids), _UNKNOWN)
        self._found = []

    def keep(self, ids: Ids) -> None:
        """Hold exactly these ids [M]: new ones are not seen yet, those left out are forgotten."""
        old_ids, old_scores, old_labels = self.ids, self._scores, self._labels
        ids = np.sort(ids)  # np.unique takes ten times as long
        self._hold(ids[np.diff(ids, prepend=ids[:1] - 1) > 0])
        at, known = self._index.locate(old_ids)
        self._scores[at[known]] = old_scores[known]
        self._labels[at[known]] = old_labels[known]

    def write(self, ids: Ids, scores: Weights, labels: Ids) -> None:
        """Take scores [N] in the order of draws: the last of an id counts; ids not held do not.

        ``labels`` [N]: classes, or -1 where unknown.
        """
        at, held = self._index.locate(ids)
        if not held.all():
            at, scores, labels = at[held], scores[held], labels[held]
        self._scores[at] = scores  # of several of one id, numpy leaves the last
        self._labels[at] = labels

    def label(self, ids: Ids, labels: Ids) -> None:
        """Tell the classes [N] of ids that were never seen; -1 where unknown."""
        self._labels[self._index.locate(ids)[0]] = labels

    def unseen(self, ids: Ids) -> Ids:
        """Return those of ``ids``, all held, that were never seen and whose class is unknown."""
        at, _ = self._index.locate(ids)
        unseen: Ids = ids[np.isnan(self._scores[at]) & (self._labels[at] == _UNKNOWN)]
        return unseen

    def read(self, ids: Ids, chosen: Positions | None = None) -> Weights:
        """Return scores float64 [N] of ids, all held, or of those at the positions ``chosen``.

        Where they are is remembered for two arrays of ids: a round asks for the same ones again.
        """
        found = next((at for known, at in self._found if known is ids), None)
        if found is None:
            found = self._index.locate(ids)[0]
            self._found = [*self._found[-1:], (ids, found)]
        at = found if chosen is None else found[chosen]
        scores = self._scores[at]
        missing = np.isnan(scores)
        if missing.any():
            scores[missing] = self._means(at[missing])
        return scores

    def _means(self, at: Ids) -> Weights:
        """Return what samples never seen count as; O(M)."""
        seen = np.flatnonzero(~np.isnan(self._scores))
        if not len(seen):
            return np.ones(len(at))
        experience = unpack_ids(self.ids)[0]
        experience = np.cumsum(np.diff(experience, prepend=experience[:1]) != 0)  # 0, 1, 2, …
        known = (self._labels >= 0) & (self._labels < self._classes)
        cell = np.where(known, experience * self._classes + self._labels, _UNKNOWN) + 1
        sums = np.bincount(cell[seen], self._scores[seen], minlength=cell.max() + 1)
        counts = np.bincount(cell[seen], minlength=cell.max() + 1)
        sums[0], counts[0] = self._scores[seen].sum(), len(seen)  # of all, for unknown classes
        cell = np.where(counts[cell[at]] > 0, cell[at], 0)
        means: Weights = sums[cell] / counts[cell]
        return means

    def state_dict(self) -> dict[str, Any]:
        """Return ids int64 [M], scores float64 [M] (NaN: never seen) and labels int64 [M]."""
        return {
            "ids": torch.from_numpy(self.ids),
            "scores": torch.from_numpy(self._scores),
            "labels": torch.from_numpy(self._labels),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        self._hold(state["ids"].numpy().copy())
        self._scores[:] = state["scores"].numpy()
        self._labels[:] = state["labels"].numpy()
