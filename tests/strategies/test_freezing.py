"""Frozen parameters under every layout: never touched, and nobody's but the model's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load

from distcl.config.load import load_config
from distcl.data.stream import create_stream
from distcl.models import create_model
from distcl.training.build import assemble
from distcl.training.trainer import ContinuousTrainer
from tests.faults.test_resume import go, outcome
from tests.layouts import (
    DEEPSPEED,
    WITHOUT,
    available,
    each,
    fresh_runtime,
    gathered,
    layout_params,
)
from tests.small import SMALL
from tests.spawn import run_ranks

NAMES = ["ddp", "fsdp2", "fsdp2 in units", "zero1", "zero2", "zero3", "zero3 mixed"]
WORLD = 3
FROZEN = ("body.0.weight", "body.0.bias")
KEYS = (
    "model.options.hidden=[90,100]",
    "model.freeze=['body.0.*']",
    "optimizer.name=adam",
    "optimizer.lr=0.003",
    "continual_learning.fisher_samples=31",
    "training.epochs=1",
    "training.clip_norm=0.5",
)


def _bytes(slices: dict[str, torch.Tensor]) -> int:
    return sum(v.numel() * v.element_size() for v in slices.values())


def _job(layout: str, folder: Path, *keys: str, mode: str = "ewc_online") -> dict[str, Any]:
    sets = (*SMALL, *KEYS, f"continual_learning.update_mode={mode}", *keys)
    config = load_config(None, sets, environ={})
    runtime = fresh_runtime(layout, training=config.training, folder=folder)
    stream = create_stream(config.stream, config.run.seed)
    trainer = ContinuousTrainer(assemble(config, runtime, stream, folder), config)
    parts, partition = trainer.parts, trainer.parts.forward.partition
    raw = dict(create_model(config.model, stream.spec, config.run.seed).named_parameters())
    pointers = {n: p.data_ptr() for n, p in parts.forward.module.named_parameters()}

    def touched() -> list[str]:
        now = gathered(partition, list(FROZEN))
        return [n for n in FROZEN if not np.array_equal(now[n], raw[n].detach().numpy())]

    graded: set[str] = set()
    before_step = parts.updater.update_post_fwd_bwd

    def noting() -> None:
        graded.update(partition.grads())
        before_step()

    parts.updater.update_post_fwd_bwd = noting  # type: ignore[method-assign]
    seen = {"start": touched()}
    trainer.pretrain(stream.experiences[0])
    seen["pretrained"] = touched()
    for k in (1, 2):
        parts.scorer.score(stream, stream.experiences[k].train)
        seen[f"scored {k}"] = touched()
        with parts.anchor.swapped_in():
            seen[f"swapped {k}"] = touched()
            moved = gathered(partition, ["body.2.weight"])["body.2.weight"]
        trainer.run_round(stream.experiences[k], "scheduled")
        seen[f"trained {k}"] = touched()
    assert (
        "ddp" not in layout
        or pointers["body.0.weight"]
        == parts.forward.module.get_parameter("body.0.weight").data_ptr()
    )
    state = partition.optimizer_state(parts.optimizer)
    statistics = getattr(parts.updater, "fisher", None) or getattr(parts.updater, "importance", {})
    held = {
        *parts.anchor.theta_star,
        *statistics,
        *graded,
        *state.plain,
        *(name for named in state.slices.values() for name in named),
    }
    return {
        "touched": {when: names for when, names in seen.items() if names},
        "held": held,
        "bytes": _bytes(parts.anchor.theta_star) + _bytes(statistics),
        "swapped": moved,
        "weights": gathered(partition, list(raw)),
        "draws": [r["draws_sha256"] for r in trainer.rounds],
    }


def _jobs(folder: Path, layouts: list[str]) -> dict[str, Any]:
    return each(layouts, _job, folder)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: Any) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("frozen")
    return run_ranks(WORLD, _jobs, folder, available(NAMES), timeout=170)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: Any) -> dict[str, Any]:
    return run_ranks(1, _jobs, tmp_path_factory.mktemp("alone"), ["ddp"])[0]["ddp"]


@layout_params(NAMES)
def test_frozen_weights_are_never_touched_and_others_train_as_in_one_process(
    layout: str, ranks: list[Any], alone: dict[str, Any]
) -> None:
    for rank in ranks:
        found = rank[layout]
        assert found["touched"] == {}
        assert found["draws"][0] == alone["draws"][0]
        for name, value in alone["weights"].items():
            np.testing.assert_allclose(found["weights"][name], value, rtol=0, atol=2e-4)
    assert np.abs(alone["weights"]["body.2.weight"] - alone["swapped"]).max() > 1e-3


@layout_params(NAMES)
def test_anchor_statistics_and_optimizer_hold_what_trains_only(
    layout: str, ranks: list[Any]
) -> None:
    trained = 90 * 100 + 100 + 100 * 10 + 10
    total = sum(rank[layout]["bytes"] for rank in ranks)
    assert total == 2 * 4 * trained
    for rank in ranks:
        assert rank[layout]["held"] and not rank[layout]["held"] & set(FROZEN)
        assert rank[layout]["bytes"] <= 1.05 * 2 * 4 * trained / WORLD


def _plain(out: Path) -> dict[str, Any]:
    """Train by plain torch on the batches of a job that freezes the first layer."""
    sets = [*SMALL, *KEYS, "run.precision=fp64", "continual_learning.importance_weighting=false"]
    config = load_config(None, sets, environ={})
    runtime = fresh_runtime("ddp", "fp64", training=config.training, folder=out)
    stream = create_stream(config.stream, config.run.seed)
    trainer = ContinuousTrainer(assemble(config, runtime, stream, out), config)
    taken: list[Any] = []
    whole = trainer.parts.updater.fwd_bwd

    def noting(batch: Any, history: Any) -> Any:
        taken.append(batch.ids.numpy().copy())
        return whole(batch, history)

    trainer.parts.updater.fwd_bwd = noting  # type: ignore[method-assign]
    trainer.run_round(stream.experiences[1], "scheduled")
    dense = create_model(config.model, stream.spec, config.run.seed).double()
    weights = [p for n, p in dense.named_parameters() if n not in FROZEN]
    optimizer = torch.optim.Adam(weights, lr=0.003)
    for ids in taken:
        batch = stream.read(ids)
        loss = torch.nn.functional.cross_entropy(dense(batch.x.double()), batch.y)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 0.5)
        optimizer.step()
    expected = {n: p.detach().numpy() for n, p in dense.named_parameters()}
    return {"expected": expected, "found": gathered(trainer.parts.forward.partition, [*expected])}


def test_a_round_equals_plain_torch_on_the_parameters_that_train(tmp_path: Path) -> None:
    result = run_ranks(1, _plain, tmp_path)[0]
    for name, value in result["expected"].items():
        np.testing.assert_allclose(result["found"][name], value, rtol=0, atol=1e-6, err_msg=name)


RESUMED = ["ddp", "fsdp2", "zero2", "zero3"]


@pytest.mark.parametrize(
    "strategy",
    [
        pytest.param(s, marks=pytest.mark.skipif("zero" in s and not DEEPSPEED, reason=WITHOUT))
        for s in RESUMED
    ],
)
def test_a_job_that_is_cut_goes_on_bit_for_bit(strategy: str, tmp_path: Path) -> None:
    keys = (*KEYS, "continual_learning.update_mode=si", f"parallel.strategy={strategy}")
    cut, whole = tmp_path / "cut", tmp_path / "whole"

    def run(out: Path, polls: int = 0, resume: str = "never") -> list[str]:
        return run_ranks(WORLD, go, "train", keys, out, polls, resume, timeout=150)

    assert run(cut, polls=5) == ["preempted"] * WORLD
    held = next((cut / "checkpoints").glob("step-*"))
    states = [torch.load(held / f"rank-{r:05d}.pt", weights_only=True) for r in range(WORLD)]
    for state in states:
        assert not set(FROZEN) & {*state["ranges"], *state["anchor"]["theta_star"]}
        assert not set(FROZEN) & {*state["optimizer"]["now"]["plain"], *state["updater"]["path"]}
    assert set(FROZEN) <= load((held / "model.safetensors").read_bytes()).keys()
    assert run(cut, resume="auto") == ["done"] * WORLD
    assert run(whole) == ["done"] * WORLD
    assert outcome(cut) == outcome(whole)
