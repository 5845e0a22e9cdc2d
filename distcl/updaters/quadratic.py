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
    lr = updater.setup.optimizer.param_groups[0]["lr"]
    pull: dict[str, torch.Tensor] = {}
    with torch.no_grad():
        for name, w in updater.partition.trainable().items():
            k = scale * curvature[name]
            if step == "damped":
                k = k / (1 + lr * k)
            pull[name] = k * (w - updater.theta_star[name].to(w.device))
    updater.partition.add_grad_(pull)
