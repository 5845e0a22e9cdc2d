"""What every layout of the weights offers, and the choice of the one in force."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import nn

from distcl.partition.replicated import Replicated
from distcl.runtime import Runtime

Slices = Mapping[str, torch.Tensor]
"""Name -> 1-D tensor: the part of each parameter or buffer that this rank owns."""


class Partition(Protocol):
    """Who owns which slice of the weights. Every element of the model is owned by one rank."""

    def owned(self) -> dict[str, torch.Tensor]:
        """Return my slice of each parameter and buffer, 1-D live views. Local.

        Names of which this rank owns nothing are absent. Tied parameters appear once.
        """
        ...

    def trainable(self) -> dict[str, torch.Tensor]:
        """Return those of :meth:`owned` that are parameters and take gradients. Local."""
        ...

    def grads(self) -> dict[str, torch.Tensor]:
        """Return my slices of the global mean gradient, 1-D live views, after backward. Local.

        Names as in :meth:`trainable`, less parameters that have no gradient.
        """
        ...

    def add_grad_(self, slices: Slices) -> None:
        """Add to the global mean gradient, each rank for its own slices. Collective.

        Call it after backward and before the optimizer's step, on every rank.
        """
        ...

    def add_full_grads_(self, grads: Mapping[str, torch.Tensor], owners: Mapping[str, int]) -> None:
        """Add to the global mean gradient, whole parameters at a time, each from one rank.

        ``owners``: parameter name -> the rank that gives its tensor; the same on every rank.
        ``grads``: the tensors that this rank gives, in the parameters' own shapes. Collective; call
        it after backward and before the optimizer's step, on every rank.
        """
        ...

    def reduce_owned(self, full: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Sum full-size tensors over ranks and return my slices of the sums. Collective."""
        ...

    def swapped(self, slices: dict[str, torch.Tensor]) -> AbstractContextManager[None]:
        """Compute with other weights inside the context, in place. Collective.

        ``slices`` has the names and shapes of :meth:`owned`; while inside, it holds the current
        weights. They are put back exactly, also when the body raises.
        """
        ...

    def gather(self, name: str) -> torch.Tensor:
        """Return one full parameter or buffer, in its own shape (a copy). Collective."""
        ...

    def sync_buffers(self) -> None:
        """Average floating-point buffers over ranks (BatchNorm statistics). Collective."""
        ...


def create_partition(runtime: Runtime, model: nn.Module) -> Partition:
    """Return the partition that fits how ``model`` was prepared. Local."""
    return Replicated(runtime, model)
