"""Weights, gradients and optimizer state sharded over ranks by torch's ``fully_shard``."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)

from distcl.config import ParallelConfig, RunConfig, TrainingConfig
from distcl.distributed.runtime import Runtime
from distcl.parallel.gradients import squaring
from distcl.parallel.partition import EqualShards
from distcl.parallel.sliced_state import Fetch, Stepped
from distcl.parallel.strategy import (
    MakeOptimizer,
    Strategy,
    join_alone,
    refuse_batchnorm,
    refuse_scalars,
    trainable,
)


class FSDP2(Strategy):
    """``fsdp2``: float32 shards; under bf16 they are gathered, and computed with, in bfloat16.

    Accelerate only opens the process group: its own FSDP silently trains plain DDP on a CPU.
    """

    def __init__(self, run: RunConfig, parallel: ParallelConfig, training: TrainingConfig) -> None:
        super().__init__(run, parallel, training)
        os.environ.pop("ACCELERATE_USE_FSDP", None)
        self.accelerator = Accelerator(
            cpu=not torch.cuda.is_available(),
            mixed_precision="no",
            kwargs_handlers=[InitProcessGroupKwargs(timeout=self.timeout)],
        )
        join_alone(self.accelerator)

    def prepare(
        self, model: nn.Module, make_optimizer: MakeOptimizer | None, unused: Collection[str] = ()
    ) -> tuple[nn.Module, torch.optim.Optimizer | None]:
        """See the base class. Raises UsageError naming a parameter that cannot be sharded."""
        refuse_scalars(model, self.name)
        refuse_batchnorm(model, self.name, self.precision)
        device = self.accelerator.device
        model = model.float()
        mesh = init_device_mesh(device.type, (dist.get_world_size(),))
        half, full = (torch.bfloat16, torch.float32) if self.precision == "bf16" else (None, None)
        inner = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=full)
        outer = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=full, output_dtype=full)
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

    def partition(self, runtime: Runtime, model: nn.Module) -> FullySharded:
        """See the base class."""
        return FullySharded(runtime, model)


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


class FullySharded(EqualShards):
    """The partition of a model sharded by ``fully_shard``: some rows of each parameter a rank.

    Rows are dealt as by ``torch.chunk`` along the first dimension, so shards are contiguous in the
    parameter's memory; a parameter with fewer rows than ranks leaves some ranks without any. Shards
    are float32; under bf16 only what is gathered is half precision. They are exchanged while
    nothing is gathered.
    """

    def __init__(self, runtime: Runtime, model: nn.Module) -> None:
        self._units = [m for m in model.modules() if isinstance(m, FSDPModule)]
        self._reshard()  # then the model's parameters are those whose shards are the truth
        each: dict[str, int] = {}
        for name, p in model.named_parameters():
            rows = -(-p.shape[0] // runtime.world_size)
            each[name] = rows * (p.numel() // max(1, p.shape[0]))
        super().__init__(runtime, model, each)

    def _reshard(self) -> None:
        for unit in self._units:
            unit.reshard()

    # -- what is mine --------------------------------------------------------------------------

    def _slice(self, name: str) -> torch.Tensor:
        return _local(self._parameters[name])

    def _slices(self) -> dict[str, torch.Tensor]:
        self._reshard()  # what is written to them is to be gathered anew
        return super()._slices()

    def load(self, fetch: Fetch) -> None:
        """Replace shards and buffers. Local."""
        with torch.no_grad():
            self._reshard()
            for name, span in self._shards.items():
                self._slice(name).copy_(fetch(name, *span))
        self._rest.load(fetch)

    def _stepped(self) -> dict[str, Stepped]:
        starts = {name: self._spans.get(name, (0, 0))[0] for name in self._trained}
        return {n: Stepped(p, _local, starts[n]) for n, p in self._trained.items()}

    # -- gradients -----------------------------------------------------------------------------

    def grads(self) -> dict[str, torch.Tensor]:
        """My shards of the gradients, live views."""
        self._reshard()
        grads = {name: self._parameters[name].grad for name in self._spans}
        return {name: _local(grad) for name, grad in grads.items() if grad is not None}

    def _addable(self) -> dict[str, torch.Tensor]:
        for p in self._trained.values():
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        return self.grads()

    def squares(self) -> AbstractContextManager[None]:
        """Square gradients on their way to the average: hooks on the gathered parameters."""
        return squaring(self._gathered())

    def _gathered(self) -> Iterator[torch.Tensor]:
        """Yield every parameter while it is gathered."""
        for unit in self._units:
            unit.unshard()
            own: Any = unit._get_fsdp_state()._fsdp_param_group
            for p in own.fsdp_params if own is not None else ():
                yield p.unsharded_param
            unit.reshard()

    # -- other weights -------------------------------------------------------------------------

    @contextmanager
    def swapped(self, slices: dict[str, torch.Tensor]) -> Iterator[None]:
        """Exchange the shards with ``slices``. Collective."""
        with super().swapped(slices):
            try:
                yield
            except BaseException:  # it has cut a forward short
                self._units[0].reset_iter_state()  # of the root
                raise

    def _exchange(self, slices: dict[str, torch.Tensor], back: bool) -> None:
        with torch.inference_mode(False), torch.no_grad():
            for name, shard in self._slices().items():
                held = shard.to(slices[name].device, copy=True)
                shard.copy_(slices[name])
                slices[name].copy_(held)


def _local(tensor: Any) -> torch.Tensor:
    """Return my shard of a tensor, 1-D, a live view. Local."""
    local: torch.Tensor = tensor.to_local().detach().reshape(-1)
    return local
