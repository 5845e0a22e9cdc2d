"""ZeRO-1 and ZeRO-2: whole weights on every rank; DeepSpeed cuts gradients and optimizer state.

DeepSpeed lays the trainable parameters of a group end to end in one flat buffer and gives each rank
an equal range of it, in float32, to its optimizer. Those ranges are the owned slices here: a
regularizer's gradient is added where it is needed, without communication. Frozen parameters and
buffers are cut as under DDP.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from distcl.distributed.runtime import Runtime
from distcl.parallel import deepspeed_state
from distcl.parallel.ddp import Replicated
from distcl.parallel.deepspeed_state import Place, read_flat_state, write_flat_state
from distcl.parallel.flat_shards import (
    Cut,
    Whole,
    cut_by_dtype,
    deliver,
    persistent_buffers,
    restoring,
)
from distcl.parallel.partition import Fetch, OptimizerState

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


class Zero12(Replicated):
    """The partition of a DeepSpeed engine of stage 1 or 2. See ``base.Partition``."""

    def __init__(self, runtime: Runtime, engine: DeepSpeedEngine) -> None:
        module = runtime.unwrap(engine)
        self._runtime = runtime
        self._zero: Any = engine.optimizer
        self._parameters = dict(module.named_parameters())
        self._buffers = persistent_buffers(module)
        names = {id(p): name for name, p in self._parameters.items()}
        self._place: dict[str, Place] = {}
        cuts: list[Cut] = []
        for i, (parameters, buffer) in enumerate(deepspeed_state.groups(self._zero)):
            starts = {
                names[id(p)]: int(p.storage_offset() - buffer.storage_offset()) for p in parameters
            }
            sizes = {names[id(p)]: p.numel() for p in parameters}
            each = buffer.numel() // runtime.world_size
            cut = Cut(runtime, buffer.dtype, sizes, starts, each)
            for name, (a, b) in cut.mine.items():
                at = starts[name] + a - runtime.rank * each
                self._place[name] = (i, at, at + b - a)
            cuts.append(cut)
        trained = {name for cut in cuts for name in cut.names}
        self._trained = Whole({n: p for n, p in self._parameters.items() if n in trained}, cuts)
        frozen = {n: p for n, p in self._parameters.items() if n not in trained}
        self._frozen = Whole(frozen, cut_by_dtype(runtime, frozen))
        self._rest = Whole(self._buffers, cut_by_dtype(runtime, self._buffers))

    def owned(self) -> dict[str, torch.Tensor]:
        """My slices, of the float32 master weights where there are any."""
        masters = deepspeed_state.masters(self._zero)
        trained = {n: masters[i][a:b] for n, (i, a, b) in self._place.items()}
        mine = {**trained, **self._frozen.owned()}
        ordered = {name: mine[name] for name in self._parameters if name in mine}
        return {**ordered, **self._rest.owned()}

    def ranges(self) -> dict[str, tuple[int, int]]:
        """Where in each tensor my slice lies."""
        return {**self._trained.ranges(), **self._frozen.ranges(), **self._rest.ranges()}

    def load(self, fetch: Fetch) -> None:
        """Replace weights, masters and buffers. Local."""
        for whole in (self._trained, self._frozen, self._rest):
            whole.load(fetch)
        masters = deepspeed_state.masters(self._zero)
        for name, (start, stop) in self._trained.ranges().items():
            group, a, b = self._place[name]
            masters[group][a:b] = fetch(name, start, stop).to(masters[group])

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> OptimizerState:
        """My slices of what the optimizer keeps for the masters. Local."""
        flats = deepspeed_state.master_parameters(self._zero)
        return read_flat_state(optimizer, flats, self._place)

    def load_optimizer_state(
        self,
        optimizer: torch.optim.Optimizer,
        fetch: Mapping[str, Fetch],
        plain: Mapping[str, Mapping[str, torch.Tensor]],
    ) -> None:
        """Restore what the optimizer keeps for the masters. Local."""
        flats = deepspeed_state.master_parameters(self._zero)
        ranges = self._trained.ranges()
        write_flat_state(optimizer, flats, self._place, ranges, fetch, plain)

    def trainable(self) -> dict[str, torch.Tensor]:
        """My slices of the master weights."""
        return {name: view for name, view in self.owned().items() if name in self._place}

    def grads(self) -> dict[str, torch.Tensor]:
        """My slices of the gradients as the optimizer will get them."""
        return {
            name: deepspeed_state.gradient(self._zero, self._parameters[name], place)
            for name, place in self._place.items()
        }

    def add_grad_(self, slices: Mapping[str, torch.Tensor]) -> None:
        """Add my slices to mine of the gradients. Local."""
        for name, grad in self.grads().items():
            if name in slices:
                grad.add_(slices[name].to(grad.device))

    def add_full_grads_(self, grads: Mapping[str, torch.Tensor], owners: Mapping[str, int]) -> None:
        """Broadcast each rank's tensors, a bucket at a time; add what is mine. Collective."""
        held = self.grads()
        ranges = {n: ab for cut in self._trained.cuts for n, ab in cut.mine.items()}

        def add(name: str, values: torch.Tensor) -> None:
            if name in held:
                held[name].add_(values[slice(*ranges[name])].to(held[name].device))

        dtypes = dict.fromkeys(self._parameters, torch.float32)
        sizes = {name: p.numel() for name, p in self._parameters.items()}
        deliver(self._runtime, dtypes, sizes, grads, owners, add)

    def scale_grads_(self, factor: torch.Tensor) -> None:
        """Multiply my slices of the gradients. Local."""
        for grad in self.grads().values():
            grad.mul_(factor.to(grad.device))

    @contextmanager
    def swapped(self, slices: dict[str, torch.Tensor]) -> Iterator[None]:
        """Spread ``slices`` over the weights; back, spread the master weights. Collective.

        The masters are the truth: after every step the weights are made from them.
        """
        frozen = {name: slices[name] for name in self._frozen.owned()}
        buffers = self._rest.copies()

        def restore(raised: bool) -> None:
            self._trained.put(self.trainable())
            self._frozen.exchange(frozen)
            self._rest.put_back(buffers)

        self._trained.put(slices)
        self._frozen.exchange(frozen)
        self._rest.put(slices)
        with restoring(self._runtime, restore):
            yield

    def reduce_owned(self, full: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Sum over ranks, bucket by bucket; keep my slices. Collective."""
        mine = self._trained.reduce(full) | self._frozen.reduce(full)
        return {**mine, **self._rest.reduce(full)}

    def gather(self, name: str) -> torch.Tensor:
        """Return the weights, whole here; from the masters where there are any. Collective."""
        tensor = (self._buffers if name in self._buffers else self._parameters)[name].detach()
        for cut in self._trained.cuts:
            if name in cut.names and tensor.dtype != torch.float32:
                mine = self.trainable().get(name)
                whole = torch.zeros(tensor.numel(), dtype=torch.float32, device=tensor.device)
                if mine is not None:
                    whole[slice(*cut.mine[name])] = mine.to(tensor.device)
                return self._runtime.all_reduce(whole).view(tensor.shape)
        return tensor.clone()
