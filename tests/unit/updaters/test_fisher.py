"""Squared per-sample gradients from what layers see, against one backward per sample."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from distcl.types import Batch
from distcl.updaters.fisher import known_layers, squared_gradients

SAMPLES = 6


class Standardized(nn.Module):
    """Inputs less the mean of the batch: samples see each other."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x - x.mean(dim=0)


class Positions(nn.Module):
    """As many positions as samples, and they come first."""

    def __init__(self) -> None:
        super().__init__()
        self.each = nn.Linear(2, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.each(x.view(-1, SAMPLES, 2).transpose(0, 1)).tanh().mean(dim=0)


class Reordered(nn.Module):
    """Rows are of other samples than they look."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(12, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x.flip(0)).flip(0)


class Penalized(nn.Module):
    """Uses the weight of its layer once more, on its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(12, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) + x @ self.layer.weight.T.tanh()


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(12, 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(self.layer(x).relu())[:, :5]


class Doubled(nn.Linear):
    """Has a forward of its own."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(2 * x)


class Partly(nn.Module):
    """A layer that is not used, one that has no effect, one that is frozen but for its bias."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Linear(3, 3)
        self.silent = nn.Linear(12, 2)
        self.frozen = nn.Linear(12, 5)
        self.frozen.weight.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.silent(x)
        return self.frozen(input=x)


def tied() -> nn.Module:
    first, second = nn.Linear(12, 12), nn.Linear(12, 12)
    second.weight = first.weight
    return nn.Sequential(first, nn.ReLU(), second)


def with_used_statistics() -> nn.Module:
    norm = nn.BatchNorm1d(7)
    norm(torch.randn(50, 7) * 3 + 1)
    return nn.Sequential(nn.Linear(12, 7, bias=False), norm, nn.Linear(7, 5))


def _layers() -> dict[str, nn.Module]:
    """Return models whose layers tell all."""
    return {
        "perceptron": nn.Sequential(nn.Linear(12, 7), nn.ReLU(inplace=True), nn.Linear(7, 5)),
        "layer norm": nn.Sequential(nn.Linear(12, 7), nn.LayerNorm(7), nn.GELU(), nn.Linear(7, 5)),
        "batch norm": with_used_statistics(),
        "dropout": nn.Sequential(nn.Dropout(0.5), nn.Linear(12, 5)),
        "only a layer": nn.Linear(12, 5),
        "partly": Partly(),
    }


def _others() -> dict[str, nn.Module]:
    """Return models of which a layer's input and output are not enough."""
    batch_norm = nn.BatchNorm1d(12, track_running_stats=False)
    return {
        "positions": Positions(),
        "reordered": Reordered(),
        "used elsewhere": Penalized(),
        "used twice": Twice(),
        "own forward": Doubled(12, 5),
        "tied": tied(),
        "parametrized": nn.utils.parametrizations.weight_norm(nn.Linear(12, 5)),
        "mean of the batch": nn.Sequential(nn.Linear(12, 5), Standardized()),
        "norm of the batch": nn.Sequential(batch_norm, nn.Linear(12, 5)),
        "convolution": nn.Sequential(nn.Unflatten(1, (3, 4)), nn.Conv1d(3, 5, 4), nn.Flatten()),
    }


def _found(model: nn.Module) -> dict[str, torch.Tensor] | None:
    model.double().eval()
    criterion = nn.CrossEntropyLoss(reduction="none")
    layers = known_layers(model)
    if layers is None:
        return None
    return squared_gradients(model, layers, criterion, _batch(), torch.float64)


def _batch() -> Batch:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(SAMPLES, 12, dtype=torch.float64, generator=generator)
    return Batch(torch.arange(SAMPLES), x, torch.arange(SAMPLES) % 5)


@pytest.mark.parametrize("name", _layers())
def test_squares_are_those_of_one_backward_per_sample(name: str) -> None:
    torch.manual_seed(0)
    model = _layers()[name]
    found, batch = _found(model), _batch()
    assert found is not None
    dense = {n: torch.zeros_like(p) for n, p in model.named_parameters() if p.requires_grad}
    for x, y in zip(batch.x, batch.y, strict=True):
        model.zero_grad()
        nn.functional.cross_entropy(model(x[None]), y[None]).backward()
        for n, total in dense.items():
            gradient = model.get_parameter(n).grad
            total += 0 if gradient is None else gradient**2
    assert found.keys() == dense.keys()
    for n, total in dense.items():
        torch.testing.assert_close(found[n], total)
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("name", _others())
def test_what_layers_do_not_tell_is_noticed(name: str) -> None:
    torch.manual_seed(0)
    assert _found(_others()[name]) is None
