"""Reads a checkpoint that was verified, for any layout on any number of ranks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distcl.checkpoint.store import SHARED, copied, load, rank_file
from distcl.errors import CheckpointError
from distcl.models.weights import Spec, WeightsFile, check_fit
from distcl.parallel.partition import Partition


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

    def check_names(self, shared: set[str], ranks: set[str]) -> None:
        """Compare the parts whose state is saved with those of the run. Raises CheckpointError."""
        for saved, own in ((self.shared, shared), *((state, ranks) for state in self.ranks)):
            if missing := sorted(own - saved.keys()):
                raise CheckpointError(f"checkpoint '{self.path}' lacks the state of '{missing[0]}'")
            if extra := sorted(saved.keys() - own):
                raise CheckpointError(
                    f"checkpoint '{self.path}' has a state of '{extra[0]}', which this run does not"
                )

    def check_tensors(self, partition: Partition) -> None:
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
