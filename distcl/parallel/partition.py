"""What every layout of the weights offers, and what most of them share."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from distcl.distributed.runtime import Runtime
from distcl.parallel.flat_shards import (
    Whole,
    average_buffers,
    cut_by_dtype,
    deliver,
    persistent_buffers,
    restoring,
)
from distcl.weights import Spec, tensor_spec

Slices = Mapping[str, torch.Tensor]
"""Name -> 1-D tensor: the part of each parameter or buffer that this rank owns."""

Fetch = Callable[[str, int, int], torch.Tensor]
"""(name, start, stop) -> those elements of a saved tensor, 1-D, on the CPU."""

PlainState = Mapping[str, Mapping[str, torch.Tensor]]
"""Parameter -> state key ("step") -> what does not have the parameter's shape."""


@dataclass(frozen=True, slots=True)
class OptimizerState:
    """An optimizer's state by name of parameter, of any layout.

    slices: state key ("exp_avg") -> this rank's slices; plain: see :data:`PlainState`.
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
    inference: Callable[[], AbstractContextManager[object]]
    """Makes the context for forwards without gradient; enter it inside :meth:`swapped`. Local.

    ``torch.inference_mode`` would leave inference tensors behind where weights are gathered."""

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
        self, optimizer: torch.optim.Optimizer, fetch: Mapping[str, Fetch], plain: PlainState
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

    def gather(self, name: str) -> torch.Tensor:
        """Return one full parameter or buffer, in its own shape (a copy). Collective."""
        ...

    def sync_buffers(self) -> None:
        """Average floating-point buffers over ranks (BatchNorm statistics). Collective."""
        ...


def create_partition(runtime: Runtime, model: nn.Module) -> Partition:
    """Return the partition of a model that ``runtime`` prepared. Local, but for ZeRO-3."""
    return runtime.strategy.partition(runtime, model)


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


class BasePartition(Partition):
    """What the layouts share: buffers lie whole on every rank; each owns parts of them, as of DDP.

    A layout sets ``_spans`` (name -> [start, stop) of my slice of each parameter) and says in which
    slices it lives (``_slices``) and how they are exchanged (``_exchange``).
    """

    sharded = False
    inference: Callable[[], AbstractContextManager[object]] = torch.inference_mode

    def __init__(self, runtime: Runtime, module: nn.Module) -> None:
        self._runtime = runtime
        self._parameters: dict[str, Any] = dict(module.named_parameters())
        self._shapes: dict[str, torch.Size] = {
            name: getattr(p, "ds_shape", p.shape) for name, p in self._parameters.items()
        }  # DeepSpeed's: those of gathered parameters
        self._buffers = persistent_buffers(module)
        self._rest = Whole(self._buffers, cut_by_dtype(runtime, self._buffers))
        self._spans: dict[str, tuple[int, int]] = {}

    def _slices(self) -> dict[str, torch.Tensor]:
        """Return my slices of the parameters, live views, in the order of the model. Local."""
        raise NotImplementedError

    def _exchange(self, slices: dict[str, torch.Tensor], back: bool) -> None:
        """Exchange the parameters with ``slices``; ``back``: the second time. Collective."""
        raise NotImplementedError

    def _recover(self) -> None:
        """Forget a forward that an exception has cut short, on all ranks. Local."""

    def _addable(self) -> dict[str, torch.Tensor]:
        """Return :meth:`grads`, with zeros where there are none yet. Local."""
        return self.grads()

    def owned(self) -> dict[str, torch.Tensor]:
        """My slices, live views."""
        return {**self._slices(), **self._rest.owned()}

    def trainable(self) -> dict[str, torch.Tensor]:
        """My slices of the parameters that take gradients, live views."""
        return {n: v for n, v in self._slices().items() if self._parameters[n].requires_grad}

    def ranges(self) -> dict[str, tuple[int, int]]:
        """Where in each tensor my slice lies."""
        return {**self._spans, **self._rest.ranges()}

    def specs(self) -> dict[str, Spec]:
        """What each tensor is as a whole."""
        shapes: Mapping[str, torch.Size] = self._shapes if self.sharded else {}
        whole = {n: tensor_spec(p, shapes.get(n)) for n, p in self._parameters.items()}
        return whole | {n: tensor_spec(b) for n, b in self._buffers.items()}

    def add_grad_(self, slices: Slices) -> None:
        """Add my slices to mine of the gradients. Local."""
        for name, grad in self._addable().items():
            if name in slices:
                grad.add_(slices[name].to(grad.device))

    def add_full_grads_(self, grads: Mapping[str, torch.Tensor], owners: Mapping[str, int]) -> None:
        """Broadcast each rank's tensors, a bucket at a time; add what is mine. Collective."""
        held = self._addable()

        def add(name: str, values: torch.Tensor) -> None:
            if name in held:
                held[name].add_(values[slice(*self._spans[name])].to(held[name].device))

        dtypes = dict.fromkeys(self._shapes, torch.float32)
        sizes = {name: shape.numel() for name, shape in self._shapes.items()}
        deliver(self._runtime, dtypes, sizes, grads, owners, add)

    def scale_grads_(self, factor: torch.Tensor) -> None:
        """Multiply my slices of the gradients. Local."""
        for grad in self.grads().values():
            grad.mul_(factor.to(grad.device))

    @contextmanager
    def swapped(self, slices: dict[str, torch.Tensor]) -> Iterator[None]:
        """Exchange the weights with ``slices``, and back. Collective."""
        buffers = self._rest.copies()  # each rank's own: they differ where it saw other samples

        def restore(raised: bool) -> None:
            if raised:
                self._recover()
            self._exchange(slices, back=True)
            self._rest.put_back(buffers)

        self._exchange(slices, back=False)
        self._rest.put(slices)
        with restoring(self._runtime, restore):
            yield

    def sync_buffers(self) -> None:
        """Average floating-point buffers; others (counters) take the largest. Collective."""
        average_buffers(self._runtime, self._buffers)


class EqualShards(BasePartition):
    """Parameters of which rank r holds elements [r·each, (r+1)·each), as far as there are any.

    ``each``: by name. They are gathered for every forward: what is gathered in one without gradient
    may be used by a later one with, so it must be no inference tensor.
    """

    sharded = True
    inference = torch.no_grad

    def __init__(self, runtime: Runtime, module: nn.Module, each: Mapping[str, int]) -> None:
        super().__init__(runtime, module)
        self._each = each
        for name, shape in self._shapes.items():
            start = runtime.rank * each[name]
            stop = min(start + each[name], shape.numel())
            if start < stop:
                self._spans[name] = start, stop

    def _slice(self, name: str) -> torch.Tensor:
        """Return my slice of one parameter, 1-D, a live view; empty if there is none. Local."""
        raise NotImplementedError

    def _slices(self) -> dict[str, torch.Tensor]:
        return {name: self._slice(name) for name in self._spans}

    def squares(self) -> AbstractContextManager[None]:
        """Square each rank's own gradient before it is averaged, inside the context. Local.

        See ``updaters.fisher``.
        """
        raise NotImplementedError

    def reduce_owned(self, full: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Sum over ranks, tensor by tensor; keep my shards. Collective."""
        mine: dict[str, torch.Tensor] = {}
        for name, tensor in full.items():
            if name in self._buffers:
                mine |= self._rest.reduce({name: tensor})
                continue
            total = self._runtime.all_reduce(tensor.reshape(-1).clone())
            if name in self._spans:
                mine[name] = total[slice(*self._spans[name])].clone()
        return mine

    def gather(self, name: str) -> torch.Tensor:
        """Gather one parameter from its owners. Collective."""
        if name in self._buffers:
            return self._buffers[name].detach().clone()
        mine, shape = self._slice(name).to(self._runtime.device), self._shapes[name]
        return self._runtime.all_gather(mine, shape.numel(), self._each[name]).clone().view(shape)


def read_state(
    optimizer: torch.optim.Optimizer,
    held: Mapping[str, torch.Tensor],
    own: Callable[[str, torch.Tensor], torch.Tensor],
    names: Container[str],
) -> OptimizerState:
    """Return the state of an optimizer by parameter. Local.

    ``held``: parameter -> the tensor that the optimizer steps for it; ``own(name, value)`` cuts my
    slice out of a state of that tensor's shape, for the ``names`` of which there is one.
    """
    found = OptimizerState({}, {})
    for name, tensor in held.items():
        if tensor not in optimizer.state:
            continue
        plain = found.plain.setdefault(name, {})
        for key, value in optimizer.state[tensor].items():
            if value is None:
                continue
            value = value if isinstance(value, torch.Tensor) else torch.as_tensor(value)
            if value.shape != tensor.shape or value.dim() == 0:
                plain[key] = value
            elif name in names:
                found.slices.setdefault(key, {})[name] = own(name, value)
    return found


@contextmanager
def squaring(parameters: Iterable[torch.Tensor]) -> Iterator[None]:
    """Square the gradients of gathered parameters on their way to the average, inside. Local."""
    handles = [
        p.register_hook(torch.square)  # type: ignore[no-untyped-call]
        for p in parameters
        if p.requires_grad
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
