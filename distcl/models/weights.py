"""Weights in a safetensors file: what it holds, whether that fits a model, and parts of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from distcl.errors import CheckpointError

_SHOWN = 3  # names told of each kind of difference


class Spec(NamedTuple):
    """What a saved tensor must be. ``kind``: float, int, complex or bool; precision may differ.

    ``order``: the dimensions as they follow one another in memory; (): as they are numbered.
    """

    shape: tuple[int, ...]
    kind: str
    order: tuple[int, ...] = ()


def tensor_spec(tensor: torch.Tensor, shape: Iterable[int] | None = None) -> Spec:
    """Return the spec of a tensor, or of one of its type and another, whole ``shape``."""
    kind = "int"
    if tensor.is_floating_point() or tensor.is_complex():
        kind = "float" if tensor.is_floating_point() else "complex"
    elif tensor.dtype == torch.bool:
        kind = "bool"
    if shape is not None:
        return Spec(tuple(shape), kind)
    order: tuple[int, ...] = ()
    if not tensor.is_contiguous():
        order = tuple(sorted(range(tensor.dim()), key=lambda d: -tensor.stride()[d]))
    return Spec(tuple(tensor.shape), kind, order)


class WeightsFile:
    """A safetensors file, memory-mapped. Local.

    Raises OSError if it cannot be opened, CheckpointError if it is no sound safetensors file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb"):  # the reader's own errors name neither file nor reason
                opened: Any = safe_open
                self._file = opened(path, framework="pt")
            parts = {name: self._file.get_slice(name) for name in self._file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise CheckpointError(f"'{path}' is not a valid safetensors file: {error}") from error
        self.header: dict[str, str] = self._file.metadata() or {}
        kinds = {"B": "float", "F": "float", "C": "complex", "I": "int", "U": "int"}
        self.specs: dict[str, Spec] = {}
        """Of every tensor, from the header: nothing else is read for it."""
        for name, part in parts.items():
            dtype = part.get_dtype()
            kind = "bool" if dtype == "BOOL" else kinds[dtype[0]]
            self.specs[name] = Spec(tuple(part.get_shape()), kind)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Return elements [start, stop) of a tensor, 1-D; of others, at most parts of two rows."""
        shape = self.specs[name].shape
        stop = math.prod(shape) if stop is None else stop
        try:
            if not shape or start == stop:
                whole: torch.Tensor = self._file.get_tensor(name)
                return whole.reshape(-1)[start:stop]
            row = math.prod(shape[1:])
            first = start // row
            rows: torch.Tensor = self._file.get_slice(name)[first : -(-stop // row)]
        except SafetensorError as error:
            raise CheckpointError(f"'{self.path}': '{name}' cannot be read: {error}") from error
        return rows.reshape(-1)[start - first * row : stop - first * row]


def check_fit(
    path: Path,
    saved: Mapping[str, Spec],
    own: Mapping[str, Spec],
    needed: Callable[[str], bool] = lambda name: True,
) -> None:
    """Compare saved tensors with a model's: names both ways, shapes, kinds. Local.

    ``needed(name)``: whether one of the model's must be there. Raises CheckpointError that names
    the first of each kind of difference.
    """
    both = [(name, saved[name], spec) for name, spec in own.items() if name in saved]
    unlike = [
        f"'{name}' has shape {list(a.shape)}, the model's has {list(b.shape)}"
        for name, a, b in both
        if a.shape != b.shape
    ]
    unlike += [
        f"'{n}' is {a.kind}, the model's is {b.kind}" for n, a, b in both if a.kind != b.kind
    ]
    faults = {
        "lacks {} of the model": [f"'{n}'" for n in own if n not in saved and needed(n)],
        "has {}, which the model has not": [f"'{n}'" for n in saved if n not in own],
        "has tensors unlike the model's: {}": unlike,
    }
    told = "; ".join(text.format(_first(found)) for text, found in faults.items() if found)
    if told:
        raise CheckpointError(f"'{path}' {told}: it is of another model")


def _first(texts: list[str]) -> str:
    more = f" and {len(texts) - _SHOWN} more" if len(texts) > _SHOWN else ""
    return ", ".join(texts[:_SHOWN]) + more
