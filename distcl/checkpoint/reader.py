"""Reads a checkpoint by name and place, so that any layout on any number of ranks can go on.

Sliced state (theta_star, optimizer, statistics) is saved by each rank as its slices, beside a table
of where in each tensor they lie. A reader asks for elements [start, stop) of a tensor and gets them
from whichever ranks' files have them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from distcl.checkpoint.store import MODEL, SHARED, load, rank_file
from distcl.errors import CheckpointError
from distcl.parallel.partition import Fetch, Partition


class Reader:
    """A verified checkpoint. Local; tensors are memory-mapped."""

    def __init__(self, path: Path, manifest: Mapping[str, Any]) -> None:
        self.path = path
        self.shared: dict[str, Any] = load(path / SHARED)
        self.ranks: list[dict[str, Any]] = [
            load(path / rank_file(rank)) for rank in range(int(manifest["world_size"]))
        ]

    def weights(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Return elements of a parameter or buffer, 1-D."""
        path = self.path / MODEL
        with safe_open(path, framework="pt") as file:
            if name not in file.keys():  # noqa: SIM118  (it is no mapping)
                raise CheckpointError(f"checkpoint '{path}' has no '{name}'")
            whole: torch.Tensor = file.get_tensor(name)
        if whole.numel() < stop:
            raise CheckpointError(
                f"checkpoint '{path}' has {whole.numel()} elements of '{name}', but {stop} are "
                "needed: it is of another model"
            )
        return whole.reshape(-1)[start:stop]

    def slices(self, *keys: str | int) -> Fetch:
        """Return the reader of the sliced state under ``keys`` in the ranks' files."""
        parts = [(_under(state, keys), state["ranges"]) for state in self.ranks]

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

    def cut(self, partition: Partition, *keys: str | int) -> dict[str, torch.Tensor]:
        """Return my slices of a sliced state, under the partition in force."""
        fetch = self.slices(*keys)
        saved = {name for state in self.ranks for name in _under(state, keys)}
        mine = partition.ranges().items()
        return {name: fetch(name, start, stop) for name, (start, stop) in mine if name in saved}


def _under(state: Any, keys: tuple[str | int, ...]) -> dict[str, torch.Tensor]:
    for key in keys:
        if isinstance(key, str) and key not in state:
            return {}
        state = state[key]
    found: dict[str, torch.Tensor] = state
    return found
