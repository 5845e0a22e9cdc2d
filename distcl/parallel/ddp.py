"""Whole weights, gradients and optimizer state on every rank (DDP), or one process alone."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_leaves

from distcl.config import ParallelConfig, RunConfig, TrainingConfig
from distcl.distributed.runtime import Runtime
from distcl.errors import UsageError
from distcl.parallel.flat_shards import Whole, cut_by_dtype, deliver, flattened
from distcl.parallel.partition import Partition
from distcl.parallel.sliced_state import Fetch, Stepped
from distcl.parallel.strategy import MakeOptimizer, Strategy, trainable
from distcl.types import PyTree

_MIXED = {"fp32": "no", "fp64": "no", "bf16": "bf16", "fp16": "fp16"}


class DDP(Strategy):
    """``ddp``: under bf16 and fp16, float32 weights and torch's autocast.

    A parameter that a forward does not use gets no gradient, and DDP waits for it unless it looks
    for such ones at each step. It does so where :func:`always_uses_all` does not hold, where
    ``unused`` says so, or as ``parallel.find_unused_parameters`` has it.
    """

    def __init__(self, run: RunConfig, parallel: ParallelConfig, training: TrainingConfig) -> None:
        super().__init__(run, parallel, training)
        self._branches = False
        self.accelerator = Accelerator(
            cpu=not torch.cuda.is_available(),
            mixed_precision=_MIXED[run.precision],
            kwargs_handlers=[
                InitProcessGroupKwargs(timeout=self.timeout),
                DistributedDataParallelKwargs(broadcast_buffers=False),
            ],
        )

    def prepare(
        self, model: nn.Module, make_optimizer: MakeOptimizer | None, unused: Collection[str] = ()
    ) -> tuple[nn.Module, torch.optim.Optimizer | None]:
        """See the base class."""
        dtype = torch.float64 if self.precision == "fp64" else torch.float32
        model = model.to(self.accelerator.device, dtype)
        search = self.parallel.find_unused_parameters
        if search == "auto":
            search = bool(unused) or not always_uses_all(model)
        elif unused and not search and self.accelerator.num_processes > 1:
            raise UsageError(
                "parallel.find_unused_parameters = false, but there are forwards in which no "
                f"gradient reaches {', '.join(unused)}; set it to 'auto' or true"
            )
        self.accelerator.ddp_handler.find_unused_parameters = search
        self._branches = bool(search)
        with warnings.catch_warnings():  # accelerate has no word for DDP's newer option yet
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated")
            model = self.accelerator.prepare(model)
        if make_optimizer is None:
            return model, None
        optimizer = make_optimizer(trainable(model))
        if self.precision == "fp16":  # otherwise a wrapper only costs time at each step
            optimizer = self.accelerator.prepare(optimizer)
        return model, optimizer

    def settle(self, model: nn.Module, x: PyTree) -> None:
        """See the base class: DDP lays its gradient buckets anew after the first backward.

        Their layout decides in which order a ring of three ranks or more adds up. So it is settled
        here, before the first step, in a new run and in one that goes on alike. Where unused
        parameters are looked for it never changes.
        """
        if isinstance(model, DistributedDataParallel) and not model.find_unused_parameters:
            sums = [t.sum() for t in tree_leaves(model(x)) if t.requires_grad]
            torch.stack(sums).sum().backward()  # type: ignore[no-untyped-call]
            model.zero_grad(set_to_none=True)

    @contextmanager
    def only_used(
        self,
        model: nn.Module,
        stands_in: Callable[[], bool],
        all_reduce: Callable[..., torch.Tensor],
    ) -> Iterator[None]:
        """See the base class: only models that may branch are looked at."""
        if not self._branches:
            yield
            return
        parameters = trainable(model)
        used = torch.zeros(len(parameters), dtype=torch.int32)

        def noting(k: int) -> Callable[[torch.Tensor], None]:
            def note(_: torch.Tensor) -> None:
                used[k] |= not stands_in()

            return note

        handles = [
            p.register_hook(noting(k))  # type: ignore[no-untyped-call]
            for k, p in enumerate(parameters)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
        used = all_reduce(used.to(self.accelerator.device), "max").cpu()
        for parameter, by_any in zip(parameters, used.tolist(), strict=True):
            if not by_any:
                parameter.grad = None

    def unwrap(self, model: nn.Module) -> nn.Module:
        """See the base class."""
        return model.module if isinstance(model, DistributedDataParallel) else model

    def autocast(self) -> AbstractContextManager[Any]:
        """See the base class."""
        if self.precision in ("bf16", "fp16"):
            dtype = torch.bfloat16 if self.precision == "bf16" else torch.float16
            return torch.autocast(self.accelerator.device.type, dtype=dtype)
        return nullcontext()

    def backward(self, loss: torch.Tensor) -> None:
        """See the base class."""
        if self.precision == "fp16":
            self.accelerator.backward(loss)
        else:
            loss.backward()  # type: ignore[no-untyped-call]

    def accumulating(self, model: nn.Module, last: bool) -> AbstractContextManager[Any]:
        """See the base class."""
        if isinstance(model, DistributedDataParallel) and not last:
            return model.no_sync()
        return nullcontext()

    def unscale(self, optimizer: torch.optim.Optimizer) -> None:
        """See the base class."""
        if self.precision == "fp16":
            self.accelerator.unscale_gradients(optimizer)

    def partition(self, runtime: Runtime, model: nn.Module) -> Replicated:
        """See the base class."""
        return Replicated(runtime, self.unwrap(model))


def always_uses_all(model: nn.Module) -> bool:
    """Tell whether each forward surely uses the same parameters, whatever the data. Local.

    So it is where all modules are torch's, distcl's own, or adapters: those of others may branch.
    """
    own = ("torch.nn.modules.", "distcl.models", "peft.tuners.lora.")
    return all(type(module).__module__.startswith(own) for module in model.modules())


class Replicated(Partition):
    """Whole weights on every rank (DDP, a plain process); each owns 1/W of them."""

    def __init__(self, runtime: Runtime, module: nn.Module) -> None:
        super().__init__(runtime, module)
        self._whole = Whole(self._trained, cut_by_dtype(runtime, self._trained))
        self._spans = self._whole.ranges()

    def _slices(self) -> dict[str, torch.Tensor]:
        return self._whole.owned()

    def _exchange(self, slices: dict[str, torch.Tensor], back: bool) -> None:
        self._whole.exchange(slices)

    def load(self, fetch: Fetch) -> None:
        """Replace every weight and buffer. Local."""
        for whole in (self._whole, Whole(self._frozen, []), self._rest):
            whole.load(fetch)

    def _stepped(self) -> dict[str, Stepped]:
        return {n: Stepped(p, partial(flattened, n), 0) for n, p in self._trained.items()}

    def grads(self) -> dict[str, torch.Tensor]:
        """My slices of the gradients, live views."""
        return {
            name: _flat_grad(name, parameter)[slice(*self._spans[name])]
            for name, parameter in self._trained.items()
            if name in self._spans and parameter.grad is not None
        }

    def add_grad_(self, slices: Mapping[str, torch.Tensor]) -> None:
        """Add my slices, gathered from all ranks, to the gradients. Collective."""
        grads: dict[str, torch.Tensor] = {}
        for name, parameter in self._trained.items():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            grads[name] = _flat_grad(name, parameter)
        if self._runtime.world_size == 1:  # slices are whole
            for name in slices:
                if name in grads:
                    grads[name] += slices[name]
            return

        def add(name: str, a: int, b: int, values: torch.Tensor) -> None:
            if name in grads:
                grads[name][a:b] += values

        def take(name: str, a: int, b: int) -> torch.Tensor | None:
            return slices[name][a:b] if name in slices else None

        for cut in self._whole.cuts:
            cut.spread(take, add)

    def add_full_grads_(self, grads: Mapping[str, torch.Tensor], owners: Mapping[str, int]) -> None:
        """Broadcast each rank's tensors, a bucket at a time, and add them. Collective."""

        def add(name: str, values: torch.Tensor) -> None:
            parameter = self._parameters[name]
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            parameter.grad += values.view(parameter.shape)

        sizes = {name: p.numel() for name, p in self._parameters.items()}
        deliver(self._runtime, sizes, grads, owners, add)

    def scale_grads_(self, factor: torch.Tensor) -> None:
        """Multiply every gradient. Local."""
        for parameter in self._parameters.values():
            if parameter.grad is not None:
                parameter.grad.mul_(factor)

    def reduce_owned(self, full: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Sum over ranks, bucket by bucket; keep my slices. Collective."""
        return {**self._whole.reduce(full), **self._rest.reduce(full)}

    def gather(self, name: str) -> torch.Tensor:
        """Weights are whole here: a copy. Local."""
        held = self._buffers if name in self._buffers else self._parameters
        return held[name].detach().clone()


def _flat_grad(name: str, parameter: nn.Parameter) -> torch.Tensor:
    """Return the gradient as a live 1-D view in the order of the parameter's memory."""
    assert parameter.grad is not None
    if parameter.grad.stride() != parameter.stride():
        parameter.grad = torch.empty_like(parameter).copy_(parameter.grad)
    return flattened(name, parameter.grad)
