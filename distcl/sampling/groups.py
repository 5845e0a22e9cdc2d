"""What a sampler draws from: groups of ids, each with weights or none, and draws of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from distcl.data.ids import IdRuns, as_ids, ids_tensor, tensor_ids
from distcl.priority.weighting import Positions, Weights, WeightVector, check_weights
from distcl.types import Ids, as_array, as_tensor, frozen

ArrayLike = npt.ArrayLike | torch.Tensor


@dataclass(frozen=True, slots=True)
class Group:
    """A part of what is drawn in an epoch: ``draws`` of ``ids``, by ``weights``.

    ids: int64 [N], or an int N for 0 … N-1; weights: [N], or None for uniform permutations.
    """

    ids: ArrayLike | int
    weights: ArrayLike | None
    draws: int


@dataclass(frozen=True, eq=False)
class Part(WeightVector):
    """A group as a weight vector; without values, permutations are drawn.

    ``multiples``: how many samples each one stands for, [n], as those of a pool do; None: itself.
    """

    draws: int = field(kw_only=True)
    multiples: Weights | None = field(default=None, kw_only=True)


def own(group: Group | Part) -> Part:
    """Return a group that nobody else changes: arrays are copied, but for read-only ones.

    A Part is taken as it is. Raises ValueError for what cannot be drawn from, naming the id.
    """
    if group.draws < 0:
        raise ValueError(f"a group's draws must not be negative, not {group.draws}")
    ids = group.ids if isinstance(group, Part) else _own_ids(group.ids)
    if len(ids) < 1:
        raise ValueError("there are no ids to draw from")
    if isinstance(group, Part):
        return group
    weights = group.weights
    if isinstance(weights, torch.Tensor):
        weights = weights.detach().cpu().double().numpy()
    if weights is not None:
        weights = np.asarray(weights)
        weights = weights.astype(np.float64, copy=weights.flags.writeable)
        if weights.shape != (len(ids),):
            raise ValueError(f"weights of shape {weights.shape} for {len(ids)} ids")
        check_weights(weights, ids)
    return Part(ids, weights, draws=group.draws)


def _own_ids(values: ArrayLike | int) -> Ids:
    if isinstance(values, int | np.integer):
        return as_ids(IdRuns([0], [int(values)]))
    array = values.detach().cpu().numpy() if isinstance(values, torch.Tensor) else values
    array = np.asarray(array)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise ValueError(f"ids must be one row of integers, not {array.dtype} {array.shape}")
    ids = array.astype(np.int64, copy=array.flags.writeable)
    if array.dtype.kind == "u" and ids.min(initial=0) < 0:
        raise ValueError(f"ids must be below 2**63, not {array.max()}")
    return ids


def packed(part: Part) -> dict[str, Any]:
    """Return a part for a checkpoint, as tensors and plain values."""
    ids, weights, multiples = ids_tensor(part.ids), as_tensor(part.values), part.multiples
    state = {"ids": ids, "weights": weights, "draws": part.draws}
    return state if multiples is None else state | {"multiples": as_tensor(multiples)}


def unpacked(state: dict[str, Any]) -> Part:
    """Return the part that was packed."""
    weights = None if state["weights"] is None else frozen(state["weights"].numpy())
    multiples = as_array(state.get("multiples"))
    return Part(tensor_ids(state["ids"]), weights, draws=state["draws"], multiples=multiples)


def ids_at(positions: Positions, parts: Sequence[Part]) -> Ids:
    """Return the ids at positions, which count through the parts one after another."""
    if len(parts) == 1:
        ids = parts[0].ids
        if isinstance(ids, IdRuns) and len(ids.begins) == 1:  # of range(n), the usual one
            return positions.astype(np.int64) + ids.begins[0]
        return np.asarray(ids[positions])
    found, first = positions.astype(np.int64), 0
    for part in parts:
        size = len(part.ids)
        here = np.flatnonzero((positions >= first) & (positions < first + size))
        found[here] = part.ids[positions[here] - first]
        first += size
    return found
