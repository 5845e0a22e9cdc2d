"""Whole jobs that are interrupted under one strategy and go on under it or another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load

from tests.faults.test_resume import go, outcome
from tests.layouts import DEEPSPEED, WITHOUT
from tests.spawn import run_ranks

KEYS = (
    "continual_learning.update_mode=ewc_online",
    "continual_learning.fisher_samples=30",
    "optimizer.name=adam",
    "optimizer.lr=0.01",
    "training.accumulate=2",
    "parallel.fsdp_unit=200",
)
without_deepspeed = pytest.mark.skipif(not DEEPSPEED, reason=WITHOUT)


def _job(
    strategy: str, world: int, out: Path, *more: str, polls: int = 0, resume: str = "never"
) -> list[Any]:
    keys = (*KEYS, f"parallel.strategy={strategy}", *more)
    return run_ranks(world, go, "train", keys, out, polls, resume, timeout=150)


def _interrupted(strategy: str, out: Path) -> None:
    assert _job(strategy, 2, out, polls=8) == ["preempted"] * 2  # in round 1


ZEROS = [pytest.param(f"zero{k}", marks=without_deepspeed) for k in (1, 2, 3)]


@pytest.mark.parametrize("strategy", ["fsdp2", *ZEROS])
def test_a_job_goes_on_bit_for_bit(strategy: str, tmp_path: Path) -> None:
    """At three ranks, whose parts of a batch are of unlike size, some weights never used."""
    model = ("model.name=tests.theirs:Unused", "model.options={}")
    assert _job(strategy, 3, tmp_path / "cut", *model, polls=8) == ["preempted"] * 3
    assert _job(strategy, 3, tmp_path / "cut", *model, resume="auto") == ["done"] * 3
    assert _job(strategy, 3, tmp_path / "whole", *model) == ["done"] * 3
    cut, whole = outcome(tmp_path / "cut"), outcome(tmp_path / "whole")
    assert cut == whole


@without_deepspeed
@pytest.mark.parametrize(("before", "after", "world"), [("zero3", "ddp", 1), ("ddp", "zero2", 2)])
def test_a_job_goes_on_under_another_strategy(
    before: str, after: str, world: int, tmp_path: Path
) -> None:
    _interrupted(before, tmp_path / "cut")
    assert _job(after, world, tmp_path / "cut", resume="auto") == ["done"] * world
    assert _job("ddp", 2, tmp_path / "whole") == ["done"] * 2
    cut, whole = outcome(tmp_path / "cut"), outcome(tmp_path / "whole")
    assert cut["digests"] == whole["digests"]
    weights = [load(found["weights"]) for found in (cut, whole)]
    for name, value in weights[1].items():
        np.testing.assert_allclose(weights[0][name], value, rtol=0, atol=1e-4)


def test_fused_optimizers_train_like_others_and_go_on(tmp_path: Path) -> None:
    assert _job("ddp", 2, tmp_path / "plain") == ["done"] * 2
    plain = load(outcome(tmp_path / "plain")["weights"])
    for strategy in ("ddp", "fsdp2", *(("zero2", "zero3") if DEEPSPEED else ())):
        out = tmp_path / strategy
        fused = f"parallel.strategy={strategy}", "optimizer.fused=true"
        for polls, resume, state in ((8, "never", "preempted"), (0, "auto", "done")):
            keys = (*KEYS, *fused)
            ended = run_ranks(2, go, "train", keys, out, polls, resume, timeout=150)
            assert ended == [state] * 2
        for name, value in load(outcome(out)["weights"]).items():
            np.testing.assert_allclose(value, plain[name], rtol=0, atol=1e-4, err_msg=strategy)
