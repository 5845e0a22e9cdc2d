"""The optimizer, its learning rate within a round, and its reset between rounds."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn

from distcl.config import OptimizerConfig
from distcl.errors import ConfigError


def create_optimizer(
    config: OptimizerConfig, params: Iterable[nn.Parameter]
) -> torch.optim.Optimizer:
    """Return the optimizer of the configuration over ``params``. Local.

    Raises ConfigError for a momentum that the optimizer would not use.
    """
    fused = config.fused or None  # None: torch decides
    if config.name == "sgd":
        return torch.optim.SGD(
            params,
            lr=config.lr,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
            fused=fused,
        )
    if config.momentum:
        raise ConfigError(
            f"optimizer.momentum = {config.momentum} is for sgd; {config.name} has its own"
        )
    kind = torch.optim.Adam if config.name == "adam" else torch.optim.AdamW
    return kind(params, lr=config.lr, weight_decay=config.weight_decay, fused=fused)


def warmup_factor(step: int, warmup_steps: int) -> float:
    """Return what to multiply the learning rate by at ``step`` (from 0) of a round.

    Linear from 1/warmup_steps to 1, which it reaches at the last of ``warmup_steps`` steps.
    """
    return min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0


def decay_factor(kind: str, step: int, steps: int) -> float:
    """Return what to multiply the learning rate by at ``step`` (from 0) of a round of ``steps``.

    linear: 1 - step/steps. cosine: (1 + cos(π step/steps))/2 (Loshchilov & Hutter 2017, eq. 5).
    Both begin at 1 and never reach 0. none: 1.
    """
    share = step / steps
    if kind == "linear":
        return 1.0 - share
    return (1.0 + math.cos(math.pi * share)) / 2 if kind == "cosine" else 1.0


def reset(optimizer: torch.optim.Optimizer) -> None:
    """Drop momenta, moments and step counts: as if it had never stepped; options stay. Local."""
    optimizer.state.clear()


def place_steps(optimizer: torch.optim.Optimizer) -> None:
    """Move loaded step counts to where torch keeps them: fused kernels count on the device. Local.

    As ``Optimizer.load_state_dict`` does; other kernels count on the CPU.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"] if group.get("fused") else ():
            state = optimizer.state.get(parameter, {})
            if "step" in state:
                state["step"] = state["step"].to(parameter.device)
