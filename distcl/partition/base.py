"""What every layout of the weights offers, and the choice of the one in force."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from distcl.runtime import Runtime

Slices = Mapping[str, torch.Tensor]
"""Name -> 1-D tensor: the part of each parameter or buffer that this rank owns."""

Fetch = Callable[[str, int, int], torch.Tensor]
"""(name, start, stop) -> those elements of a saved tensor, 1-D, on the CPU."""


@dataclass(frozen=True, slots=True)
class OptimizerState:
    """An optimizer's state by name of parameter, of any layout.

    slices: state key ("exp_avg") -> this rank's slices; plain: parameter -> state key ("step") ->
    what does not have the parameter's shape.
    """

    slices: dict[str, dict[str, torch.Tensor]]
    plain: dict[str, dict[str, torch.Tensor]]


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

    def ranges(self) -> dict[str, tuple[int, int]]:
        """Return where in each tensor my slice lies, [start, stop) of its elements. Local."""
        ...

    def load(self, fetch: Fetch) -> None:
        """Replace weights and buffers by saved ones, each rank what it needs. Collective."""
        ...

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> OptimizerState:
        """Return my slices of the optimizer's state, and what is no slice. Local."""
        ...

    def load_optimizer_state(
        self,
        optimizer: torch.optim.Optimizer,
        fetch: Mapping[str, Fetch],
        plain: Mapping[str, Mapping[str, torch.Tensor]],
    ) -> None:
        """Restore the optimizer's state; ``fetch`` has a reader for each of its keys. Collective.

        ``plain`` is what the saving ranks had in ``OptimizerState.plain``, put together.
        """
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
    from distcl.partition.replicated import Replicated

    return Replicated(runtime, model)
