"""Weights, gradients and optimizer state sharded over ranks by torch's ``fully_shard``."""

from __future__ import annotations

import os
from collections.abc import Iterator

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)

from distcl.config import ParallelConfig, RunConfig
from distcl.errors import UsageError
from distcl.strategies.base import MakeOptimizer, Strategy, refuse_batchnorm, trainable


class FSDP2(Strategy):
    """``fsdp2``: float32 shards; under bf16 they are gathered, and computed with, in bfloat16.

    Accelerate only opens the process group: its own FSDP silently trains plain DDP on a CPU.
    """

    def __init__(self, run: RunConfig, parallel: ParallelConfig) -> None:
        super().__init__(run, parallel)
        os.environ.pop("ACCELERATE_USE_FSDP", None)
        self.accelerator = Accelerator(
            cpu=not torch.cuda.is_available(),
            mixed_precision="no",
            kwargs_handlers=[InitProcessGroupKwargs(timeout=self.timeout)],
        )
        join_alone(self.accelerator)

    def prepare(
        self, model: nn.Module, make_optimizer: MakeOptimizer | None
    ) -> tuple[nn.Module, torch.optim.Optimizer | None]:
        """See the base class. Raises UsageError naming a parameter that cannot be sharded."""
        for name, parameter in model.named_parameters():
            if parameter.ndim == 0:
                raise UsageError(
                    f"parallel.strategy = 'fsdp2' cannot shard the scalar parameter '{name}'; "
                    "give it shape (1,), or use 'zero3'"
                )
        refuse_batchnorm(model, self.parallel.strategy, self.precision)
        device = self.accelerator.device
        model = model.float()
        mesh = init_device_mesh(device.type, (dist.get_world_size(),))
        half = torch.bfloat16 if self.precision == "bf16" else None
        inner = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32 if half else None)
        outer = MixedPrecisionPolicy(
            param_dtype=half,
            reduce_dtype=inner.reduce_dtype,
            output_dtype=torch.float32 if half else None,
        )
        offload = OffloadPolicy()
        if self.parallel.offload_optimizer:
            offload = CPUOffloadPolicy(pin_memory=device.type == "cuda")
        for unit in units(model, self.parallel.fsdp_unit):
            fully_shard(unit, mesh=mesh, mp_policy=inner, offload_policy=offload)
        fully_shard(
            model, mesh=mesh, mp_policy=outer, offload_policy=offload, reshard_after_forward=True
        )
        for buffer in model.buffers():
            buffer.data = buffer.data.to(device)
        optimizer = make_optimizer(trainable(model)) if make_optimizer is not None else None
        return model, optimizer

    def backward(self, loss: torch.Tensor) -> None:
        """See the base class."""
        loss.backward()  # type: ignore[no-untyped-call]


def units(model: nn.Module, size: int) -> Iterator[nn.Module]:
    """Yield the modules whose parameters are gathered together, inner ones first. Local.

    A module becomes one as soon as it has ``size`` parameters that no module inside it took; the
    model itself takes the rest. Parameters that several modules share stay with the model, and
    modules that are only lists, or whose parameters another module reads, cannot be one.
    """
    users: dict[nn.Parameter, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            users[parameter] = users.get(parameter, 0) + 1

    def visit(module: nn.Module) -> Iterator[tuple[nn.Module | None, int]]:
        left = sum(p.numel() for p in module.parameters(recurse=False) if users[p] == 1)
        shared = any(users[p] > 1 for p in module.parameters())
        if not isinstance(module, nn.MultiheadAttention):
            for child in module.children():
                for unit, count in visit(child):
                    if unit is not None:
                        yield unit, 0
                    left += count
        else:
            left = sum(p.numel() for p in module.parameters())
        lists = isinstance(module, nn.ModuleList | nn.ModuleDict)
        if left >= size and module is not model and not shared and not lists:
            yield module, 0
            left = 0
        yield None, left

    for unit, _ in visit(model):
        if unit is not None:
            yield unit


def join_alone(accelerator: Accelerator) -> None:
    """Open a process group of one, if this is the only process: sharding libraries need one."""
    if not dist.is_initialized():
        dist.init_process_group(
            "nccl" if accelerator.device.type == "cuda" else "gloo",
            store=dist.HashStore(),  # type: ignore[attr-defined]
            rank=0,
            world_size=1,
        )
