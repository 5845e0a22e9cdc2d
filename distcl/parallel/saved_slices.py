"""State of which each rank has its own: saved by each, and found again by name and place.

So any layout on any number of ranks can go on: who reads asks for elements [start, stop) of a
tensor and gets them from whichever ranks' files have them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch

from distcl.errors import CheckpointError
from distcl.parallel.optimizer_state import Fetch

Ranges = Mapping[str, Sequence[int]]
"""Name -> [start, stop) of the elements of a tensor that a rank owns."""


@dataclass(frozen=True, slots=True)
class SavedSlices:
    """What the ranks have saved of one part, in order of rank. Local; memory-mapped.

    ``saved_ranges``: what each of them owned; ``ranges``: what this one owns now; ``own``: this
    rank's state if there were as many ranks, else None.
    """

    path: Path
    states: list[Any]
    saved_ranges: list[Ranges]
    ranges: Ranges
    rank: int
    world_size: int

    @property
    def own(self) -> Any:
        """This rank's state if the run had as many ranks, else None."""
        return self.states[self.rank] if len(self.states) == self.world_size else None

    @property
    def same_layout(self) -> bool:
        """Whether :attr:`own` is of the slices that this rank owns now."""
        if self.own is None:
            return False
        saved = self.saved_ranges[self.rank]
        return {n: tuple(span) for n, span in saved.items()} == dict(self.ranges)

    def fetch(self, *keys: str | int) -> Fetch:
        """Return the reader of the slices under ``keys`` of the ranks' states."""
        parts = [*zip(self._under(keys), self.saved_ranges, strict=True)]

        def fetch(name: str, start: int, stop: int) -> torch.Tensor:
            out: torch.Tensor | None = None
            found = 0
            for slices, ranges in parts:
                if name not in slices:
                    continue
                data, at = slices[name], ranges[name][0]
                lo, hi = max(start, at), min(stop, at + data.numel())
                if lo < hi:
                    out = data.new_empty(stop - start) if out is None else out
                    out[lo - start : hi - start] = data[lo - at : hi - at]
                    found += hi - lo
            if out is None or found != stop - start:
                where = "/".join(str(k) for k in keys)
                raise CheckpointError(f"checkpoint '{self.path}' lacks {where} of '{name}'")
            return out

        return fetch

    def cut(self, *keys: str | int) -> dict[str, torch.Tensor]:
        """Return my slices of what lies under ``keys``, under the partition in force."""
        fetch = self.fetch(*keys)
        saved = {name for slices in self._under(keys) for name in slices}
        return {name: fetch(name, *span) for name, span in self.ranges.items() if name in saved}

    def _under(self, keys: tuple[str | int, ...]) -> list[dict[str, torch.Tensor]]:
        found = []
        for state in self.states:
            for key in keys:
                state = {} if isinstance(key, str) and key not in state else state[key]
            found.append(state)
        return found


@runtime_checkable
class SlicedStateful(Protocol):
    """What must survive a restart, and of which each rank has its own."""

    def state_dict(self) -> Any:
        """Return this rank's state: tensors and plain values. Called on every rank."""
        ...

    def load_slices(self, saved: SavedSlices) -> None:
        """Restore this rank's state from what all had. Called on every rank."""
        ...
