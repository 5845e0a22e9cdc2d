"""What a sampler draws from: groups of ids, each with weights or none, and draws of its own."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from distcl.priority import shaping
from distcl.types import Ids

ArrayLike = npt.ArrayLike | torch.Tensor


@dataclass(frozen=True, slots=True)
class Group:
    """A part of what is drawn in an epoch: exactly ``draws`` of ``ids``, by ``weights``.

    ids: int64 [N], or an int N for 0 … N-1; weights: [N], or None for uniform permutations.
    """

    ids: ArrayLike | int
    weights: ArrayLike | None
    draws: int


def own_ids(values: ArrayLike | int) -> Ids | int:
    """Return ids that nobody else changes: a copy, but of a read-only array."""
    if isinstance(values, int | np.integer):
        return int(values)
    array = values.detach().cpu().numpy() if isinstance(values, torch.Tensor) else values
    array = np.asarray(array)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise ValueError(f"ids must be one row of integers, not {array.dtype} {array.shape}")
    return array.astype(np.int64, copy=array.flags.writeable)


def size_of(ids: Ids | int) -> int:
    """Return how many ids these are."""
    return ids if isinstance(ids, int) else len(ids)


def as_ids(ids: Ids | int) -> Ids:
    """Return ids, or 0 … N-1 for an int N, as int64 [N]."""
    return np.arange(ids, dtype=np.int64) if isinstance(ids, int) else ids


def own_weights(values: ArrayLike) -> shaping.Weights:
    """Return weights that nobody else changes: a copy, but of a read-only array."""
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu().double().numpy()
    array = np.asarray(values)
    return array.astype(np.float64, copy=array.flags.writeable)
