"""Who owns which slice of the weights: what every layout offers, and what most of them share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import nn

from distcl.distributed.runtime import Runtime
from distcl.models.freezing import stays_in_eval_mode
from distcl.models.weights import Spec, tensor_spec
from distcl.parallel.flat_shards import (
    Whole,
    average_buffers,
    cut_by_dtype,
    persistent_buffers,
    restoring,
)
from distcl.parallel.gradients import OwnedGradients, Slices
from distcl.parallel.sliced_state import Fetch, SteppedParameters


class Partition(OwnedGradients, SteppedParameters):
    """Who owns which slice of the weights: every element that can change is owned by one rank.

    *Frozen* parameters, which take no gradients when it is made, are nobody's: no one may change
    them, and anchors, statistics and the optimizer know nothing of them. They are saved, loaded and
    gathered with the others.

    "Buffers" are the persistent ones, everywhere: others (``register_buffer(persistent=False)``)
    are nobody's, and stay as the model's constructor made them. They lie whole on every rank, which
    owns parts of them.

    A layout sets ``_spans`` (name -> [start, stop) of my slice of each parameter in ``_trained``)
    and says in which slices it lives (``_slices``) and how they are exchanged (``_exchange``).
    """

    sharded = False
    """Whether parameters are gathered for every forward: then forwards are collective, all ranks
    run equally many, and ``torch.func`` cannot be used on the module."""
    inference: Callable[[], AbstractContextManager[object]] = torch.inference_mode
    """Makes the context for forwards without gradient; enter it inside :meth:`swapped`. Local.

    ``torch.inference_mode`` would leave inference tensors behind where weights are gathered."""

    def __init__(self, runtime: Runtime, module: nn.Module) -> None:
        self._runtime = runtime
        self._parameters: dict[str, Any] = dict(module.named_parameters())
        self._trained = {n: p for n, p in self._parameters.items() if p.requires_grad}
        self._frozen = {n: p for n, p in self._parameters.items() if n not in self._trained}
        self._shapes: dict[str, torch.Size] = {
            name: getattr(p, "ds_shape", p.shape) for name, p in self._parameters.items()
        }  # DeepSpeed's: those of gathered parameters
        self._buffers = persistent_buffers(module)
        still = {
            id(buffer)
            for part in module.modules()
            if stays_in_eval_mode(part)
            for buffer in part.buffers(recurse=False)
        }
        self._moving = {n: b for n, b in self._buffers.items() if id(b) not in still}
        self._rest = Whole(self._buffers, cut_by_dtype(runtime, self._buffers))
        self._spans: dict[str, tuple[int, int]] = {}

    @abstractmethod
    def _slices(self) -> dict[str, torch.Tensor]:
        """Return my slices of trained parameters, live views, in the model's order. Local."""

    @abstractmethod
    def _exchange(self, slices: dict[str, torch.Tensor], back: bool) -> None:
        """Exchange the parameters with ``slices``; ``back``: the second time. Collective."""

    def owned(self) -> dict[str, torch.Tensor]:
        """Return my slice of each trained parameter and buffer, 1-D live views to read. Local.

        Names of which this rank owns nothing are absent. Tied parameters appear once. Where an
        optimizer keeps float32 master weights, these are the slices of those.
        """
        return {**self._slices(), **self._rest.owned()}

    def trainable(self) -> dict[str, torch.Tensor]:
        """Return those of :meth:`owned` that are parameters. Local."""
        return self._slices()

    def placed(self, slices: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return slices of :meth:`owned`, read from a file, where those are. Local."""
        mine = self.owned()
        return {name: values.to(mine[name].device) for name, values in slices.items()}

    def moving(self) -> dict[str, torch.Tensor]:
        """Return the floating-point buffers that change in training, whole, live. Local."""
        return {n: b for n, b in self._moving.items() if b.is_floating_point()}

    def ranges(self) -> dict[str, tuple[int, int]]:
        """Return where in each tensor my slice lies, [start, stop) of its elements. Local."""
        return {**self._spans, **self._rest.ranges()}

    def specs(self) -> dict[str, Spec]:
        """Return what each parameter and buffer is as a whole, the same on every rank. Local."""
        shapes: Mapping[str, torch.Size] = self._shapes if self.sharded else {}
        whole = {n: tensor_spec(p, shapes.get(n)) for n, p in self._parameters.items()}
        return whole | {n: tensor_spec(b) for n, b in self._buffers.items()}

    @abstractmethod
    def load(self, fetch: Fetch) -> None:
        """Replace weights and buffers by saved ones, each rank what it needs. Collective."""

    @abstractmethod
    def reduce_owned(self, full: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Sum full-size tensors over ranks and return my slices of the sums. Collective.

        Frozen parameters are passed over.
        """

    @contextmanager
    def swapped(self, slices: dict[str, torch.Tensor]) -> Iterator[None]:
        """Compute with other weights inside the context, in place. Collective.

        ``slices`` has the names and shapes of :meth:`owned`; leave it alone while inside, where it
        may hold the current weights. Both are put back exactly, also when the body raises. An
        exception must leave the body on all ranks, or the run must end.
        """
        buffers = self._rest.copies()  # each rank's own: they differ where it saw other samples

        def restore() -> None:
            self._exchange(slices, back=True)
            self._rest.put_back(buffers)

        self._exchange(slices, back=False)
        self._rest.put(slices)
        with restoring(self._runtime, restore):
            yield

    def put(self, slices: Slices) -> None:
        """Replace weights for good, each rank its slices; absent names stay. Collective."""
        mine = self._slices()
        with torch.no_grad():
            for name, values in slices.items():
                mine[name].copy_(values)
        self._exchange(mine, back=False)

    @abstractmethod
    def gather(self, name: str) -> torch.Tensor:
        """Return one full parameter or buffer, in its own shape (a copy). Collective."""

    def sync_buffers(self) -> None:
        """Average floating-point buffers over ranks (BatchNorm statistics). Collective.

        Others (counters) take the largest. Those of norms that are frozen are left alone: an
        average of equal numbers may differ from them by a last bit.
        """
        average_buffers(self._runtime, self._moving)


def create_partition(runtime: Runtime, model: nn.Module) -> Partition:
    """Return the partition of a model that ``runtime`` prepared. Local, but for ZeRO-3."""
    return runtime.strategy.partition(runtime, model)


class EqualShards(Partition):
    """Parameters of which rank r holds elements [r·each, (r+1)·each), as far as there are any.

    ``each``: by name. They are gathered for every forward: what is gathered in one without gradient
    may be used by a later one with, so it must be no inference tensor.
    """

    sharded = True
    inference = torch.no_grad

    def __init__(self, runtime: Runtime, module: nn.Module, each: Mapping[str, int]) -> None:
        super().__init__(runtime, module)
        self._each = each
        self._shards: dict[str, tuple[int, int]] = {}
        """Where my shard of each parameter lies, of frozen ones too."""
        for name, shape in self._shapes.items():
            start = runtime.rank * each[name]
            stop = min(start + each[name], shape.numel())
            if start < stop:
                self._shards[name] = start, stop
        self._spans = {n: span for n, span in self._shards.items() if n in self._trained}

    @abstractmethod
    def _slice(self, name: str) -> torch.Tensor:
        """Return my shard of one parameter, 1-D, a live view; empty if there is none. Local."""

    def _slices(self) -> dict[str, torch.Tensor]:
        return {name: self._slice(name) for name in self._spans}

    @abstractmethod
    def squares(self) -> AbstractContextManager[None]:
        """Square each rank's own gradient before it is averaged, inside the context. Local.

        See ``updaters.fisher``.
        """

    def reduce_owned(self, full: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Sum over ranks, tensor by tensor; keep my shards. Collective."""
        mine: dict[str, torch.Tensor] = {}
        for name, tensor in full.items():
            if name in self._buffers:
                mine |= self._rest.reduce({name: tensor})
            if name not in self._trained:
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
