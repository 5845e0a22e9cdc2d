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

from distcl.checkpoint.store import SHARED, copied, load, rank_file
from distcl.errors import CheckpointError
from distcl.parallel.partition import Fetch, Partition
from distcl.weights import Spec, WeightsFile, check_fit


def load_weights(partition: Partition, path: Path) -> None:
    """Put the weights of a safetensors file into a model, each rank what it needs. Collective.

    Raises CheckpointError on every rank unless names, shapes and kinds are the model's.
    """
    try:
        file = WeightsFile(path)
    except OSError as error:
        raise CheckpointError(f"'{path}' cannot be read: {error.strerror}") from error
    check_fit(path, file.specs, partition.specs())
    partition.load(file.read)


class Reader:
    """A verified checkpoint. Local. What the ranks hold is memory-mapped, and read where used."""

    def __init__(self, path: Path, manifest: Mapping[str, Any]) -> None:
        self.path = path
        self.shared: dict[str, Any] = copied(load(path / SHARED))
        self.ranks: list[dict[str, Any]] = [
            load(path / rank_file(rank)) for rank in range(int(manifest["world_size"]))
        ]

    def check(self, partition: Partition) -> None:
        """Compare the saved tensors with the model's. Raises CheckpointError. Local."""
        saved = {
            name: Spec(tuple(shape), kind, tuple(order))
            for name, (shape, kind, order) in self.shared["specs"].items()
        }
        own = partition.specs()
        check_fit(self.path, saved, own)
        turned = [name for name, spec in own.items() if spec.order != saved[name].order]
        if turned:
            raise CheckpointError(
                f"checkpoint '{self.path}' was written with another memory format of "
                f"'{turned[0]}' ({len(turned)} in all)"
            )

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
