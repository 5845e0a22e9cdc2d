"""Whole rounds under every layout: the same priorities, draws and weights; steps against a dense
reference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from distcl.data.stream import create_stream
from distcl.losses import cross_entropy
from distcl.models import create_model
from distcl.parallel.gradients import clip_grads_
from distcl.parallel.partition import create_partition
from distcl.training.build import assemble
from distcl.training.trainer import ContinuousTrainer
from tests.layouts import available, cut, each, fresh_runtime, gathered, layout_params, tensors
from tests.models import tangled
from tests.small import small
from tests.spawn import run_ranks

OFFLOADED = ["fsdp2 offloaded", "zero1 offloaded", "zero2 offloaded", "zero3 offloaded"]
NAMES = ["ddp", "fsdp2", "fsdp2 in units", "zero1", "zero2", "zero3", "zero3 mixed", *OFFLOADED]
PARTED = ["fsdp2 in units", "zero1", "zero2", "zero3 mixed", "zero2 offloaded", "zero3 offloaded"]
ADAM = ["ddp", "fsdp2 in units", "zero1", "zero2", "zero3"]


every_layout = layout_params(NAMES)

EWC = (
    "continual_learning.update_mode=ewc_online",
    "continual_learning.ewc_lambda=30",
    "continual_learning.fisher_samples=41",
    "priority.target=current",
    "training.epochs=2",
)
VARIANTS = {
    "sgd": (),
    "in parts": ("training.accumulate=3", "training.clip_norm=0.5", "parallel.anchor_device=cpu"),
    "whole": ("training.clip_norm=0.5",),
    "adam": ("optimizer.name=adam", "optimizer.lr=0.003"),
}


def _rounds(layout: str, folder: Path, variant: str) -> dict[str, Any]:
    """Two rounds from a fixed, different pair of weights and theta_star, with a Fisher at hand."""
    config = small(*EWC, *VARIANTS[variant])
    cpu = config.parallel.anchor_device
    runtime = fresh_runtime(layout, training=config.training, folder=folder, anchor_device=cpu)
    stream = create_stream(config.stream, config.run.seed)
    parts = assemble(config, runtime, stream, folder)
    trainer = ContinuousTrainer(parts, config)
    partition, scorer = parts.forward.partition, parts.scorer
    ids = [e.train for e in stream.experiences]
    parts.updater.cl_postprocessing(stream, ids[0])
    other = create_model(config.model, stream.spec, seed=1)
    for name, value in cut(partition, runtime, tensors(other)).items():
        parts.anchor.theta_star[name].copy_(value)
    fisher = {n: float(v.double().sum()) for n, v in parts.updater.fisher.items()}
    result: dict[str, Any] = {"fisher": fisher, "first": scorer.score(stream, ids[1]).cpu().numpy()}
    reports = [trainer.run_round(stream.experiences[1], "scheduled")]
    result["weights"] = gathered(partition, list(tensors(other)))
    result["second"] = scorer.score(stream, ids[2]).cpu().numpy()
    reports.append(trainer.run_round(stream.experiences[2], "scheduled"))
    return result | {
        "digests": [r["draws_sha256"] for r in reports],
        "losses": [r["final_loss"] for r in reports],
        "steps": [r["steps"] for r in reports],
    }


def _variant(folder: Path, layouts: list[str], variant: str) -> dict[str, Any]:
    return each(layouts, _rounds, folder, variant)


def _all(folder: Path, layouts: dict[str, list[str]]) -> dict[str, Any]:
    return {variant: _variant(folder, names, variant) for variant, names in layouts.items()}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: Any) -> dict[str, Any]:
    layouts = {
        "sgd": available(NAMES),
        "in parts": available(PARTED),
        "whole": ["ddp"],
        "adam": available(ADAM),
    }
    return run_ranks(2, _all, tmp_path_factory.mktemp("rounds"), layouts, timeout=170)[0]


def _dense_priorities() -> np.ndarray:
    config = small(*EWC)
    stream = create_stream(config.stream, config.run.seed)
    batch = stream.read(stream.experiences[1].train)
    with torch.no_grad():
        losses = [
            cross_entropy(create_model(config.model, stream.spec, seed).eval()(batch.x), batch.y)
            for seed in (config.run.seed, 1)
        ]
    return (losses[0] - losses[1]).clamp(min=1e-8).numpy()


@every_layout
def test_priorities_equal_a_dense_reference(layout: str, runs: dict[str, Any]) -> None:
    reference = _dense_priorities()
    assert reference.std() > 0.1
    np.testing.assert_allclose(runs["sgd"][layout]["first"], reference, rtol=0, atol=1e-6)


@every_layout
def test_rounds_of_ewc_with_prioritized_draws_agree(layout: str, runs: dict[str, Any]) -> None:
    found, reference = runs["sgd"][layout], runs["sgd"]["ddp"]
    assert found["steps"] == [14, 14]
    assert found["digests"][0] == reference["digests"][0]
    for name, value in reference["weights"].items():
        np.testing.assert_allclose(found["weights"][name], value, rtol=0, atol=1e-5)
    assert reference["second"].std() > 0.01
    np.testing.assert_allclose(found["second"], reference["second"], rtol=0, atol=1e-4)


@layout_params(ADAM)
def test_with_adam_losses_agree(layout: str, runs: dict[str, Any]) -> None:
    found, reference = runs["adam"][layout], runs["adam"]["ddp"]
    np.testing.assert_allclose(found["losses"], reference["losses"], rtol=0, atol=1e-3)


@layout_params(PARTED)
def test_accumulation_changes_neither_draws_nor_weights(layout: str, runs: dict[str, Any]) -> None:
    found, whole = runs["in parts"][layout], runs["whole"]["ddp"]
    assert found["digests"][0] == whole["digests"][0]
    for name, value in whole["weights"].items():
        np.testing.assert_allclose(found["weights"][name], value, rtol=0, atol=1e-5)


LR, CLIP = 0.1, 1.5


def _step(layout: str, folder: Path, precision: str, penalty: float) -> dict[str, Any]:
    """One SGD step in two parts, with regularizer gradients in both forms, then clipped."""
    runtime = fresh_runtime(layout, precision, folder=folder)
    model, optimizer = runtime.prepare_training(
        tangled(0, batchnorm=False), lambda params: torch.optim.SGD(params, lr=LR)
    )
    partition = create_partition(runtime, model)
    x = torch.randn(2, 2, 3, 7, generator=torch.Generator().manual_seed(3))  # rank, part, …
    for k in range(2):
        with runtime.strategy.accumulating(model, last=k == 1):
            runtime.strategy.backward(
                model(x[runtime.rank, k].to(runtime.device)).square().mean() / 2
            )
    runtime.strategy.unscale(optimizer)
    partition.add_grad_({n: penalty * w for n, w in partition.trainable().items()})
    given = {"first.weight": torch.full((11, 7), penalty, device=runtime.device)}
    partition.add_full_grads_(given if runtime.rank == 1 else {}, {"first.weight": 1})
    if precision == "fp32":
        clip_grads_(partition, runtime, CLIP)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return gathered(partition, list(tensors(runtime.strategy.unwrap(model))))


def _steps(folder: Path, layouts: list[str]) -> dict[str, Any]:
    return {
        "fp32": each(layouts, _step, folder, "fp32", 2.0),
        "bf16": {
            layout: [_step(layout, folder, "bf16", penalty) for penalty in (2.0, 0.0)]
            for layout in layouts
        },
    }


@pytest.fixture(scope="module")
def steps(tmp_path_factory: Any) -> dict[str, Any]:
    return run_ranks(2, _steps, tmp_path_factory.mktemp("steps"), available(NAMES), timeout=120)[1]


@every_layout
def test_regularizers_reach_the_step_once_and_are_clipped(layout: str, steps: Any) -> None:
    model = tangled(0, batchnorm=False)
    x = torch.randn(2, 2, 3, 7, generator=torch.Generator().manual_seed(3))
    torch.stack(
        [model(x[r, k]).square().mean() / 4 for r in (0, 1) for k in (0, 1)]
    ).sum().backward()
    for name, p in model.named_parameters():
        if p.requires_grad:
            p.grad += 2 * p.detach() + (2 if name == "first.weight" else 0)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
    assert norm > 2 * CLIP
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=LR).step()
    for name, p in model.named_parameters():
        np.testing.assert_allclose(
            steps["fp32"][layout][name], p.detach().numpy(), rtol=0, atol=1e-6
        )


@every_layout
def test_in_bf16_regularizers_reach_the_masters_in_float32(layout: str, steps: Any) -> None:
    with_penalty, without = steps["bf16"][layout]
    for name, p in tangled(0, batchnorm=False).named_parameters():
        # under ZeRO the masters begin as half-precision weights
        w = p.detach() if layout == "ddp" or "fsdp2" in layout else p.detach().bfloat16().float()
        moved = 2 * w + (2 if name == "first.weight" else 0) if p.requires_grad else 0 * w
        np.testing.assert_allclose(
            without[name] - with_penalty[name], LR * moved.numpy(), rtol=0, atol=1e-6
        )
