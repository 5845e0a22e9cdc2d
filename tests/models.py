"""Models for tests, with everything that makes partitioning hard."""

from __future__ import annotations

import torch
from torch import nn


class Awkward(nn.Module):
    """Tied weights, BatchNorm (float and integer buffers), odd sizes, a frozen layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(7, 11)
        self.frozen = nn.Linear(11, 11).requires_grad_(False)
        self.norm = nn.BatchNorm1d(11)
        self.tied = nn.Linear(11, 11)
        self.tied.weight = self.frozen.weight
        self.head = nn.Linear(11, 3)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.register_buffer("flag", torch.tensor([True, False, True]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.relu(self.norm(self.frozen(self.first(x))))
        return self.head(self.tied(h)) * self.scale


def awkward(seed: int = 0) -> Awkward:
    torch.manual_seed(seed)
    model = Awkward()
    model.norm.running_mean.normal_()
    model.norm.running_var.uniform_(0.5, 2)
    return model


def frozen_names(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if not p.requires_grad}


class Tangled(nn.Module):
    """Trained tied weights, a frozen layer, a norm, sizes that no number of ranks divides."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.first = nn.Linear(7, 11)
        self.norm = norm
        self.left = nn.Linear(11, 11)
        self.frozen = nn.Linear(11, 11).requires_grad_(False)
        self.right = nn.Linear(11, 11, bias=False)
        self.right.weight = self.left.weight
        self.head = nn.Linear(11, 3)
        self.scale = nn.Parameter(torch.tensor([1.5]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.tanh(self.norm(self.left(self.first(x))))
        return self.head(self.right(self.frozen(h))) * self.scale


def tangled(seed: int = 0, batchnorm: bool = True) -> Tangled:
    torch.manual_seed(seed)
    if not batchnorm:
        return Tangled(nn.LayerNorm(11))
    model = Tangled(nn.BatchNorm1d(11))
    model.norm.running_mean.normal_()
    model.norm.running_var.uniform_(0.5, 2)
    return model


def tangled_anchor(batchnorm: bool = True) -> Tangled:
    """The model that computes when ``tangled(0)`` is given what changes of ``tangled(1)``."""
    model = tangled(1, batchnorm)
    model.frozen.load_state_dict(tangled(0, batchnorm).frozen.state_dict())
    return model
