"""What a round has drawn so far: digest, counts by sample; and how its weights were spread."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from distcl.distributed.runtime import Runtime
from distcl.priority.population import Dealer
from distcl.priority.weighting import Weights, WeightVector
from distcl.types import Ids

Drawn = Sequence[tuple[int, Ids]]
"""The ids of a batch as (lane, ids): of all ranks' parts, in lane 0, or of this rank's lanes."""
Told = tuple[dict[str, Any], Ids, Ids]
"""Statistics of the draws; the ids drawn most and how often, most first."""


BINS = 64
EDGES: npt.NDArray[np.float64] = np.logspace(-4, 4, BINS + 1)
"""Bins of a weight histogram, in means: 1 is a sample that is drawn as often as the average one.

They are the same in every round, so that rounds can be compared; what lies outside counts in the
first or the last bin.
"""

_BLOCK = 1 << 16  # weights looked at together
_PENDING = 1 << 20  # draws that are kept before they are merged


class DrawLog:
    """Takes in one batch after another: digest, and counts by id.

    The digest is a chain: SHA-256 of the digest before a batch and the batch's ids, little-endian
    int64. Over lanes (``dealer``), each lane has a chain, of its ids in order of runs, and the
    digest is that over the chains: no rank need know another's draws, and the digest is the same at
    every world size. Without lanes every rank knows all draws, and rank 0 counts. Memory: 16 bytes
    a distinct id, and 8 MiB.
    """

    def __init__(self, runtime: Runtime, dealer: Dealer | None = None) -> None:
        self._runtime = runtime
        self._dealer = dealer
        self._is_counting = runtime.is_main or dealer is not None
        self.chains = dict.fromkeys([0] if dealer is None else dealer.mine, b"")
        self._ids: Ids = np.empty(0, dtype=np.int64)
        self._counts: Ids = np.empty(0, dtype=np.int64)
        self._pending: list[Ids] = []
        self._waiting = 0  # draws in it

    def add(self, drawn: Drawn) -> None:
        """Take in a batch; an id may be in it several times. Local."""
        for lane, chain in self.chains.items():
            here = b"".join(ids.astype("<i8").tobytes() for at, ids in drawn if at == lane)
            self.chains[lane] = hashlib.sha256(chain + here).digest()
        if self._is_counting:
            self._pending += [ids for _, ids in drawn]
            self._waiting += sum(len(ids) for _, ids in drawn)
            if self._waiting >= _PENDING:
                self.counts()

    def counts(self) -> tuple[Ids, Ids]:
        """Return (ids, counts), int64 [n] each, of what this rank counts, sorted by id. Local."""
        if self._pending:
            fresh = np.unique(np.concatenate(self._pending), return_counts=True)
            self._pending, self._waiting = [], 0
            self._merge(*fresh)
        return self._ids, self._counts

    def _merge(self, ids: Ids, counts: Ids) -> None:
        both = np.concatenate([self._ids, ids])
        self._ids, inverse = np.unique(both, return_inverse=True)
        merged = np.zeros(len(self._ids), dtype=np.int64)
        np.add.at(merged, inverse, np.concatenate([self._counts, counts]))
        self._counts = merged

    def digest(self) -> str:
        """Return the digest of the global batches so far, the same on every rank. Collective."""
        if self._dealer is None:
            return self.chains[0].hex()
        return digest_of(self._runtime.gather_objects(self.chains))

    def told(self, candidates: int, top: int) -> Told:
        """Return what the report shows, the same on every rank. Collective.

        ``draws``, ``distinct`` ids, ``coverage`` (share of ``candidates``), and ``most``.
        """
        ids, counts = self.counts()
        order = np.argsort(-counts, kind="stable")[:top]
        sizes = int(counts.sum()), len(counts), int(counts.max(initial=0))
        every = self._runtime.gather_objects((*sizes, ids[order], counts[order]))
        draws, distinct, most, some, often = zip(*every, strict=True)
        ids, counts = np.concatenate(some), np.concatenate(often)
        order = np.lexsort((ids, -counts))[:top]
        statistics = {
            "draws": sum(draws),
            "distinct": sum(distinct),
            "coverage": sum(n / candidates for n in distinct) if candidates else 0.0,
            "most": max(most),
        }
        return statistics, ids[order], counts[order]

    def state_dict(self) -> dict[str, Any]:
        """Return this rank's state: tensors and plain values. Without lanes, save rank 0's."""
        chains = {lane: chain.hex() for lane, chain in self.chains.items()}
        ids, counts = map(torch.from_numpy, self.counts())
        return {"chains": chains, "tally": {"ids": ids, "counts": counts}}

    def load_states(self, states: Sequence[dict[str, Any]]) -> None:
        """Go on from the states that were saved, at any world size. Local."""
        for state in states:
            for lane, chain in state["chains"].items():
                if lane in self.chains:
                    self.chains[lane] = bytes.fromhex(chain)
            ids, counts = (state["tally"][name].numpy() for name in ("ids", "counts"))
            if self._dealer is not None:
                own = self._dealer.own(ids)
                ids, counts = ids[own], counts[own]
            if self._is_counting:
                self._merge(ids, counts)


def digest_of(chains: Sequence[dict[int, bytes]]) -> str:
    """Return the digest, in hex, of the chains of all ranks' lanes; '' if nothing was drawn."""
    every = {lane: chain for part in chains for lane, chain in part.items()}
    joined = b"".join(every[lane] for lane in sorted(every))
    return hashlib.sha256(joined).hexdigest() if joined else ""


def weight_histogram(weights: WeightVector, runtime: Runtime) -> npt.NDArray[np.int64]:
    """Return how many weights, in means, lie between ``EDGES``, int64 [BINS]. Collective.

    Every rank counts its part of them: of slices, those it holds. A weight of 0 counts in the first
    bin.
    """
    held, each = weights.held, weights.number / weights.sum()
    begin, end = runtime.share(len(held)) if weights.slices is None else (0, len(held))
    mine = torch.from_numpy(binned(held[begin:end], each)).to(runtime.device)
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
