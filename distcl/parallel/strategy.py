"""What every strategy offers: how a model and its optimizer are spread over ranks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import nn

from distcl.config import ParallelConfig, RunConfig, TrainingConfig
from distcl.distributed.runtime import Runtime
from distcl.errors import UsageError
from distcl.parallel.activation_checkpointing import checkpoint_blocks
from distcl.parallel.partition import Partition
from distcl.types import PyTree

MakeOptimizer = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
"""Makes an optimizer of the parameters that take gradients."""


class Strategy(ABC):
    """Base of the strategies: joining the process group, and what most of them share.

    ``accelerator``: Accelerate's view of this process. Making a strategy is collective.
    """

    accelerator: Accelerator

    def __init__(self, run: RunConfig, parallel: ParallelConfig, training: TrainingConfig) -> None:
        self.name = parallel.strategy
        self.parallel = parallel
        self.precision = run.precision
        self.timeout = timedelta(seconds=run.timeout_seconds)

    @abstractmethod
    def prepare(
        self, model: nn.Module, make_optimizer: MakeOptimizer | None, unused: Collection[str] = ()
    ) -> tuple[nn.Module, torch.optim.Optimizer | None]:
        """Return the model, wrapped and on its device, and its optimizer if asked. Collective.

        ``unused``: parameters that get no gradient in some forwards, as far as known.
        """

    def prepare_training(
        self, model: nn.Module, make_optimizer: MakeOptimizer, unused: Collection[str] = ()
    ) -> tuple[nn.Module, torch.optim.Optimizer]:
        """Return the model, its blocks recomputed if asked, and its optimizer. Collective."""
        if self.parallel.activation_checkpointing:
            checkpoint_blocks(model)
        prepared, optimizer = self.prepare(model, make_optimizer, unused)
        assert optimizer is not None
        return prepared, optimizer

    @abstractmethod
    def partition(self, runtime: Runtime, model: nn.Module) -> Partition:
        """Return who owns which slice of a model that :meth:`prepare` returned. Local.

        For ZeRO-3 it is collective.
        """

    def settle(self, model: nn.Module, x: PyTree) -> None:  # noqa: B027 most have nothing to do
        """Run forward and backward on inputs ``x``, where the first one differs from later ones.

        ``model`` is the prepared one. The caller puts buffers and random numbers back. Collective.
        """

    def unwrap(self, model: nn.Module) -> nn.Module:
        """Return the module that the model was made of. Local.

        Forwards of it do not communicate, unless the partition is sharded.
        """
        return model

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the context of forwards of the unwrapped module (scoring, evaluation). Local."""
        return nullcontext()

    def backward(self, loss: torch.Tensor) -> None:
        """Backward; gradients are averaged over ranks. Collective."""
        self.accelerator.backward(loss)

    def accumulating(self, model: nn.Module, last: bool) -> AbstractContextManager[Any]:
        """Return the context of a forward and backward of which there are several a step.

        ``last``: the last one of the step. Until then gradients need not be averaged. Local.
        """
        return nullcontext()

    def only_used(
        self,
        model: nn.Module,
        stands_in: Callable[[], bool],
        all_reduce: Callable[..., torch.Tensor],
    ) -> AbstractContextManager[None]:
        """Return the context of a step in which some rank's forward may have had no sample.

        Parameters that no rank's forward of a sample used have no gradient afterwards, where models
        may branch; ``stands_in``: whether the last forward was of none. Collective.
        """
        return nullcontext()

    def unscale(self, optimizer: torch.optim.Optimizer) -> None:  # noqa: B027 most have none
        """Take the loss scale (fp16) out of the gradients, once, before they are changed. Local."""


def refuse_batchnorm(model: nn.Module, strategy: str, precision: str) -> None:
    """Raise UsageError naming a BatchNorm that would run in half precision. Local."""
    for name, module in model.named_modules():
        if precision in ("bf16", "fp16") and isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise UsageError(
                f"run.precision = '{precision}' with parallel.strategy = '{strategy}' computes in "
                f"half precision throughout, in which the statistics of BatchNorm '{name}' would "
                "be lost; use GroupNorm, fp32, or ddp"
            )


def refuse_scalars(model: nn.Module, strategy: str) -> None:
    """Raise UsageError naming a parameter without dimensions, which cannot be sharded. Local."""
    for name, parameter in model.named_parameters():
        if parameter.ndim == 0:
            raise UsageError(
                f"parallel.strategy = '{strategy}' cannot shard the scalar parameter '{name}'; "
                "give it shape (1,), or use 'ddp'"
            )


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that take gradients."""
    return [p for p in model.parameters() if p.requires_grad]


def join_alone(accelerator: Accelerator) -> None:
    """Open a process group of one, if this is the only process: sharding libraries need one."""
    if not dist.is_initialized():
        dist.init_process_group(
            "nccl" if accelerator.device.type == "cuda" else "gloo",
            store=dist.HashStore(),  # type: ignore[attr-defined]
            rank=0,
            world_size=1,
        )
