"""Robust steps: the gradient where the loss, to first order, rises most steeply.

ℓ_i(w, x_i) is the loss of sample i. The Jacobian-vector product (JVP) of a loss with a direction v
is its slope along v, Dℓ·v = d/dt ℓ(· + t·v) at t = 0.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from distcl.errors import ConfigError
from distcl.types import Batch, PyTree
from distcl.updaters.base import Updater
from distcl.updaters.step import StepResult, UpdaterSetup


class JVPReg(Updater):
    """``jvp_reg``: the gradient at weights and inputs moved uphill, applied at the weights.

    L(w, X) = mean of ℓ over the current batch + mean of ℓ over the history batch (if there is one).
    With ρ_w = ``jvp_rho_theta`` and ρ_x = ``jvp_rho_x``, the step's gradient is

        ∇_w L(w + ε, X + δ),  ε = ρ_w ∇_w L/‖∇_w L‖₂,  δ_i = ρ_x ∇_x ℓ_i/‖∇_x ℓ_i‖₂

    with ε and δ held constant. ε: sharpness-aware minimization (Foret et al. 2021, eq. 2 and 3),
    one norm over all weights. δ_i: one norm over a sample's floating-point inputs; with
    ``jvp_data_sign`` δ_i = ρ_x sign(∇_x ℓ_i) (Goodfellow et al. 2015, section 4).

    To first order L(w + ε, X + δ) = L + DL·(ε, δ): the loss plus its JVP along the steepest
    direction, ρ_w ‖∇_w L‖₂ + ρ_x Σ_i c_i ‖∇_x ℓ_i‖₂ (c_i = 1/batch size; the sign's norm is ‖·‖₁).

    Two forward and backward passes, each over both batches at once; one if ρ_w = ρ_x = 0. Buffers
    (BatchNorm statistics) are those of the first; dropout masks are drawn for each.
    """

    uses_hist_batch = True

    def __init__(self, setup: UpdaterSetup) -> None:
        super().__init__(setup)
        self._moved: list[tuple[Batch, torch.Tensor]] = []  # parts of both batches, their weights

    def fwd_bwd(self, batch: Batch, hist_batch: Batch | None) -> StepResult:
        """See the class. The losses returned are those of both batches, at w. Collective.

        Raises ConfigError if ``jvp_rho_x`` > 0 and x has no floating-point tensor.
        """
        rho_theta, rho_x = self.config.jvp_rho_theta, self.config.jvp_rho_x
        self._moved = []
        result = self.accumulated(self._part, batch, hist_batch)
        if not (rho_theta or rho_x):
            return result
        uphill = self._uphill_weights() if rho_theta else None
        self.setup.optimizer.zero_grad(set_to_none=True)
        moved = self.partition.swapped(uphill) if uphill is not None else nullcontext()
        with buffers_kept(self.runtime.strategy.unwrap(self.model)), moved:
            self.accumulated(self._moved_part, batch)
        return result

    def passes(self, batch: int, history: int) -> list[int]:
        """See the base class: each part is of both batches."""
        return self.joined_passes(batch, history)

    def _part(self, batch: Batch, hist_batch: Batch | None) -> StepResult:
        """First pass: the gradient at w; keep the inputs, moved, for the second one."""
        both = batch if hist_batch is None else batch.joined(hist_batch)
        weights = torch.ones(len(both), dtype=self.runtime.dtype, device=self.runtime.device)
        if hist_batch is not None:  # so that the mean over both is the sum of the two means
            weights[: len(batch)] = both.total / batch.total
            weights[len(batch) :] = both.total / hist_batch.total
        inputs: list[torch.Tensor] = []
        if self.config.jvp_rho_x:
            inputs = [x.detach().requires_grad_() for x in floating(both.x, "jvp_rho_x")]
            both = replace(both, x=with_floating(both.x, inputs))
        losses = self.losses(both)
        self.backward(losses * weights, both)
        if inputs:
            both = replace(both, x=with_floating(both.x, self._uphill_inputs(inputs)))
        self._moved.append((both, weights))
        return StepResult(losses.detach(), both.ids, both.total)

    def _moved_part(self, batch: Batch, hist_batch: Batch | None) -> StepResult:
        """Second pass, on what the first one kept."""
        both, weights = self._moved.pop(0)
        losses = self._unreduced_criterion(self.forward(both), both.y)
        self.backward(losses * weights, both)
        return StepResult(losses.detach(), both.ids, both.total)

    def _uphill_inputs(self, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        """Return x + δ. Their gradients are c_i ∇_x ℓ_i; c_i > 0 cancels, as a loss scale does."""
        grads = [torch.zeros_like(x) if x.grad is None else x.grad for x in inputs]
        steps = [g.sign() for g in grads] if self.config.jvp_data_sign else normalized(grads)
        rho = self.config.jvp_rho_x
        return [x.detach() + rho * step for x, step in zip(inputs, steps, strict=True)]

    def _uphill_weights(self) -> dict[str, torch.Tensor]:
        """Return my slices of w + ε, from the gradient as it is. Collective.

        A loss scale (fp16) in the gradient cancels.
        """
        grads = self.partition.grads()
        square = torch.zeros((), dtype=torch.float64, device=self.runtime.device)
        for g in grads.values():
            square += torch.linalg.vector_norm(g, dtype=torch.float64).square()
        norm = self.runtime.all_reduce(square).sqrt()
        vanished = norm < torch.finfo(self.runtime.dtype).tiny
        scale = torch.where(vanished, 0.0, self.config.jvp_rho_theta / norm).to(self.runtime.dtype)
        return {
            name: torch.addcmul(w, grads[name], scale.to(w.device)) if name in grads else w.clone()
            for name, w in self.partition.owned().items()
        }


def floating(x: PyTree, key: str) -> list[torch.Tensor]:
    """Return the floating-point tensors of x; ConfigError naming ``key`` if there is none."""
    found = [t for t in tree_leaves(x) if _is_floating(t)]
    if not found:
        kinds = ", ".join(sorted({str(getattr(t, "dtype", type(t))) for t in tree_leaves(x)}))
        raise ConfigError(
            f"continual_learning.{key} > 0 needs floating-point inputs, but this stream has "
            f"{kinds}; set {key} = 0"
        )
    return found


def with_floating(x: PyTree, leaves: list[torch.Tensor]) -> PyTree:
    """Return x with its floating-point tensors replaced, in order."""
    rest = iter(leaves)
    return tree_map(lambda t: next(rest) if _is_floating(t) else t, x)


def _is_floating(leaf: object) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.is_floating_point()


def normalized(vectors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Scale each sample's vector, held by all the tensors [B, ...] together, to L2 norm 1.

    In float64, so that tiny gradients do not underflow; a vector of zeros stays zero.
    """
    norms = [
        torch.linalg.vector_norm(v.unsqueeze(-1).flatten(1), dim=1, dtype=torch.float64)
        for v in vectors
    ]
    norm = torch.linalg.vector_norm(torch.stack(norms), dim=0)
    scale = torch.where(norm > 0, 1 / norm, 0.0)
    return [(v * scale.view(len(v), *[1] * (v.ndim - 1))).to(v.dtype) for v in vectors]


@contextmanager
def buffers_kept(module: nn.Module) -> Iterator[None]:
    """Put the module's buffers back at the end, also when the body raises. Local.

    Those that the body replaces by other tensors, or sets to None, too.
    """
    kept = [
        (owner, name, buffer, buffer.clone())
        for owner in module.modules()
        for name, buffer in owner.named_buffers(recurse=False)
    ]
    try:
        yield
    finally:
        with torch.no_grad():
            for owner, name, buffer, value in kept:
                owner._buffers[name] = buffer.copy_(value)
