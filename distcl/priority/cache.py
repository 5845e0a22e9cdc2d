"""The loss cache: exact losses by id, so that a sample scored last round costs one forward now.

The L(w_now) pass of round k is the L(theta_star) pass of round k+1, since theta_star is refreshed
to exactly those weights. A fingerprint of the weights is kept with the losses; the cache is used
only if theta_star still has it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from distcl.runtime import Runtime
from distcl.types import Ids


def fingerprint(slices: Mapping[str, torch.Tensor], runtime: Runtime) -> int:
    """Return a 64-bit checksum of weights from the slices of all ranks, exact in every bit.

    A sum of the words of each tensor, each under an odd factor of its own. Collective.
    """
    total = torch.zeros((), dtype=torch.int64, device=runtime.device)
    for k, value in enumerate(slices.values()):
        words = value.detach().contiguous()
        width = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
        bits = words.view(width[words.element_size()])
        total += (bits.sum(dtype=torch.int64) * (2 * k + 3)).to(runtime.device)
    return int(runtime.all_reduce(total))


class LossCache:
    """Losses [N] by id under one set of weights; the same on every rank."""

    def __init__(self) -> None:
        self._ids: Ids = np.empty(0, dtype=np.int64)
        self._losses = torch.empty(0)
        self._weights: int | None = None

    def __len__(self) -> int:
        return len(self._ids)

    def clear(self) -> None:
        """Forget everything."""
        self.__init__()  # type: ignore[misc]

    def put(self, weights: int, ids: Ids, losses: torch.Tensor) -> None:
        """Add losses [N] of ``ids`` under the weights with that fingerprint; drop all others'."""
        if weights != self._weights:
            self.clear()
        self._weights = weights
        ids = np.concatenate([self._ids, ids])
        both = torch.cat([self._losses.to(losses), losses])
        self._ids, first = np.unique(ids, return_index=True)
        self._losses = both[torch.from_numpy(first).to(both.device)]

    def get(self, weights: int, ids: Ids) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (known bool [N], losses [N], 0 where unknown) under those weights."""
        known = torch.zeros(len(ids), dtype=torch.bool)
        losses = self._losses.new_zeros(len(ids))
        if weights != self._weights or len(self._ids) == 0:
            return known, losses
        at = np.searchsorted(self._ids, ids).clip(max=len(self._ids) - 1)
        known = torch.from_numpy(self._ids[at] == ids)
        found = self._losses[torch.from_numpy(at).to(self._losses.device)]
        return known, torch.where(known.to(found.device), found, losses)

    def state_dict(self) -> dict[str, Any]:
        """Return ids, losses and the weights' fingerprint."""
        return {
            "ids": torch.from_numpy(self._ids),
            "losses": self._losses,
            "weights": self._weights,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        self._ids = state["ids"].numpy()
        self._losses = state["losses"]
        self._weights = state["weights"]
