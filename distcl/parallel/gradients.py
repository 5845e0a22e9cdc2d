"""The global mean gradient, each rank its slices, between backward and the optimizer's step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch

from distcl.distributed.runtime import Runtime
from distcl.parallel.flat_shards import deliver

Slices = Mapping[str, torch.Tensor]
"""Name -> 1-D tensor: the part of each parameter or buffer that this rank owns."""


class OwnedGradients(ABC):
    """What a partition knows of gradients. ``_spans``: where in each parameter my slice lies."""

    _runtime: Runtime
    _shapes: dict[str, torch.Size]
    _spans: dict[str, tuple[int, int]]

    @abstractmethod
    def grads(self) -> dict[str, torch.Tensor]:
        """Return my slices of the global mean gradient, 1-D live views, after backward. Local.

        Names as in ``trainable``, less parameters that have no gradient.
        """

    def _addable(self) -> dict[str, torch.Tensor]:
        """Return :meth:`grads`, with zeros where there are none yet. Local."""
        return self.grads()

    def add_grad_(self, slices: Slices) -> None:
        """Add to the global mean gradient, each rank for its own slices. Collective.

        Call it after backward and before the optimizer's step, on every rank. Where a loss scale
        (fp16) is in the gradients, it must be in ``slices``.
        """
        for name, grad in self._addable().items():
            if name in slices:
                grad.add_(slices[name].to(grad.device))

    def add_full_grads_(self, grads: Mapping[str, torch.Tensor], owners: Mapping[str, int]) -> None:
        """Add to the global mean gradient, whole parameters at a time, each from one rank.

        ``owners``: parameter name -> the rank that gives its tensor; the same on every rank.
        ``grads``: the tensors that this rank gives, in the parameters' own shapes. Collective; call
        it after backward and before the optimizer's step, on every rank.
        """
        held = self._addable()

        def add(name: str, values: torch.Tensor) -> None:
            if name in held:
                held[name].add_(values[slice(*self._spans[name])].to(held[name].device))

        sizes = {name: shape.numel() for name, shape in self._shapes.items()}
        deliver(self._runtime, sizes, grads, owners, add)

    def scale_grads_(self, factor: torch.Tensor) -> None:
        """Multiply the global mean gradient by a scalar, the same on every rank. Local."""
        for grad in self.grads().values():
            grad.mul_(factor.to(grad.device))


def clip_grads_(partition: OwnedGradients, runtime: Runtime, max_norm: float) -> None:
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
