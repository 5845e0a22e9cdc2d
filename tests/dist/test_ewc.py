"""Online EWC on real ranks against the dense formula, in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from distcl.data.stream import create_stream
from distcl.training.build import assemble
from distcl.data.loader import as_source
from distcl.models import create_model
from distcl.parallel.partition import create_partition
from distcl.distributed.runtime import Runtime
from distcl.types import DataSpec
from distcl.updaters.fisher import diagonal_fisher
from tests.small import execute, small
from tests.spawn import run_ranks

LAMBDA, DECAY, LR = 50.0, 0.6, 0.2
KEYS = (
    "run.precision=fp64",
    "continual_learning.update_mode=ewc_online",
    f"continual_learning.ewc_lambda={LAMBDA}",
    f"continual_learning.ewc_ema_decay={DECAY}",
)


def _penalty(step: str, fisher: str, out: Path) -> dict[str, Any]:
    """Commit on two experiences, move the weights, and return the penalty's gradient."""
    keys = (f"continual_learning.penalty_step={step}", f"continual_learning.ewc_fisher={fisher}")
    config = small(*KEYS, *keys)
    runtime = Runtime(config.run, config.parallel)
    stream = create_stream(config.stream, config.run.seed)
    parts = assemble(config, runtime, stream, out)
    for experience in stream.experiences[:2]:
        parts.updater.cl_postprocessing(stream, experience.train)
    module = runtime.strategy.unwrap(parts.model)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(1.3)
    parts.updater.update_post_fwd_bwd()
    return {
        "grad": {n: p.grad.numpy() for n, p in module.named_parameters()},
        "held": sum(v.numel() for v in parts.updater.fisher.values()),
    }


def _dense(step: str, new_share: float) -> dict[str, np.ndarray]:
    """c·(w - w*), F of the two experiences sample by sample: mean of squared gradients."""
    config = small(*KEYS)
    stream = create_stream(config.stream, config.run.seed)
    model = create_model(config.model, stream.spec, config.run.seed).double()
    fishers = []
    for experience in stream.experiences[:2]:
        batch = stream.read(experience.train)
        total = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
        for x, y in zip(batch.x.double(), batch.y, strict=True):
            model.zero_grad()
            nn.functional.cross_entropy(model(x[None]), y[None]).backward()
            for n, p in model.named_parameters():
                total[n] += p.grad**2 / len(batch)
        fishers.append(total)
    result = {}
    for n, p in model.named_parameters():
        c = LAMBDA * (DECAY * fishers[0][n] + new_share * fishers[1][n])
        c = c / (1 + LR * c) if step == "damped" else c
        result[n] = (c * (1.3 * p - p)).detach().numpy()
    return result


@pytest.mark.parametrize(
    ("step", "fisher", "world"),
    [("damped", "mean", 2), ("explicit", "sum", 2), ("damped", "sum", 3), ("damped", "mean", 1)],
)
def test_the_penalty_equals_the_dense_formula_and_fisher_is_cut_over_ranks(
    step: str, fisher: str, world: int, tmp_path: Path
) -> None:
    expected = _dense(step, 1 - DECAY if fisher == "mean" else 1.0)
    total = sum(v.size for v in expected.values())
    results = run_ranks(world, _penalty, step, fisher, tmp_path)
    for result in results:
        for name, value in expected.items():
            np.testing.assert_allclose(result["grad"][name], value, rtol=0, atol=1e-10)
        assert result["held"] <= -(-total // world)
    assert sum(r["held"] for r in results) == total
    assert max(np.abs(v).max() for v in expected.values()) > 0.1


class Backbone(nn.Module):
    """Nine tenths frozen, in front, so that some ranks own nothing that is trained."""

    def __init__(self, spec: DataSpec) -> None:
        super().__init__()
        self.frozen = nn.Linear(64, 64).requires_grad_(False)
        self.head = nn.Linear(64, spec.classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.frozen(x.flatten(1))))


def _frozen(mode: str, out: Path) -> float:
    summary = execute(
        "train",
        (
            f"model.name={__name__}:Backbone",
            "model.options={}",
            f"continual_learning.update_mode={mode}",
            "run.precision=fp64",
        ),
        out,
    )
    return float(summary["average_accuracy"])


@pytest.mark.parametrize("mode", ["ewc_online", "si"])
def test_a_rank_may_own_frozen_weights_only(mode: str, tmp_path: Path) -> None:
    alone = run_ranks(1, _frozen, mode, tmp_path / "one")
    several = run_ranks(3, _frozen, mode, tmp_path / "three")
    assert several == pytest.approx(alone * 3)


class HalfUsed(nn.Module):
    """Two linear layers, of which the outputs need one, whose bias is a sum of two weights."""

    def __init__(self) -> None:
        super().__init__()
        self.used = nn.Linear(4, 3)
        self.unused = nn.Linear(2, 2)
        self.shift = nn.Parameter(torch.zeros(3))  # its gradient is the bias's, one and the same

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.used.weight, self.used.bias + self.shift)


def test_unused_weights_have_no_fisher_and_those_of_one_gradient_the_same() -> None:
    torch.manual_seed(0)
    model, runtime = HalfUsed().double(), Runtime(small("run.precision=fp64").run)
    x, y = torch.rand(9, 4, dtype=torch.float64), torch.arange(9) % 3
    criterion = nn.CrossEntropyLoss(reduction="none")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    source = as_source(TensorDataset(x, y))
    parts = runtime, model, optimizer, create_partition(runtime, model), criterion, source
    found = diagonal_fisher(*parts, np.arange(9))
    p = torch.softmax(model(x), dim=1).detach()
    g = p - nn.functional.one_hot(y, 3)  # dL/dlogits
    assert not found["unused.weight"].any() and not found["unused.bias"].any()
    for name in ("used.bias", "shift"):
        torch.testing.assert_close(found[name], g.square().mean(dim=0))
    dense = (g[:, :, None] * x[:, None]).square().mean(dim=0)
    torch.testing.assert_close(found["used.weight"].reshape(3, 4), dense)
    runtime.close()
