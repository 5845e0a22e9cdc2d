"""Numbers that are not finite stop a run by name, or take it back; so do rounds that harm."""

from __future__ import annotations

import json
import os
import re
import time
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from distcl import job
from distcl.checkpoint.store import MODEL, load
from distcl.config import StreamConfig
from distcl.data.shards.inputs import open_samples
from distcl.data.shards.writer import write_shards
from distcl.data.stream import create_stream
from distcl.errors import DivergenceError
from distcl.losses import cross_entropy
from distcl.monitoring.metrics import StreamMetric
from distcl.types import Batch, unpack_ids
from tests.small import small
from tests.spawn import exit_codes, run_ranks

QUICK = (
    "run.poll_steps=3",
    "stream.samples_per_experience=121",
    "training.batch_size=20",
    "checkpoint.keep=100",
)


def go(
    keys: tuple[str, ...], out: Path, command: job.Command = "train", raises: bool = False
) -> str:
    """Run a job; return its error, '' if there was none."""
    try:
        job.execute(command, small(*QUICK, *keys), out)
    except DivergenceError as error:
        if raises:
            raise
        return str(error)
    return ""


class Sick(ABC):
    """The cross entropy, until a process has seen so many batches; then something happens to it."""

    batches = 25

    def __init__(self) -> None:
        self.left = self.batches

    def __call__(self, outputs: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        losses = cross_entropy(outputs, y)
        self.left -= outputs.requires_grad
        return self.ill(outputs, losses) if self.left < 0 else losses

    @abstractmethod
    def ill(self, outputs: torch.Tensor, losses: torch.Tensor) -> torch.Tensor: ...


class NoGradient(Sick):
    """Finite losses, the slope of a square root at 0."""

    def ill(self, outputs: torch.Tensor, losses: torch.Tensor) -> torch.Tensor:
        return losses + (0 * outputs.sum(1)).abs().sqrt()


class NoGradientOnRank1(NoGradient):
    def ill(self, outputs: torch.Tensor, losses: torch.Tensor) -> torch.Tensor:
        return super().ill(outputs, losses) if os.environ.get("RANK") == "1" else losses


class InfiniteOnRank1(Sick):
    def ill(self, outputs: torch.Tensor, losses: torch.Tensor) -> torch.Tensor:
        if os.environ.get("RANK") != "1" or len(losses) < 2:
            return losses
        return losses * torch.tensor([1.0, float("inf")] + [1.0] * (len(losses) - 2))


class NanTwice(Sick):
    """Two of these lose their numbers in a process; the third is well.

    Each start makes one, and another for the dry run.
    """

    lives: ClassVar[list[int]] = [1000, 1000, 1000, 5, 1000, 25]

    def __init__(self) -> None:
        self.left = self.lives.pop()

    def ill(self, outputs: torch.Tensor, losses: torch.Tensor) -> torch.Tensor:
        return losses * float("nan")


class Harmful(Sick):
    """After the pretraining, what trains the model makes it worse."""

    batches = 140

    def ill(self, outputs: torch.Tensor, losses: torch.Tensor) -> torch.Tensor:
        return -losses if outputs.requires_grad else losses


class NanSignal:
    """A signal that loses its numbers after some chunks, on the last rank."""

    needs_anchor = False
    needs_logits = False

    def __init__(self) -> None:
        self.chunks = 2

    def score(self, batch: Batch, now: Any, anchor: Any) -> torch.Tensor:
        self.chunks -= 1
        last = int(os.environ.get("RANK", "0")) + 1 == int(os.environ.get("WORLD_SIZE", "1"))
        return now.loss * (float("nan") if last and self.chunks < 0 else 1.0)


class NanOnce(NanSignal):
    """One that loses its numbers once in a process: a run that went back finds them again."""

    well: ClassVar[bool] = False

    def score(self, batch: Batch, now: Any, anchor: Any) -> torch.Tensor:
        score = super().score(batch, now, anchor)
        if NanOnce.well:
            return now.loss
        NanOnce.well = not bool(score.isfinite().all())
        return score


class NanMetric(StreamMetric):
    """A metric to watch that is NaN once in a process."""

    well: ClassVar[bool] = False

    def measure(self, batch: Batch, logits: Any) -> torch.Tensor:
        if 9 in batch.y and not NanMetric.well:
            NanMetric.well = True
            return torch.full(batch.y.shape, torch.nan)
        return torch.zeros(batch.y.shape)


class DivergesAlone(NanSignal):
    """A signal that says itself, on the last rank, that training has diverged."""

    def score(self, batch: Batch, now: Any, anchor: Any) -> torch.Tensor:
        if super().score(batch, now, anchor).isnan().any():
            raise DivergenceError("the signal has had enough")
        return now.loss


def _loss(loss: type[Sick]) -> str:
    return f"model.loss={__name__}:{loss.__name__}"


def test_an_infinite_loss_names_round_step_rank_and_sample(tmp_path: Path) -> None:
    errors = run_ranks(2, go, (_loss(InfiniteOnRank1),), tmp_path)
    assert errors[0] == errors[1]
    assert "the loss became inf in round 2, step " in errors[0]
    ids = errors[0].partition("on rank 1 (sample ids: ")[2].partition(")")[0]
    assert unpack_ids(np.array([int(ids)]))[0].tolist() == [2]  # one sample, of experience 2


def test_the_sample_named_is_the_one_at_fault(tmp_path: Path) -> None:
    x = np.random.default_rng(0).normal(size=(200, 1, 8, 8)).astype(np.float32)
    x[77] = 3e38
    np.savez(tmp_path / "data.npz", x=x, y=np.arange(200) % 10)
    data = ("stream.source=arrays", f"stream.path={tmp_path / 'data.npz'}")
    keys = (*data, "stream.samples_per_experience=0", "training.eval_batch_size=20")
    keys += ("continual_learning.importance_weighting=false", "stream.experiences=1")
    config = small(*QUICK, *keys)
    stream = create_stream(config.stream, config.run.seed, config.data)
    train = stream.experiences[0].train
    hot = [i for i in train.tolist() if float(stream.read(np.array([i])).x.max()) > 1e38]
    error = go(keys, tmp_path / "run")
    assert len(hot) == 1
    assert f"sample ids: {hot[0]}" in error


@pytest.mark.parametrize("loss", [NoGradient, NoGradientOnRank1])
def test_a_gradient_that_is_not_finite_stops_before_anything_is_saved(
    loss: type[Sick], tmp_path: Path
) -> None:
    world = 1 if loss is NoGradient else 2
    errors = run_ranks(world, go, (_loss(loss), "checkpoint.every_steps=3"), tmp_path)
    assert errors == errors[:1] * world
    assert re.search(r"in round [12], step \d+", errors[0])
    assert "largest losses are on rank " in errors[0]
    assert "sample ids: " in errors[0]
    assert "gradient was not finite" in errors[0]
    status = json.loads((tmp_path / "status.json").read_text())
    assert (status["exit_code"], status["reason"]) == (4, errors[0])
    saved = sorted((tmp_path / "checkpoints").glob("step-*"))
    assert len(saved) > 5
    for path in saved:
        assert all(bool(t.isfinite().all()) for t in load(path / MODEL).values())


def test_a_priority_that_is_not_finite_names_round_rank_and_sample(tmp_path: Path) -> None:
    keys = (f"priority.signal={__name__}:NanSignal", "priority.score_batch=16")
    errors = run_ranks(2, go, keys, tmp_path)
    assert errors[0] == errors[1]
    assert "before step 1 of round 1: the score of signal 'NanSignal' of sample id " in errors[0]
    assert errors[0].endswith("is nan, on rank 1")


def test_a_priority_that_is_not_finite_while_it_trains_names_the_step(tmp_path: Path) -> None:
    keys = (f"priority.signal={__name__}:NanSignal", "priority.source=candidates")
    error = go(keys, tmp_path)
    assert "in round 1, step 3: the score of signal 'NanSignal' of sample id " in error
    assert "on rank 0" in error


@pytest.mark.parametrize("world", [1, 2])
def test_a_rollback_goes_back_to_a_checkpoint_with_a_smaller_step(
    world: int, tmp_path: Path
) -> None:
    keys = (_loss(NanTwice), "training.max_rollbacks=2", "checkpoint.every_steps=3")
    assert run_ranks(world, go, keys, tmp_path) == [""] * world
    assert (tmp_path / "log.txt").read_text().count("[rollback] the loss became nan") == 2
    newest = max((tmp_path / "checkpoints").glob("step-*"))
    shared = load(newest / "shared.pt")
    assert shared["loop"]["lrs"] == [0.2 / 4]
    assert shared["job"]["rollbacks"] == 2
    rounds = json.loads((tmp_path / "summary.json").read_text())["rounds"]
    assert all(np.isfinite(r["final_loss"]) for r in rounds)


@pytest.mark.parametrize("world", [1, 2])
def test_what_one_rank_finds_takes_all_of_them_back(world: int, tmp_path: Path) -> None:
    write_shards(open_samples("digits", stream=StreamConfig()), tmp_path / "s", per_shard=300)
    lanes = ("stream.source=shards", f"stream.path={tmp_path / 's'}", "data.access=stream")
    back = ("training.max_rollbacks=1", "priority.score_batch=16")
    score = (*lanes, *back, f"priority.signal={__name__}:NanOnce")
    watch = (*back, f"monitor.metric={__name__}:NanMetric", "monitor.batch_size=30")
    cases = (("train", score, "the score of signal 'NanOnce'"), ("run", watch, "the metric fed"))
    for k, (command, keys, what) in enumerate(cases):
        assert run_ranks(world, go, keys, out := tmp_path / str(k), command) == [""] * world
        assert f"{what}" in (out / "log.txt").read_text().partition("[rollback] ")[2]


def test_a_rank_that_diverges_alone_does_not_leave_the_others_waiting(tmp_path: Path) -> None:
    keys = (f"priority.signal={__name__}:DivergesAlone", "training.max_rollbacks=3")
    clock = time.monotonic()
    codes = exit_codes(2, go, (*keys, "priority.score_batch=16"), tmp_path, "train", True)
    assert codes[0] == 4
    assert time.monotonic() - clock < 60
    status = json.loads((tmp_path / "status.json").read_text())
    reason = "rank 1: before step 1 of round 1: the signal has had enough"
    assert (status["exit_code"], status["reason"]) == (4, reason)


def test_rollbacks_are_bounded(tmp_path: Path) -> None:
    keys = (_loss(NanTwice), "training.max_rollbacks=1")
    [error] = run_ranks(1, go, keys, tmp_path)
    assert "the loss became nan" in error
    assert error.endswith("; 1 rollbacks did not help")


def test_without_a_checkpoint_there_is_nothing_to_roll_back_to(tmp_path: Path) -> None:
    error = go(("optimizer.lr=1e30", "training.max_rollbacks=2"), tmp_path)
    assert error.endswith("there is no checkpoint to roll back to")


@pytest.mark.parametrize("world", [1, 2])
def test_a_round_that_harms_is_taken_back(world: int, tmp_path: Path) -> None:
    keys = (
        _loss(Harmful),
        "training.pretrain_epochs=20",
        "training.accept=improves",
        "continual_learning.importance_weighting=false",
        "continual_learning.update_mode=ewc_online",
    )
    assert run_ranks(world, go, keys, tmp_path) == [""] * world
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert [r["accepted"] for r in summary["rounds"]] == [False, False]
    assert summary["accuracy"][0] == summary["accuracy"][-1]
    assert (tmp_path / "log.txt").read_text().count("is taken back: mean accuracy on held-out") == 2
    first = min((tmp_path / "checkpoints").glob("step-*"))
    before, after = load(first / MODEL), load_file(tmp_path / "checkpoints" / "final.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in after)
