"""Averaged gradient episodic memory (A-GEM; Chaudhry et al. 2019)."""

from __future__ import annotations

import torch

from distcl.types import Batch
from distcl.updaters.base import Updater
from distcl.updaters.step import StepResult


class AGEM(Updater):
    """``agem``: a step never raises, to first order, the mean loss over the history batch.

    g: gradient of the current batch's mean loss; g_ref: of the history batch's. Where g·g_ref < 0,
    g <- g - (g·g_ref / g_ref·g_ref) g_ref  (eq. 11). Without history: a plain step.

    Between the two backward passes each rank keeps its slices of g_ref, 1/W. The host reads the two
    dot products, so that only steps with a projection send g_ref around.
    """

    uses_hist_batch = True

    def fwd_bwd(self, batch: Batch, hist_batch: Batch | None) -> StepResult:
        """Forward and backward on the history batch, then on the current one. Collective."""
        if hist_batch is None:
            return super().fwd_bwd(batch, None)
        self.backward(self.losses(hist_batch), hist_batch)
        reference = {name: g.clone() for name, g in self.partition.grads().items()}
        self.setup.optimizer.zero_grad(set_to_none=True)
        result = super().fwd_bwd(batch, None)

        grads = self.partition.grads()
        dots = torch.stack([self._dot(grads, reference), self._dot(reference, reference)])
        along, square = self.runtime.all_reduce(dots).tolist()
        if along < 0:
            self.partition.add_grad_({n: ref * (-along / square) for n, ref in reference.items()})
        return result

    def passes(self, batch: int, history: int) -> list[int]:
        """See the base class: the history batch goes first, whole."""
        return [history, *super().passes(batch, 0)]

    def _dot(self, a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return the dot product of my slices, summed in float64. Absent names mean zeros."""
        total = torch.zeros((), dtype=torch.float64, device=self.runtime.device)
        for name in a:
            if name in b:
                total += torch.sum(a[name] * b[name], dtype=torch.float64)
        return total
