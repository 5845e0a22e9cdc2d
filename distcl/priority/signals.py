"""What a sample's priority is made of. A signal is a class with ``score``; see PrioritySignal."""

from __future__ import annotations

import torch

from distcl.types import Batch, Outputs


class LossDelta:
    """The published signal: how much a sample's loss rose since theta_star.

    score_i = clamp(L(w_now, x_i) - L(theta_star, x_i), min=1e-8)
    """

    needs_anchor = True
    needs_logits = False

    def score(self, batch: Batch, now: Outputs, anchor: Outputs | None) -> torch.Tensor:
        """Return scores [B]; ``anchor`` holds theta_star's losses."""
        if anchor is None:
            raise ValueError("loss_delta needs the losses of theta_star")
        return (now.loss - anchor.loss).clamp(min=1e-8)
