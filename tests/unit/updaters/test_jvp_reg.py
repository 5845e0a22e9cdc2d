"""``jvp_reg`` in one process; against dense formulas: tests/dist."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from distcl.config import ContinualLearningConfig, RunConfig
from distcl.distributed.runtime import Runtime
from distcl.errors import ConfigError
from distcl.parallel.anchor import Anchor
from distcl.parallel.inference import ShardedForward
from distcl.parallel.partition import create_partition
from distcl.priority.scoring import Scorer
from distcl.priority.signals import create_signal
from distcl.types import Batch
from distcl.updaters import Updater, UpdaterSetup, create_updater
from distcl.updaters.jvp_reg import normalized
from tests.models import awkward
from tests.steps import dense_model

VIT = ("model.name=vit_tiny", "model.options={patch=4, dim=8, depth=1, heads=2}")


def unreduced(outputs: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return cross_entropy(outputs, y, reduction="none")


def make(model: nn.Module, mode: str, **values: Any) -> Updater:
    runtime = Runtime(RunConfig(precision="fp64"))
    model = runtime.prepare(model).train()
    partition = create_partition(runtime, model)
    anchor = Anchor(partition)
    forward = ShardedForward(runtime, model, partition, unreduced)
    setup = UpdaterSetup(
        config=ContinualLearningConfig(update_mode=mode, **values),
        model=model,
        optimizer=torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1),
        scorer=Scorer(forward, anchor, create_signal("loss_delta"), 8),
        seed=0,
    )
    return create_updater(mode, setup)


def batch(n: int, *shape: int, seed: int = 0) -> Batch:
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(n, *shape, generator=draw, dtype=torch.float64)
    return Batch(torch.arange(n), x, torch.randint(3, (n,), generator=draw), n)


def grads(updater: Updater) -> dict[str, torch.Tensor]:
    return {n: g.clone() for n, g in updater.partition.grads().items()}


def test_without_radius_and_history_the_gradient_is_the_plain_one_bit_for_bit() -> None:
    values = {"jvp_rho_theta": 0.0, "jvp_rho_x": 0.0}
    given = make(awkward().double(), "jvp_reg", **values)
    plain = make(awkward().double(), "base")
    result, expected = (u.fwd_bwd(batch(7, 7), None) for u in (given, plain))
    assert torch.equal(result.losses, expected.losses)
    mine, others = grads(given), grads(plain)
    assert mine.keys() == others.keys()
    assert all(torch.equal(mine[n], others[n]) for n in others)


@pytest.mark.parametrize(
    ("rho_theta", "rho_x", "passes"), [(0, 0, 1), (0.1, 0, 2), (0, 0.1, 2), (0.1, 0.1, 2)]
)
def test_there_are_two_passes_and_buffers_are_those_of_the_first(
    rho_theta: float, rho_x: float, passes: int
) -> None:
    model, plain = awkward().double().train(), awkward().double().train()
    updater = make(model, "jvp_reg", jvp_rho_theta=rho_theta, jvp_rho_x=rho_x)
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    updater.fwd_bwd(batch(7, 7), batch(4, 7, seed=1))
    assert len(calls) == passes
    plain(torch.cat([batch(7, 7).x, batch(4, 7, seed=1).x]))
    expected = dict(plain.named_buffers())
    assert all(torch.equal(expected[n], b) for n, b in model.named_buffers())


@pytest.mark.parametrize("sign", [False, True])
def test_the_loss_rises_by_its_jvp_along_the_steepest_direction(sign: bool) -> None:
    rho_theta, rho_x = 2e-5, 1e-5
    model = dense_model(*VIT)
    keys = {"jvp_rho_theta": rho_theta, "jvp_rho_x": rho_x, "jvp_data_sign": sign}
    updater = make(model, "jvp_reg", **keys)
    now, past = batch(7, 1, 8, 8), batch(4, 1, 8, 8, seed=1)
    outputs: list[torch.Tensor] = []
    model.register_forward_hook(lambda _m, _x, out: outputs.append(out.detach()))
    updater.fwd_bwd(now, past)
    before, after = (
        cross_entropy(out[:7], now.y) + cross_entropy(out[7:], past.y) for out in outputs
    )
    xs = [b.x.requires_grad_() for b in (now, past)]
    loss = cross_entropy(model(xs[0]), now.y) + cross_entropy(model(xs[1]), past.y)
    slopes = torch.autograd.grad(loss, [*model.parameters(), *xs])
    of_weights = torch.cat([g.flatten() for g in slopes[:-2]]).norm()
    of_inputs = [g.flatten(1).norm(p=1 if sign else 2, dim=1).sum() for g in slopes[-2:]]
    expected = rho_theta * of_weights + rho_x * sum(of_inputs)
    assert float(after - before) == pytest.approx(float(expected), rel=1e-3)


def test_vectors_are_normalized_over_all_tensors_of_a_sample() -> None:
    a = torch.tensor([[3.0, 0.0], [0.0, 0.0], [3e-30, 0.0]])
    b = torch.tensor([4.0, 0.0, -4e-30])  # one number a sample
    a, b = normalized([a, b])
    torch.testing.assert_close(a, torch.tensor([[0.6, 0.0], [0.0, 0.0], [0.6, 0.0]]))
    torch.testing.assert_close(b, torch.tensor([0.8, 0.0, -0.8]))
    assert normalized([torch.empty(0, 2), torch.empty(0)])[0].shape == (0, 2)


class Tokens(nn.Module):
    """Takes a dictionary of token ids and, if there are any, features."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 3)

    def forward(self, x: dict[str, torch.Tensor]) -> torch.Tensor:
        h = self.embed(x["tokens"]).mean(1)
        return self.head(h + x["features"] if "features" in x else h)


def tokens(n: int, features: bool, seed: int = 0) -> Batch:
    plain = batch(n, 3, seed=seed)
    x = {"tokens": torch.arange(4 * n).view(n, 4) % 5}
    return Batch(plain.ids, x | {"features": plain.x} if features else x, plain.y, n)


def test_only_floating_point_inputs_move_and_token_ids_alone_are_refused() -> None:
    mode, key = "jvp_reg", "jvp_rho_x"
    updater = make(Tokens(), mode, **{key: 0.5})
    with pytest.raises(ConfigError, match=rf"{key} > 0 .* torch.int64; set {key} = 0"):
        updater.fwd_bwd(tokens(4, False), tokens(3, False, seed=1))
    both = tokens(4, True), tokens(3, True, seed=1)
    updater.fwd_bwd(*both)
    moved = grads(updater)
    updater.setup.optimizer.zero_grad()
    make(updater.model, mode, **{key: 0.0}).fwd_bwd(*both)
    assert not all(torch.equal(g, moved[n]) for n, g in grads(updater).items())
    make(Tokens(), mode, **{key: 0.0}).fwd_bwd(tokens(4, False), tokens(3, False, seed=1))
