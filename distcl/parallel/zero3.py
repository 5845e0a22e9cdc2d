"""ZeRO-3: DeepSpeed gives every rank one contiguous shard of each parameter.

A shard has ceil(numel / W) elements; what the last ranks' shards have beyond the parameter's end is
padding and holds anything. Parameters up to a size stay gathered between forwards (*residents*);
others may too, as DeepSpeed's reuse distance has it. So shards are exchanged between two releases
of everything that is gathered: otherwise a forward computes with the weights of before, or training
goes on with those of the anchor. Buffers lie whole on every rank and are cut as under DDP.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from deepspeed.runtime.zero import parameter_offload

from distcl.distributed.runtime import Runtime
from distcl.parallel.deepspeed_state import Place, read_flat_state, write_flat_state
from distcl.parallel.flat_shards import (
    BUCKET_ELEMENTS,
    Whole,
    average_buffers,
    cut_by_dtype,
    deliver,
    persistent_buffers,
    restoring,
)
from distcl.parallel.partition import Fetch, OptimizerState
from distcl.weights import Spec, spec_of

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


class Zero3:
    """The partition of a DeepSpeed engine of stage 3. See ``base.Partition``. Collective to make.

    Half-precision weights have float32 masters in the optimizer: those are what is owned.
    """

    sharded = True

    def __init__(self, runtime: Runtime, engine: DeepSpeedEngine) -> None:
        self._runtime = runtime
        self._zero: Any = engine.optimizer
        module = runtime.unwrap(engine)
        self._parameters: dict[str, Any] = dict(module.named_parameters())
        self._buffers = persistent_buffers(module)
        self._rest = Whole(self._buffers, cut_by_dtype(runtime, self._buffers))
        self._valid: dict[str, int] = {}
        for name, p in self._parameters.items():
            shard = p.partition_numel()
            self._valid[name] = max(0, min(p.ds_numel - runtime.rank * shard, shard))
        self._place: dict[str, tuple[int, int]] = {}  # name -> sub-group, start in it
        self._names = {id(p): name for name, p in self._parameters.items()}
        for group, parameters in enumerate(self._zero.fp16_groups):
            at = 0
            for p in parameters:
                self._place[self._names[id(p)]] = (group, at)
                at += p.partition_numel()
        self._gather_residents()

    # -- what is mine --------------------------------------------------------------------------

    def owned(self) -> dict[str, torch.Tensor]:
        """My shards without padding, of the float32 masters where there are any; buffers."""
        mine: dict[str, torch.Tensor] = {}
        for name, valid in self._valid.items():
            if valid:
                master = self._master(name)
                mine[name] = self._shard(name) if master is None else master
        return {**mine, **self._rest.owned()}

    def ranges(self) -> dict[str, tuple[int, int]]:
        """Where in each tensor my slice lies."""
        mine: dict[str, tuple[int, int]] = {}
        for name, valid in self._valid.items():
            start = int(self._runtime.rank) * self._parameters[name].partition_numel()
            if valid:
                mine[name] = (start, start + valid)
        return {**mine, **self._rest.ranges()}

    def specs(self) -> dict[str, Spec]:
        """What each tensor is as a whole."""
        whole = {n: spec_of(p, p.ds_shape) for n, p in self._parameters.items()}
        return whole | {n: spec_of(b) for n, b in self._buffers.items()}

    def load(self, fetch: Fetch) -> None:
        """Replace shards, masters and buffers, then gather residents. Collective."""
        with torch.no_grad():
            self._zero.empty_partition_cache()
            for name, (start, stop) in self.ranges().items():
                if name in self._valid:
                    values, master = fetch(name, start, stop), self._master(name)
                    self._shard(name).copy_(values)
                    if master is not None:
                        master.copy_(values)
            self._gather_residents()
        self._rest.load(fetch)

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> OptimizerState:
        """My shards of what the optimizer keeps for the masters. Local."""
        return read_flat_state(optimizer, self._zero.fp32_partitioned_groups_flat, self._places())

    def load_optimizer_state(
        self,
        optimizer: torch.optim.Optimizer,
        fetch: Mapping[str, Fetch],
        plain: Mapping[str, Mapping[str, torch.Tensor]],
    ) -> None:
        """Restore what the optimizer keeps for the masters. Local."""
        flats = self._zero.fp32_partitioned_groups_flat
        write_flat_state(optimizer, flats, self._places(), self.ranges(), fetch, plain)

    def _places(self) -> dict[str, Place]:
        return {
            name: (group, start, start + self._valid[name])
            for name, (group, start) in self._place.items()
            if self._valid[name]
        }

    def trainable(self) -> dict[str, torch.Tensor]:
        """My shards of the parameters that take gradients."""
        return {name: view for name, view in self.owned().items() if name in self._place}

    def _shard(self, name: str) -> torch.Tensor:
        """Return what forwards gather, without padding."""
        shard: torch.Tensor = self._parameters[name].ds_tensor.detach()
        return shard[: self._valid[name]]

    def _master(self, name: str) -> torch.Tensor | None:
        """Return the float32 master of a half-precision shard, or of one that is offloaded."""
        if name not in self._place:
            return None
        group, start = self._place[name]
        flat: torch.Tensor = self._zero.fp32_partitioned_groups_flat[group].detach()
        return flat[start : start + self._valid[name]]

    # -- gradients -----------------------------------------------------------------------------

    def grads(self) -> dict[str, torch.Tensor]:
        """My shards of the gradients as the optimizer will get them."""
        found: dict[str, torch.Tensor] = {}
        for group, parameters in enumerate(self._zero.fp16_groups):
            if self._zero.offload_optimizer:
                flat = self._zero.fp32_partitioned_groups_flat[group].grad
                parts = torch.split(flat, [p.partition_numel() for p in parameters])
            else:
                parts = self._zero.averaged_gradients[group]
            for p, part in zip(parameters, parts, strict=True):
                name = self._names[id(p)]
                found[name] = part.view(-1)[: self._valid[name]]
        return {name: found[name] for name in self._place if self._valid[name]}

    def add_grad_(self, slices: Mapping[str, torch.Tensor]) -> None:
        """Add my slices to mine of the gradients. Local."""
        for name, grad in self.grads().items():
            if name in slices:
                grad.add_(slices[name].to(grad.device))

    def add_full_grads_(self, grads: Mapping[str, torch.Tensor], owners: Mapping[str, int]) -> None:
        """Broadcast each rank's tensors, a bucket at a time; add what is mine. Collective."""
        held = self.grads()

        def add(name: str, values: torch.Tensor) -> None:
            if name in held:
                start = self._runtime.rank * self._parameters[name].partition_numel()
                part = values[start : start + self._valid[name]]
                held[name].add_(part.to(held[name].device))

        dtypes = dict.fromkeys(self._parameters, torch.float32)
        sizes = {name: int(p.ds_numel) for name, p in self._parameters.items()}
        deliver(self._runtime, dtypes, sizes, grads, owners, add)

    def scale_grads_(self, factor: torch.Tensor) -> None:
        """Multiply my shards of the gradients. Local."""
        for grad in self.grads().values():
            grad.mul_(factor.to(grad.device))

    @contextmanager
    def squares(self) -> Iterator[None]:
        """Square gradients on their way to the average: hooks on the gathered parameters."""
        handles = [
            p.register_hook(torch.square) for p in self._parameters.values() if p.requires_grad
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    # -- whole tensors -------------------------------------------------------------------------

    def reduce_owned(self, full: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Sum over ranks, tensor by tensor; keep my shards. Collective."""
        mine: dict[str, torch.Tensor] = {}
        for name, tensor in full.items():
            if name in self._buffers:
                mine |= self._rest.reduce({name: tensor})
                continue
            total = self._runtime.all_reduce(tensor.reshape(-1).clone())
            if self._valid[name]:
                start = self._runtime.rank * self._parameters[name].partition_numel()
                mine[name] = total[start : start + self._valid[name]].clone()
        return mine

    def gather(self, name: str) -> torch.Tensor:
        """Gather one parameter from its owners. Collective."""
        if name in self._buffers:
            return self._buffers[name].detach().clone()
        p, mine = self._parameters[name], self.owned().get(name)
        dtype = self._shard(name).dtype if name not in self._place else torch.float32
        empty = torch.empty(0, dtype=dtype, device=self._runtime.device)
        part = empty if mine is None else mine.to(self._runtime.device)
        whole = self._runtime.all_gather(part, p.ds_numel, p.partition_numel())
        return whole.clone().view(p.ds_shape)

    def sync_buffers(self) -> None:
        """Average floating-point buffers; others (counters) take the largest. Collective."""
        average_buffers(self._runtime, self._buffers)

    # -- other weights -------------------------------------------------------------------------

    @contextmanager
    def swapped(self, slices: dict[str, torch.Tensor]) -> Iterator[None]:
        """Exchange the shards with ``slices``, between releases. Collective."""
        buffers = self._rest.copies()  # each rank's own
        depth = len(parameter_offload.FWD_MODULE_STACK)

        def restore(raised: bool) -> None:
            del parameter_offload.FWD_MODULE_STACK[depth:]  # what an exception left there
            self._exchange(slices, back=True)
            self._rest.put_back(buffers)

        self._exchange(slices, back=False)
        self._rest.put(slices)
        with restoring(self._runtime, restore):
            yield

    def inference(self) -> AbstractContextManager[object]:
        """``torch.no_grad``: what is gathered may be used by a training forward. Local."""
        return torch.no_grad()

    def _exchange(self, slices: dict[str, torch.Tensor], back: bool) -> None:
        with torch.inference_mode(False), torch.no_grad():
            self._zero.empty_partition_cache()
            for name, valid in self._valid.items():
                if not valid:
                    continue
                shard, other, master = self._shard(name), slices[name], self._master(name)
                if master is None or master.data_ptr() == shard.data_ptr():
                    held = shard.to(other.device, copy=True)
                    shard.copy_(other)
                    other.copy_(held)
                else:  # weights are made from their masters after every step; so they are here
                    shard.copy_(master if back else other)
            self._gather_residents()

    def _gather_residents(self) -> None:
        """Gather the parameters that stay gathered, some at a time. Collective."""
        batch: list[Any] = []
        for p in [*self._zero.persistent_parameters, None]:
            full = sum(q.ds_numel for q in batch) >= BUCKET_ELEMENTS
            if batch and (p is None or full):
                batch[0].all_gather(batch)
                batch = []
            if p is not None:
                batch.append(p)
