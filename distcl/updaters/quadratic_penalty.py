"""The gradient of a quadratic penalty around theta_star, for EWC and synaptic intelligence."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from distcl.updaters.base import Updater


def add_pull(
    updater: Updater, curvature: Mapping[str, torch.Tensor], scale: float, step: str
) -> None:
    """Add c_i (w_i - w*_i) to the gradient of my slices, w* = theta_star. Collective.

    ``curvature``: name -> k >= 0, 1-D, for every name of ``Partition.trainable``; the penalty is
    scale/2 · sum_i k_i (w_i - w*_i)². ``step`` explicit: c = scale·k, its gradient; diverges where
    lr·scale·k > 2. damped: c = scale·k/(1 + lr·scale·k), for SGD the proximal (implicit) step of
    the same penalty, stable at any scale. Call it between backward and the optimizer's step.
    """
    weights = updater.partition.trainable()
    pull: tuple[torch.Tensor, ...] = ()
    if weights:  # a rank may own nothing that is trained
        anchors = [updater.theta_star[name].to(w.device) for name, w in weights.items()]
        with torch.no_grad():
            pull = torch._foreach_sub(list(weights.values()), anchors)
            k = torch._foreach_mul([curvature[name] for name in weights], scale)
            if step == "damped":
                damping = torch._foreach_mul(k, updater.setup.optimizer.param_groups[0]["lr"])
                torch._foreach_add_(damping, 1)
                torch._foreach_div_(k, damping)
            torch._foreach_mul_(pull, k)
    updater.partition.add_grad_(dict(zip(weights, pull, strict=True)))
