"""How often each sample was drawn in a round, and how its weights were spread."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from distcl.priority.shaping import WHOLE, Sums, Weights
from distcl.runtime import Runtime
from distcl.types import Ids

BINS = 64
EDGES: npt.NDArray[np.float64] = np.logspace(-4, 4, BINS + 1)
"""Bins of a weight histogram, in means: 1 is a sample that is drawn as often as the average one.

They are the same in every round, so that rounds can be compared; what lies outside counts in the
first or the last bin.
"""

_BLOCK = 1 << 16  # weights looked at together
_PENDING = 1 << 20  # draws that are kept before they are merged


class DrawTally:
    """Counts draws by id. Memory: 16 bytes a distinct id, and 8 MiB. Local."""

    def __init__(self) -> None:
        self._ids: Ids = np.empty(0, dtype=np.int64)
        self._counts: npt.NDArray[np.int64] = np.empty(0, dtype=np.int64)
        self._pending: list[Ids] = []
        self._number = 0

    def add(self, ids: Ids) -> None:
        """Count one draw of each of ``ids``, int64 [b]; an id may be there several times."""
        self._pending.append(ids)
        self._number += len(ids)
        if self._number >= _PENDING:
            self._merge()

    def counts(self) -> tuple[Ids, npt.NDArray[np.int64]]:
        """Return (ids, counts), int64 [n] each, of all ids drawn at least once, sorted by id."""
        self._merge()
        return self._ids, self._counts

    def top(self, n: int) -> tuple[Ids, npt.NDArray[np.int64]]:
        """Return (ids, counts) of the ``n`` ids drawn most, most first, equals by id."""
        ids, counts = self.counts()
        order = np.argsort(-counts, kind="stable")[:n]
        return ids[order], counts[order]

    def statistics(self, candidates: int) -> dict[str, Any]:
        """Return ``draws``, ``distinct`` ids, ``coverage`` (share of candidates) and ``most``."""
        _, counts = self.counts()
        return {
            "draws": int(counts.sum()),
            "distinct": len(counts),
            "coverage": len(counts) / candidates if candidates else 0.0,
            "most": int(counts.max(initial=0)),
        }

    def put(self, ids: Ids, counts: npt.NDArray[np.int64]) -> None:
        """Add counts [n] of different ``ids`` [n], none of which has been drawn yet."""
        self._merge()
        both = np.concatenate([self._ids, ids])
        order = np.argsort(both, kind="stable")
        self._ids, self._counts = both[order], np.concatenate([self._counts, counts])[order]

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return the counts so far as tensors."""
        ids, counts = self.counts()
        return {"ids": torch.from_numpy(ids), "counts": torch.from_numpy(counts)}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Go on from what ``state_dict`` returned."""
        self._ids, self._counts = state["ids"].numpy().copy(), state["counts"].numpy().copy()
        self._pending, self._number = [], 0

    def _merge(self) -> None:
        if not self._pending:
            return
        fresh, counts = np.unique(np.concatenate(self._pending), return_counts=True)
        both = np.concatenate([self._ids, fresh])
        self._ids, inverse = np.unique(both, return_inverse=True)
        merged = np.zeros(len(self._ids), dtype=np.int64)
        np.add.at(merged, inverse, np.concatenate([self._counts, counts]))
        self._counts = merged
        self._pending, self._number = [], 0


def weight_histogram(
    weights: Weights, runtime: Runtime, over: Sums = WHOLE
) -> npt.NDArray[np.int64]:
    """Return how many weights [N], in means, lie between ``EDGES``, int64 [BINS]. Collective.

    Every rank counts its part of them: where ``over`` sums slices, those it holds. A weight of 0
    counts in the first bin.
    """
    each = over.number(weights) / over.total(weights)
    begin, end = runtime.share(len(weights)) if over is WHOLE else (0, len(weights))
    mine = torch.from_numpy(binned(weights[begin:end], each)).to(runtime.device)
    counts: npt.NDArray[np.int64] = runtime.all_reduce(mine).cpu().numpy()
    return counts


def binned(weights: Weights, each: float) -> npt.NDArray[np.int64]:
    """Return how many of ``weights`` [n] times ``each`` lie between ``EDGES``, int64 [BINS]."""
    counts = np.zeros(BINS, dtype=np.int64)
    for start in range(0, len(weights), _BLOCK):
        relative = weights[start : start + _BLOCK] * each
        places = np.searchsorted(EDGES, relative, side="right")
        counts += np.bincount(np.clip(places - 1, 0, BINS - 1), minlength=BINS)
    return counts
