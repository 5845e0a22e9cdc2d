"""ZeRO-3: DeepSpeed gives every rank one contiguous shard of each parameter.

A shard has ceil(numel / W) elements; what the last ranks' shards have beyond the parameter's end is
padding and holds anything. Parameters up to a size stay gathered between forwards (*residents*);
others may too, as DeepSpeed's reuse distance has it. So shards are exchanged between two releases
of everything that is gathered: otherwise a forward computes with the weights of before, or training
goes on with those of the anchor. Buffers lie whole on every rank and are cut as under DDP.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from operator import itemgetter
from typing import TYPE_CHECKING, Any

import torch
from deepspeed.runtime.zero import parameter_offload

from distcl.distributed.runtime import Runtime
from distcl.parallel.flat_shards import BUCKET_ELEMENTS
from distcl.parallel.gradients import squaring
from distcl.parallel.partition import EqualShards
from distcl.parallel.sliced_state import Fetch, Stepped
from distcl.parallel.zero12 import Place

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


class Zero3(EqualShards):
    """The partition of a DeepSpeed engine of stage 3. Collective to make.

    Half-precision weights have float32 masters in the optimizer: those are what is owned.
    """

    def __init__(self, runtime: Runtime, engine: DeepSpeedEngine) -> None:
        module, zero = engine.module, engine.optimizer
        each = {name: int(p.partition_numel()) for name, p in module.named_parameters()}
        super().__init__(runtime, module, each)
        self._zero: Any = zero
        self._names = {id(p): name for name, p in self._parameters.items()}
        self._place: dict[str, Place] = {}
        for group, parameters in enumerate(self._zero.fp16_groups):
            at = 0
            for p in parameters:
                name = self._names[id(p)]
                start, stop = self._spans.get(name, (0, 0))
                self._place[name] = (group, at, at + stop - start)
                at += each[name]
        self._gather_residents()

    # -- what is mine --------------------------------------------------------------------------

    def _slice(self, name: str) -> torch.Tensor:
        """My shard without padding, of the float32 master where there is one."""
        master = self._master(name)
        return self._shard(name) if master is None else master

    def load(self, fetch: Fetch) -> None:
        """Replace shards, masters and buffers, then gather residents. Collective."""
        with torch.no_grad():
            self._zero.empty_partition_cache()
            for name, span in self._shards.items():
                values, master = fetch(name, *span), self._master(name)
                self._shard(name).copy_(values)
                if master is not None:
                    master.copy_(values)
            self._gather_residents()
        self._rest.load(fetch)

    def _stepped(self) -> dict[str, Stepped]:
        flats = self._zero.fp32_partitioned_groups_flat
        return {
            name: Stepped(flats[i], itemgetter(slice(a, b)), self._spans[name][0])
            for name, (i, a, b) in self._place.items()
            if name in self._spans
        }

    def _shard(self, name: str) -> torch.Tensor:
        """Return what forwards gather, without padding."""
        start, stop = self._shards.get(name, (0, 0))
        shard: torch.Tensor = self._parameters[name].ds_tensor.detach()
        return shard[: stop - start]

    def _master(self, name: str) -> torch.Tensor | None:
        """Return the float32 master of a half-precision shard, or of one that is offloaded."""
        if name not in self._place:
            return None
        group, start, stop = self._place[name]
        flat: torch.Tensor = self._zero.fp32_partitioned_groups_flat[group].detach()
        return flat[start:stop]

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
                if name in self._spans:
                    start, stop = self._spans[name]
                    found[name] = part.view(-1)[: stop - start]
        return found

    def squares(self) -> AbstractContextManager[None]:
        """Square gradients on their way to the average: hooks on the gathered parameters."""
        return squaring(self._trained.values())

    # -- other weights -------------------------------------------------------------------------

    @contextmanager
    def swapped(self, slices: dict[str, torch.Tensor]) -> Iterator[None]:
        """Exchange the shards with ``slices``, between releases. Collective."""
        depth = len(parameter_offload.FWD_MODULE_STACK)
        with super().swapped(slices):
            try:
                yield
            finally:
                del parameter_offload.FWD_MODULE_STACK[depth:]  # what an exception left there

    def _exchange(self, slices: dict[str, torch.Tensor], back: bool) -> None:
        with torch.inference_mode(False), torch.no_grad():
            self._zero.empty_partition_cache()
            for name in self._spans:
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
