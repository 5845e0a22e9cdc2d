"""``jvp_reg`` and ``agem`` on real ranks against dense formulas, in float64."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from distcl.data.stream import create_stream
from distcl.training.build import assemble
from distcl.distributed.runtime import Runtime
from tests.spawn import run_ranks
from tests.steps import batches, dense_model, exact, train

LR = 0.2
VIT = ("model.name=vit_tiny", "model.options={patch=4, dim=8, depth=1, heads=2}")
Grads = list[torch.Tensor]


def keys(mode: str, **values: Any) -> tuple[str, ...]:
    pairs = {"update_mode": mode, **values}
    given = (f"continual_learning.{k}={str(v).lower()}" for k, v in pairs.items())
    return (f"optimizer.lr={LR}", *given)


def reg(
    rho_theta: float, rho_x: float, sign: bool = False, model: tuple[str, ...] = ()
) -> tuple[Any, ...]:
    """∇_w L(w + ε, X + δ) of L = mean over current + mean over history."""

    def gradient(model: nn.Module, now: Any, past: Any) -> Grads:
        data = [b for b in (now, past) if b is not None]
        xs, weights = [b.x.requires_grad_() for b in data], list(model.parameters())

        def of(inputs: Grads, wanted: Grads) -> Grads:
            loss = sum(cross_entropy(model(x), b.y) for x, b in zip(inputs, data, strict=True))
            return list(torch.autograd.grad(loss, wanted))

        g, gx = of(xs, weights), [t.flatten(1) for t in of(xs, xs)]
        unit = [t.sign() if sign else t / t.norm(dim=1, keepdim=True).clamp(1e-300) for t in gx]
        moved = [x.detach() + rho_x * u.view_as(x) for x, u in zip(xs, unit, strict=True)]
        old = [w.detach().clone() for w in weights]
        norm = torch.cat([t.flatten() for t in g]).norm()
        with torch.no_grad():
            torch._foreach_add_(weights, [rho_theta * t / norm for t in g])
        result = of(moved, weights)
        with torch.no_grad():
            torch._foreach_copy_(weights, old)
        return result

    rho = {"jvp_rho_theta": rho_theta, "jvp_rho_x": rho_x, "jvp_data_sign": sign}
    return (*keys("jvp_reg", **rho), *model), gradient


def agem(model: nn.Module, now: Any, past: Any) -> Grads:
    """g - min(g·r, 0)/(r·r) r, with r the gradient on the history."""
    weights = list(model.parameters())
    g = list(torch.autograd.grad(cross_entropy(model(now.x), now.y), weights))
    if past is None:
        return g
    r = torch.autograd.grad(cross_entropy(model(past.x), past.y), weights)
    along = sum((a * b).sum() for a, b in zip(g, r, strict=True))
    square = sum((b * b).sum() for b in r)
    return [a - along.clamp(max=0) / square * b for a, b in zip(g, r, strict=True)]


CASES: dict[str, tuple[tuple[str, ...], Callable[..., Grads]]] = {
    "weights and inputs": reg(0.3, 0.7),
    "weights and signs of inputs": reg(0.3, 0.05, sign=True),
    "weights only": reg(0.3, 0.0),
    "inputs only": reg(0.0, 0.7),
    "neither": reg(0.0, 0.0),
    "through LayerNorm and attention": reg(0.3, 0.7, model=VIT),
    "agem": (keys("agem"), agem),
}


def dense_train(case: str) -> dict[str, np.ndarray]:
    overrides, gradient = CASES[case]
    model = dense_model(*overrides)
    for now, past in batches():
        grads = gradient(model, now, past)
        with torch.no_grad():
            for w, g in zip(model.parameters(), grads, strict=True):
                w -= LR * g
    return {n: p.detach().numpy() for n, p in model.named_parameters()}


@pytest.mark.parametrize("world", [1, 2, 3])
def test_weights_after_steps_equal_the_dense_formulas(world: int, tmp_path: Path) -> None:
    results = run_ranks(world, train, {case: given for case, (given, _) in CASES.items()}, tmp_path)
    for case in CASES:
        for name, value in dense_train(case).items():
            for rank, finals in enumerate(results):
                np.testing.assert_allclose(
                    finals[case][name], value, rtol=0, atol=1e-10, err_msg=f"{case}, rank {rank}"
                )


def test_the_steps_of_the_agem_test_are_of_both_kinds() -> None:
    model = dense_model()
    weights = list(model.parameters())
    projected = set()
    for now, past in batches():
        step = agem(model, now, past)
        plain = torch.autograd.grad(cross_entropy(model(now.x), now.y), weights)
        projected.add(all(torch.equal(a, b) for a, b in zip(step, plain, strict=True)))
        with torch.no_grad():
            torch._foreach_add_(weights, [-LR * g for g in step])
    assert projected == {True, False}


def _fail_inside(out: Path) -> dict[str, Any]:
    """Fail in the second pass, on all ranks."""
    config = exact(*reg(0.3, 0.7)[0])
    runtime = Runtime(config.run)
    parts = assemble(config, runtime, create_stream(config.stream, config.run.seed), out)
    module = runtime.strategy.unwrap(parts.model)
    before = {n: v.clone() for n, v in module.state_dict().items()}
    calls, moved = 0, 0.0

    def failing(*_: Any) -> None:
        nonlocal calls, moved
        calls += 1
        if calls == 2:
            now = module.state_dict()
            moved = float(sum((now[n] - v).square().sum() for n, v in before.items())) ** 0.5
            raise ValueError("inside the second pass")

    module.register_forward_hook(failing)
    (batch, hist_batch), *_ = batches(((7, 5),), runtime.rank, runtime.world_size)
    with pytest.raises(ValueError, match="second pass"):
        parts.updater.fwd_bwd(batch, hist_batch)
    restored = all(torch.equal(before[n], v) for n, v in module.state_dict().items())
    return {"moved": moved, "restored": restored}


def test_weights_are_restored_exactly_when_the_second_pass_raises(tmp_path: Path) -> None:
    for result in run_ranks(2, _fail_inside, tmp_path):
        assert result["moved"] == pytest.approx(0.3, abs=1e-12)
        assert result["restored"]
