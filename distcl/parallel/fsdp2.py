"""Weights, gradients and optimizer state sharded over ranks by torch's ``fully_shard``."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
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
from torch.distributed.tensor import DTensor

from distcl.config import ParallelConfig, RunConfig
from distcl.distributed.runtime import Runtime
from distcl.parallel.flat_shards import (
    Whole,
    average_buffers,
    cut_by_dtype,
    deliver,
    persistent_buffers,
    restoring,
)
from distcl.parallel.partition import Fetch, OptimizerState
from distcl.parallel.strategy import (
    MakeOptimizer,
    Strategy,
    join_alone,
    refuse_batchnorm,
    refuse_scalars,
    trainable,
)
from distcl.weights import Spec, spec_of


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
        refuse_scalars(model, self.parallel.strategy)
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


# FSDP2: ``fully_shard`` gives every rank some rows of each parameter, and gathers per unit.
#
# Rows are dealt as by ``torch.chunk`` along the first dimension, so shards are contiguous in the
# parameter's memory; a parameter with fewer rows than ranks leaves some ranks without any. Shards
# are exchanged while nothing is gathered. Buffers lie whole on every rank and are cut as under DDP.


class FullySharded:
    """The partition of a model sharded by ``fully_shard``. See ``base.Partition``.

    Shards are float32; under bf16 only what is gathered is half precision.
    """

    sharded = True

    def __init__(self, runtime: Runtime, model: nn.Module) -> None:
        self._runtime = runtime
        self._model = model
        self._units = [m for m in model.modules() if isinstance(m, FSDPModule)]
        self._names = [name for name, _ in model.named_parameters()]
        self._buffers = persistent_buffers(model)
        self._rest = Whole(self._buffers, cut_by_dtype(runtime, self._buffers))
        self._reshard()
        self._shapes = {n: p.shape for n, p in self._sharded().items()}
        self._rows = {n: -(-shape[0] // runtime.world_size) for n, shape in self._shapes.items()}

    def _sharded(self) -> dict[str, DTensor]:
        """Return the parameters, which must not be gathered: their local shards are the truth."""
        found: dict[str, DTensor] = {}
        for name, parameter in self._model.named_parameters():
            assert isinstance(parameter, DTensor), f"'{name}' is gathered"
            found[name] = parameter
        return found

    def _reshard(self) -> None:
        for unit in self._units:
            unit.reshard()

    # -- what is mine --------------------------------------------------------------------------

    def owned(self) -> dict[str, torch.Tensor]:
        """My shards, live views; buffers."""
        return {**self._shards(), **self._rest.owned()}

    def _shards(self) -> dict[str, torch.Tensor]:
        self._reshard()
        mine = {n: self._local(p) for n, p in self._sharded().items()}
        return {n: v for n, v in mine.items() if len(v)}

    def ranges(self) -> dict[str, tuple[int, int]]:
        """Where in each tensor my slice lies."""
        mine = {n: (self._start(n), self._start(n) + len(v)) for n, v in self._shards().items()}
        return {**mine, **self._rest.ranges()}

    def specs(self) -> dict[str, Spec]:
        """What each tensor is as a whole."""
        self._reshard()
        whole = {n: spec_of(p, p.shape) for n, p in self._sharded().items()}
        return whole | {n: spec_of(b) for n, b in self._buffers.items()}

    def load(self, fetch: Fetch) -> None:
        """Replace shards and buffers. Local."""
        ranges = self.ranges()
        with torch.no_grad():
            for name, shard in self._shards().items():
                shard.copy_(fetch(name, *ranges[name]))
        self._rest.load(fetch)

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> OptimizerState:
        """My shards of what has a parameter's shape. Local."""
        self._reshard()
        found = OptimizerState({}, {})
        for name, parameter in self._sharded().items():
            if parameter not in optimizer.state:
                continue
            plain = found.plain.setdefault(name, {})
            for key, value in optimizer.state[parameter].items():
                if isinstance(value, DTensor):
                    shard = self._local(value)
                    if len(shard):
                        found.slices.setdefault(key, {})[name] = shard
                elif value is not None:
                    plain[key] = torch.as_tensor(value)
        return found

    def load_optimizer_state(
        self,
        optimizer: torch.optim.Optimizer,
        fetch: Mapping[str, Fetch],
        plain: Mapping[str, Mapping[str, torch.Tensor]],
    ) -> None:
        """Restore the states of my shards. Local."""
        ranges = self.ranges()
        for name, parameter in self._sharded().items():
            if name not in plain:
                continue
            state: dict[str, Any] = {key: value.clone() for key, value in plain[name].items()}
            for key, read in fetch.items():
                state[key] = torch.zeros_like(parameter, requires_grad=False)
                if name in ranges:
                    self._local(state[key]).copy_(read(name, *ranges[name]))
            optimizer.state[parameter] = state

    def trainable(self) -> dict[str, torch.Tensor]:
        """My shards of the parameters that take gradients, live views."""
        owned = self.owned()
        return {n: owned[n] for n, p in self._sharded().items() if p.requires_grad and n in owned}

    @staticmethod
    def _local(tensor: Any) -> torch.Tensor:
        local: torch.Tensor = tensor.to_local().detach().reshape(-1)
        return local

    # -- gradients -----------------------------------------------------------------------------

    def grads(self) -> dict[str, torch.Tensor]:
        """My shards of the gradients, live views."""
        self._reshard()
        mine = {n: self._local(p.grad) for n, p in self._sharded().items() if p.grad is not None}
        return {n: v for n, v in mine.items() if len(v)}

    def _grads_or_zeros(self) -> dict[str, torch.Tensor]:
        self._reshard()
        for p in self._sharded().values():
            if p.requires_grad and p.grad is None:
                p.grad = torch.zeros_like(p)
        return self.grads()

    def add_grad_(self, slices: Mapping[str, torch.Tensor]) -> None:
        """Add my slices to mine of the gradients. Local."""
        for name, grad in self._grads_or_zeros().items():
            if name in slices:
                grad.add_(slices[name].to(grad.device))

    def add_full_grads_(self, grads: Mapping[str, torch.Tensor], owners: Mapping[str, int]) -> None:
        """Broadcast each rank's tensors, a bucket at a time; add what is mine. Collective."""
        held = self._grads_or_zeros()

        def add(name: str, values: torch.Tensor) -> None:
            if name in held:
                start = self._start(name)
                part = values[start : start + len(held[name])]
                held[name].add_(part.to(held[name].device))

        dtypes = dict.fromkeys(self._names, torch.float32)
        sizes = {name: shape.numel() for name, shape in self._shapes.items()}
        deliver(self._runtime, dtypes, sizes, grads, owners, add)

    def _start(self, name: str) -> int:
        """Return where my shard begins in the parameter's memory."""
        row = self._shapes[name].numel() // max(1, self._shapes[name][0])
        start: int = row * min(int(self._runtime.rank) * self._rows[name], self._shapes[name][0])
        return start

    def scale_grads_(self, factor: torch.Tensor) -> None:
        """Multiply my shards of the gradients. Local."""
        for grad in self.grads().values():
            grad.mul_(factor.to(grad.device))

    @contextmanager
    def squares(self) -> Iterator[None]:
        """Square gradients on their way to the average: hooks on the gathered parameters."""
        handles = []
        for unit in self._units:
            unit.unshard()
            own: Any = unit._get_fsdp_state()._fsdp_param_group
            for p in own.fsdp_params if own is not None else ():
                if p.unsharded_param.requires_grad:
                    handles.append(p.unsharded_param.register_hook(torch.square))
            unit.reshard()
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    # -- whole tensors -------------------------------------------------------------------------

    def reduce_owned(self, full: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Sum over ranks, tensor by tensor; keep my shards. Collective."""
        lengths = {name: len(view) for name, view in self.owned().items()}
        mine: dict[str, torch.Tensor] = {}
        for name, tensor in full.items():
            if name in self._buffers:
                mine |= self._rest.reduce({name: tensor})
                continue
            total = self._runtime.all_reduce(tensor.reshape(-1).clone())
            if name in lengths:
                start = self._start(name)
                mine[name] = total[start : start + lengths[name]].clone()
        return mine

    def gather(self, name: str) -> torch.Tensor:
        """Gather one parameter from its owners. Collective."""
        if name in self._buffers:
            return self._buffers[name].detach().clone()
        shape = self._shapes[name]
        mine = self.owned().get(name, torch.empty(0)).to(self._runtime.device)
        each = self._rows[name] * (shape.numel() // max(1, shape[0]))
        return self._runtime.all_gather(mine, shape.numel(), each).clone().view(shape)

    def sync_buffers(self) -> None:
        """Average floating-point buffers; others (counters) take the largest. Collective."""
        average_buffers(self._runtime, self._buffers)

    # -- other weights -------------------------------------------------------------------------

    @contextmanager
    def swapped(self, slices: dict[str, torch.Tensor]) -> Iterator[None]:
        """Exchange the shards with ``slices``, and back, while nothing is gathered. Collective."""
        buffers = self._rest.copies()  # each rank's own

        def restore(raised: bool) -> None:
            if raised:  # a forward may have been cut short
                self._units[0].reset_iter_state()  # of the root
            self._exchange(slices)
            self._rest.put_back(buffers)

        self._exchange(slices)
        self._rest.put(slices)
        with restoring(self._runtime, restore):
            yield

    def inference(self) -> AbstractContextManager[object]:
        """``torch.no_grad``: what is gathered first is used by every later forward. Local."""
        return torch.no_grad()

    def _exchange(self, slices: dict[str, torch.Tensor]) -> None:
        with torch.inference_mode(False), torch.no_grad():
            self._reshard()
            for name, parameter in self._sharded().items():
                shard = self._local(parameter)
                if len(shard):
                    held = shard.to(slices[name].device, copy=True)
                    shard.copy_(slices[name])
                    slices[name].copy_(held)
