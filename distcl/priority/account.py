"""What a round has drawn so far: its digest, and how often each sample came."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from distcl.priority.lanes import LaneDigest, digest_of
from distcl.priority.slices import Dealer
from distcl.priority.tally import DrawTally
from distcl.runtime import Runtime
from distcl.types import Ids

Drawn = Ids | list[tuple[int, Ids]]
"""The ids of a global batch, or of this rank's part of it as (lane, ids)."""
Told = tuple[dict[str, Any], Ids, Ids]
"""Statistics of the draws; the ids drawn most and how often, most first."""


class Account(Protocol):
    """Takes in one batch after another."""

    def add(self, drawn: Drawn) -> None:
        """Take in a batch. Local."""
        ...

    def digest(self) -> str:
        """Return the digest of the global batches so far, the same on every rank. Collective."""
        ...

    def told(self, candidates: int, top: int) -> Told:
        """Return what the report shows, the same on every rank. Collective."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return this rank's state: tensors and plain values."""
        ...


class WholeAccount:
    """Of batches that every rank knows; rank 0 counts. The digest is a chain.

    Of the digest before a batch and the batch's ids, little-endian int64.
    """

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._digest = b""
        self._tally = DrawTally()

    def add(self, drawn: Drawn) -> None:
        """See :class:`Account`."""
        assert isinstance(drawn, np.ndarray)
        self._digest = hashlib.sha256(self._digest + drawn.astype("<i8").tobytes()).digest()
        if self._runtime.is_main:
            self._tally.add(drawn)

    def digest(self) -> str:
        """See :class:`Account`. Local."""
        return self._digest.hex()

    def told(self, candidates: int, top: int) -> Told:
        """See :class:`Account`."""
        return self._runtime.broadcast((self._tally.statistics(candidates), *self._tally.top(top)))

    def state_dict(self) -> dict[str, Any]:
        """See :class:`Account`; rank 0's is the one to save."""
        return {"digest": self._digest.hex(), "tally": self._tally.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what ``state_dict`` returned."""
        self._digest = bytes.fromhex(state["digest"])
        self._tally.load_state_dict(state["tally"])


class LaneAccount:
    """Of batches of which every rank knows its lanes' part; each counts its own."""

    def __init__(self, runtime: Runtime, dealer: Dealer) -> None:
        self._runtime = runtime
        self._dealer = dealer
        self._digest = LaneDigest(dealer.mine)
        self._tally = DrawTally()

    def add(self, drawn: Drawn) -> None:
        """See :class:`Account`."""
        assert isinstance(drawn, list)
        self._digest.add(drawn)
        for _, ids in drawn:
            self._tally.add(ids)

    def digest(self) -> str:
        """See :class:`Account`."""
        return digest_of(self._runtime.gather_objects(self._digest.chains))

    def told(self, candidates: int, top: int) -> Told:
        """See :class:`Account`."""
        mine = self._tally.statistics(candidates), *self._tally.top(top)
        every = self._runtime.gather_objects(mine)
        statistics = {
            name: (max if name == "most" else sum)(part[0][name] for part in every)
            for name in mine[0]
        }
        ids, counts = (np.concatenate([part[k] for part in every]) for k in (1, 2))
        order = np.lexsort((ids, -counts))[:top]
        return statistics, ids[order], counts[order]

    def state_dict(self) -> dict[str, Any]:
        """See :class:`Account`."""
        chains = {lane: chain.hex() for lane, chain in self._digest.chains.items()}
        return {"chains": chains, "tally": self._tally.state_dict()}

    def load_states(self, states: Sequence[dict[str, Any]]) -> None:
        """Go on from the states of all ranks that there were. Local."""
        for state in states:
            for lane, chain in state["chains"].items():
                if lane in self._digest.chains:
                    self._digest.chains[lane] = bytes.fromhex(chain)
            ids, counts = (state["tally"][name].numpy() for name in ("ids", "counts"))
            own = self._dealer.own(ids)
            self._tally.put(ids[own], counts[own])
