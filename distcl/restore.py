"""What a checkpoint holds, by name and place, so that any layout on any number of ranks reads it.

Sliced state (theta_star, optimizer, statistics) is saved by each rank with the place of each slice
in its tensor; a reader asks for elements [start, stop) of a tensor and gets them from whichever
ranks' files have them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from distcl.checkpoint import MODEL, SHARED, load, rank_file
from distcl.errors import CheckpointError
from distcl.partition.base import Fetch, Partition

Ranges = Mapping[str, tuple[int, int]]


def pack(slices: Mapping[str, torch.Tensor], ranges: Ranges) -> dict[str, Any]:
    """Return slices with the place where each begins, as :class:`Reader` finds them. Local."""
    return {
        name: {"start": ranges[name][0], "data": value}
        for name, value in slices.items()
        if name in ranges
    }


class Reader:
    """Reads a verified checkpoint. Local; files are memory-mapped."""

    def __init__(self, path: Path, manifest: Mapping[str, Any]) -> None:
        self.path = path
        self.manifest = manifest
        self.shared: dict[str, Any] = load(path / SHARED)
        self.ranks: list[dict[str, Any]] = [
            load(path / rank_file(rank)) for rank in range(int(manifest["world_size"]))
        ]

    def weights(self) -> Fetch:
        """Return the reader of weights and buffers."""

        def fetch(name: str, start: int, stop: int) -> torch.Tensor:
            with safe_open(self.path / MODEL, framework="pt") as file:
                if name not in file.keys():  # noqa: SIM118 (it is no mapping)
                    raise CheckpointError(f"checkpoint '{self.path / MODEL}' has no '{name}'")
                whole: torch.Tensor = file.get_tensor(name)
            if whole.numel() < stop:
                raise CheckpointError(
                    f"checkpoint '{self.path / MODEL}' has {whole.numel()} elements of '{name}', "
                    f"{stop} are needed: is it of another model?"
                )
            return whole.reshape(-1)[start:stop]

        return fetch

    def slices(self, *keys: str) -> Fetch:
        """Return the reader of sliced state that lies under ``keys`` in the ranks' files."""

        def fetch(name: str, start: int, stop: int) -> torch.Tensor:
            out: torch.Tensor | None = None
            left = stop - start
            for state in self.ranks:
                for key in keys:
                    state = state.get(key, {})
                part = state.get(name)
                if part is None:
                    continue
                data, at = part["data"], int(part["start"])
                lo, hi = max(start, at), min(stop, at + data.numel())
                if lo < hi:
                    out = data.new_empty(stop - start) if out is None else out
                    out[lo - start : hi - start] = data[lo - at : hi - at]
                    left -= hi - lo
            if out is None or left != 0:
                raise CheckpointError(
                    f"checkpoint '{self.path}' lacks {'/'.join(keys)} of '{name}' [{start}:{stop})"
                )
            return out

        return fetch

    def cut(self, keys: Iterable[str], partition: Partition) -> dict[str, torch.Tensor]:
        """Return my slices of a sliced state, under the partition in force."""
        fetch = self.slices(*keys)
        saved: set[str] = set()
        for state in self.ranks:
            for key in keys:
                state = state.get(key, {})
            saved |= set(state)
        return {
            name: fetch(name, start, stop)
            for name, (start, stop) in partition.ranges().items()
            if name in saved
        }
