"""What every layout of the weights offers, and the choice of the one in force."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from distcl.distributed.runtime import Runtime
from distcl.weights import Spec

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
    """Who owns which slice of the weights. Every element of the model is owned by one rank.

    "Buffers" are the persistent ones, everywhere: others (``register_buffer(persistent=False)``)
    are nobody's, and stay as the model's constructor made them.
    """

    sharded: bool
    """Whether parameters are gathered for every forward: then forwards are collective, all ranks
    run equally many, and ``torch.func`` cannot be used on the module."""

    def owned(self) -> dict[str, torch.Tensor]:
        """Return my slice of each parameter and buffer, 1-D live views, to be read only. Local.

        Names of which this rank owns nothing are absent. Tied parameters appear once. Where an
        optimizer keeps float32 master weights, these are the slices of those.
        """
        ...

    def trainable(self) -> dict[str, torch.Tensor]:
        """Return those of :meth:`owned` that are parameters and take gradients. Local."""
        ...

    def ranges(self) -> dict[str, tuple[int, int]]:
        """Return where in each tensor my slice lies, [start, stop) of its elements. Local."""
        ...

    def specs(self) -> dict[str, Spec]:
        """Return what each parameter and buffer is as a whole, the same on every rank. Local."""
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

        Call it after backward and before the optimizer's step, on every rank. Where a loss scale
        (fp16) is in the gradients, it must be in ``slices``.
        """
        ...

    def add_full_grads_(self, grads: Mapping[str, torch.Tensor], owners: Mapping[str, int]) -> None:
        """Add to the global mean gradient, whole parameters at a time, each from one rank.

        ``owners``: parameter name -> the rank that gives its tensor; the same on every rank.
        ``grads``: the tensors that this rank gives, in the parameters' own shapes. Collective; call
        it after backward and before the optimizer's step, on every rank.
        """
        ...

    def scale_grads_(self, factor: torch.Tensor) -> None:
        """Multiply the global mean gradient by a scalar, the same on every rank. Local."""
        ...

    def reduce_owned(self, full: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Sum full-size tensors over ranks and return my slices of the sums. Collective."""
        ...

    def swapped(self, slices: dict[str, torch.Tensor]) -> AbstractContextManager[None]:
        """Compute with other weights inside the context, in place. Collective.

        ``slices`` has the names and shapes of :meth:`owned`; leave it alone while inside, where it
        may hold the current weights. Both are put back exactly, also when the body raises. An
        exception must leave the body on all ranks, or the run must end.
        """
        ...

    def inference(self) -> AbstractContextManager[object]:
        """Return the context for forwards without gradient; enter it inside ``swapped``. Local.

        ``torch.inference_mode`` would leave inference tensors behind where weights are gathered.
        """
        ...

    def gather(self, name: str) -> torch.Tensor:
        """Return one full parameter or buffer, in its own shape (a copy). Collective."""
        ...

    def sync_buffers(self) -> None:
        """Average floating-point buffers over ranks (BatchNorm statistics). Collective."""
        ...


class ShardedPartition(Partition, Protocol):
    """A layout whose ``sharded`` is true."""

    def squares(self) -> AbstractContextManager[None]:
        """Square each rank's own gradient before it is averaged, inside the context. Local.

        See ``updaters.fisher``.
        """
        ...


def create_partition(runtime: Runtime, model: nn.Module) -> Partition:
    """Return the partition that fits how ``model`` was prepared. Local, but for ZeRO-3."""
    if "torch.distributed.fsdp" in sys.modules:  # which takes a second to import
        from torch.distributed.fsdp import FSDPModule

        if isinstance(model, FSDPModule):
            from distcl.parallel.fsdp2 import FullySharded

            return FullySharded(runtime, model)
    if "deepspeed" in sys.modules:
        from deepspeed import DeepSpeedEngine

        if isinstance(model, DeepSpeedEngine):
            from distcl.parallel.zero3 import Zero3
            from distcl.parallel.zero12 import Zero12

            stage = int(model.zero_optimization_stage())
            return Zero3(runtime, model) if stage == 3 else Zero12(runtime, model)
    from distcl.parallel.ddp import Replicated

    return Replicated(runtime, model)


def clip_grads_(partition: Partition, runtime: Runtime, max_norm: float) -> None:
    """Scale the global mean gradient to an L2 norm of at most ``max_norm``; 0: leave it alone.

    The norm is one over all parameters, computed from owned slices in float64. The factor is
    min(1, max_norm / (norm + 1e-6)), as torch's ``clip_grad_norm_`` has it. Collective.
    """
    if not max_norm:
        return
    square = torch.zeros((), dtype=torch.float64, device=runtime.device)
    for grad in partition.grads().values():
        square += torch.linalg.vector_norm(grad, dtype=torch.float64).square()
    norm = runtime.all_reduce(square).sqrt()
    partition.scale_grads_((max_norm / (norm + 1e-6)).clamp(max=1.0))
