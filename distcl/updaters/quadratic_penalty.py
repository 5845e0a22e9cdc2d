"""The gradient of a quadratic penalty around theta_star, for EWC and synaptic intelligence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

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
                rates = learning_rates(updater.setup.optimizer, list(weights))
                damping = torch._foreach_mul(k, rates[0] if len(set(rates)) == 1 else rates)
                torch._foreach_add_(damping, 1)
                torch._foreach_div_(k, damping)
            torch._foreach_mul_(pull, k)
    updater.partition.add_grad_(dict(zip(weights, pull, strict=True)))


def learning_rates(optimizer: torch.optim.Optimizer, names: Sequence[str]) -> list[float]:
    """Return the learning rates as they are now, of the parameters ``names``, in order. Local."""
    groups = optimizer.param_groups
    if "names" not in groups[0]:  # a single group, of all
        return [float(groups[0]["lr"])] * len(names)
    rates = {name: float(group["lr"]) for group in groups for name in group["names"]}
    return [rates[name] for name in names]
