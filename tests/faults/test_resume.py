"""Interrupted and resumed is the same as never interrupted: draws, weights, metrics."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from distcl import job
from distcl.errors import CheckpointError, ConfigError, DataError, Preempted, UsageError
from distcl.losses import cross_entropy
from distcl.training.build import Quiet
from tests.small import small
from tests.spawn import run_ranks

ALWAYS = (
    "run.poll_steps=3",
    "stream.samples_per_experience=160",
    "training.batch_size=20",
    "continual_learning.mix_historic_data=true",
    "checkpoint.every_round=false",
)


class Killer(Quiet):
    """A display that sends its own process a signal when it has been told of so many polls."""

    def __init__(self, polls: int, number: int = signal.SIGTERM) -> None:
        self.polls = polls
        self.number = number

    def step(self, done: int, value: float, samples_per_second: float) -> None:
        self.polls -= 1
        if self.polls == 0:
            os.kill(os.getpid(), self.number)


class KillingLoss:
    """The cross entropy; on rank 1, its 50th batch brings the process a signal."""

    def __init__(self) -> None:
        self.batches = 50 if os.environ.get("RANK") == "1" else 0

    def __call__(self, outputs: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        self.batches -= 1
        if self.batches == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return cross_entropy(outputs, y)


def go(command: str, keys: tuple[str, ...], out: Path, polls: int, resume: str) -> str:
    """Run a job, interrupted after some polls of rank 0 (0: never); return how it ended."""
    if int(os.environ.get("RANK", "0")) != 0:
        polls = 0  # only rank 0 has a display
    try:
        config = small(*ALWAYS, *keys)
        job.execute(command, config, out, Killer(polls) if polls else None, resume=resume)
    except Preempted:
        return "preempted"
    return "done"


def outcome(out: Path) -> dict[str, Any]:
    summary = json.loads((out / "summary.json").read_text())
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line.pop("time")
        line.pop("samples_per_second", None)
    return {
        "digests": [r["draws_sha256"] for r in summary["rounds"]],
        "accuracy": summary["accuracy"],
        "priority": [r["priority"] for r in summary["rounds"]],
        "passes": [r["forward_passes_per_sample"] for r in summary["rounds"]],
        "drifts": summary["drifts"],
        "metrics": lines,
        "weights": (out / "checkpoints" / "final.safetensors").read_bytes(),
    }


def interrupted(
    command: str, keys: tuple[str, ...], out: Path, world: int, polls: tuple[int, ...]
) -> None:
    resume = "never"
    for count in polls:
        ended = run_ranks(world, go, command, keys, out, count, resume)
        assert ended == ["preempted"] * world
        status = json.loads((out / "status.json").read_text())
        assert (status["state"], status["exit_code"]) == ("preempted", 75)
        resume = "auto"
    assert run_ranks(world, go, command, keys, out, 0, resume) == ["done"] * world


MODES = {
    "base": (),
    "adam": ("optimizer.name=adam", "optimizer.lr=0.01", "optimizer.warmup_steps=9"),
    "momentum": ("optimizer.momentum=0.9", "optimizer.lr=0.05", "priority.target=union"),
    "ewc": ("continual_learning.update_mode=ewc_online",),
    "si": ("continual_learning.update_mode=si",),
    "kfac": ("continual_learning.update_mode=kfac_online", "continual_learning.kfac_every=4"),
    "der": ("continual_learning.update_mode=der", "continual_learning.buffer_size=90"),
    "lwf": ("continual_learning.update_mode=lwf",),
    "jvp": ("continual_learning.update_mode=jvp_reg",),
    "mer": (
        "continual_learning.update_mode=mer",
        "continual_learning.mer_every=7",
        "optimizer.momentum=0.9",
        "optimizer.lr=0.05",
    ),
    "agem": ("continual_learning.update_mode=agem",),
    "copy": ("continual_learning.update_mode=er", "continual_learning.history_store=copy"),
    "online": (
        "continual_learning.update_mode=er",
        "continual_learning.mix_historic_data=false",
        "priority.source=online",
        "priority.signal=entropy",
        "priority.target=history",
        "priority.refresh_steps=4",
        "priority.draw=systematic",
    ),
    "gate": (
        "continual_learning.update_mode=er",
        "priority.source=online",
        "priority.signal=entropy",
        "priority.target=history",
        "priority.refresh_steps=4",
        "priority.draw=credit",
        "priority.gate=0.6",
        "training.ema=0.9",
    ),
    "candidates": ("priority.source=candidates", "priority.signal=loss"),
    "guard": (
        "continual_learning.update_mode=er",
        "priority.target=history",
        "priority.signal=entropy",
        "priority.guard=auto",
        "stream.experiences=4",
        "stream.drift=permute",
    ),
    "workers": ("data.workers=1", "priority.draw=systematic"),
    "disagreement": ("priority.signal=disagreement",),
}


@pytest.mark.parametrize("mode", MODES)
def test_a_resumed_run_equals_one_never_interrupted(mode: str, tmp_path: Path) -> None:
    keys = MODES[mode]
    run_ranks(1, go, "train", keys, tmp_path / "whole", 0, "never")
    interrupted("train", keys, tmp_path / "parts", 1, (3, 5))
    assert outcome(tmp_path / "parts") == outcome(tmp_path / "whole")


@pytest.mark.parametrize(
    ("mode", "world"),
    [("ewc", 2), ("der", 2), ("online", 2), ("guard", 2), ("mer", 3), ("gate", 3)],
)
def test_several_ranks_resume_bit_for_bit(mode: str, world: int, tmp_path: Path) -> None:
    run_ranks(world, go, "train", MODES[mode], tmp_path / "whole", 0, "never")
    interrupted("train", MODES[mode], tmp_path / "parts", world, (7,))
    assert outcome(tmp_path / "parts") == outcome(tmp_path / "whole")


def test_a_monitored_run_resumes_while_it_watches_and_within_a_round(tmp_path: Path) -> None:
    keys = (
        "stream.samples_per_experience=600",
        "monitor.batch_size=40",
        "monitor.window=200",
        "monitor.collect=80",
        "training.pretrain_epochs=12",
        "checkpoint.every_round=true",
    )
    run_ranks(1, go, "run", keys, tmp_path / "whole", 0, "never")
    whole = outcome(tmp_path / "whole")
    assert len(whole["drifts"]) >= 1
    interrupted("run", keys, tmp_path / "parts", 1, (9, 30, 40))
    assert outcome(tmp_path / "parts") == whole


@pytest.mark.parametrize("mode", ["base", "ewc", "si", "kfac", "der", "online"])
def test_a_run_goes_on_at_another_number_of_ranks(mode: str, tmp_path: Path) -> None:
    # of these weights, ranks own slices that begin with different ones
    keys = ("run.precision=fp64", "model.options.hidden=[4, 40]", *MODES[mode])
    run_ranks(1, go, "train", keys, tmp_path / "whole", 0, "never")
    out = tmp_path / "parts"
    assert run_ranks(2, go, "train", keys, out, 6, "never") == ["preempted"] * 2
    assert run_ranks(3, go, "train", keys, out, 3, "auto") == ["preempted"] * 3
    assert run_ranks(1, go, "train", keys, out, 0, "auto") == ["done"]
    whole, parts = outcome(tmp_path / "whole"), outcome(out)
    assert parts["digests"] == whole["digests"]
    assert parts["passes"] == whole["passes"]  # the losses that were known still are
    states = [
        load_file(str(tmp_path / name / "checkpoints" / "final.safetensors"))
        for name in ("whole", "parts")
    ]
    for name, value in states[0].items():
        np.testing.assert_allclose(states[1][name], value, rtol=0, atol=1e-9)


def test_a_signal_on_any_rank_stops_all_of_them(tmp_path: Path) -> None:
    loss = (f"model.loss={__name__}:KillingLoss",)
    ended = run_ranks(2, go, "train", loss, tmp_path, 0, "never")
    assert ended == ["preempted"] * 2
    status = json.loads((tmp_path / "status.json").read_text())
    assert "rank 1: SIGTERM received; the state is saved" in status["reason"]


def test_the_time_of_a_run_can_be_limited(tmp_path: Path) -> None:
    assert go("train", ("run.max_minutes=1e-6",), tmp_path, 0, "never") == "preempted"
    assert "run.max_minutes is over" in (tmp_path / "status.json").read_text()


def test_changed_keys_are_told_and_refused_unless_allowed(tmp_path: Path) -> None:
    assert go("train", (), tmp_path, 2, "never") == "preempted"
    keys = ("optimizer.lr=0.1", "training.epochs=1", "data.workers=1")
    with pytest.raises(ConfigError) as caught:
        go("train", keys, tmp_path, 0, "auto")
    assert "optimizer.lr: 0.2 -> 0.1; training.epochs: 2 -> 1" in str(caught.value)
    assert "--allow-changed optimizer.lr --allow-changed training.epochs" in str(caught.value)
    mistyped = {"resume": "auto", "allow_changed": ["optimizer.rl"]}
    with pytest.raises(UsageError, match=r"optimizer\.rl: .* did you mean 'optimizer\.lr'"):
        job.execute("train", small(*ALWAYS, *keys), tmp_path, **mistyped)
    other = {"resume": "auto", "allow_changed": ["model.score"]}
    with pytest.raises(ConfigError, match=r"model\.score: '' -> 'loss': a run keeps its scores"):
        job.execute("train", small(*ALWAYS, "model.score=loss"), tmp_path, **other)
    other = {"resume": "auto", "allow_changed": ["stream.experiences"]}
    with pytest.raises(ConfigError, match=r"experiences: 3 -> 4: a run keeps its experiences"):
        job.execute("train", small(*ALWAYS, "stream.experiences=4"), tmp_path, **other)
    job.execute(
        "train",
        small(*ALWAYS, *keys),
        tmp_path,
        resume="auto",
        allow_changed=["optimizer.lr", "training.epochs"],
    )
    assert "data.workers: 0 -> 1" in (tmp_path / "log.txt").read_text()


CHANGED = {
    "history is copied": ("continual_learning.history_store=copy",),
    "another optimizer": ("optimizer.name=adam", "optimizer.momentum=0"),
    "another draw": ("priority.draw=systematic",),
    "a batch of another size": ("training.batch_size=30",),
    "another source of scores": ("priority.source=online", "priority.signal=entropy"),
}


@pytest.mark.parametrize("change", CHANGED)
def test_a_change_that_is_allowed_goes_on_or_is_refused_by_its_key(
    change: str, tmp_path: Path
) -> None:
    keys = ("optimizer.momentum=0.9", "continual_learning.update_mode=er")
    assert go("train", keys, tmp_path, 9, "never") == "preempted"
    config = small(*ALWAYS, *keys, *CHANGED[change])
    allowed = [key.partition("=")[0] for key in CHANGED[change]]
    refused = {
        "another draw": "saved with draw = 'multinomial', but this sampler has 'systematic'",
        "a batch of another size": "saved with global_batch_size = 20, but this sampler has 30",
        "another source of scores": "saved with window = None, but this sampler has 10",
    }
    if change in refused:
        with pytest.raises(CheckpointError, match=f"cannot go on: .*{refused[change]}"):
            job.execute("train", config, tmp_path, resume="auto", allow_changed=allowed)
        return
    job.execute("train", config, tmp_path, resume="auto", allow_changed=allowed)
    assert all(np.isfinite(r["final_loss"]) for r in _rounds(tmp_path))


def _rounds(out: Path) -> list[dict[str, Any]]:
    return json.loads((out / "summary.json").read_text())["rounds"]


def _arrays(path: Path, rows: int, turned: bool = False) -> None:
    rng = np.random.default_rng(0)
    x, y = rng.random((rows, 8), dtype=np.float32), np.arange(rows) % 4
    np.savez(path, x=x, y=3 - y if turned else y)


def test_other_data_are_refused_unless_allowed(tmp_path: Path) -> None:
    path, out = tmp_path / "d.npz", tmp_path / "run"
    _arrays(path, 500)
    keys = (
        "stream.source=arrays",
        f"stream.path={path}",
        "stream.drift=none",
        "training.pretrain_epochs=0",
        "continual_learning.update_mode=er",
    )
    assert run_ranks(1, go, "train", keys, out, 9, "never") == ["preempted"]
    _arrays(path, 500, turned=True)
    with pytest.raises(DataError) as caught:
        go("train", keys, out, 0, "auto")
    assert "the data differ" in str(caught.value)
    assert "labels of training samples" in str(caught.value)
    assert "--allow-changed data" in str(caught.value)
    _arrays(path, 220)
    config = small(*ALWAYS, *keys)
    with pytest.raises(DataError, match=r"history of checkpoint .*: sample \d+ is not in the"):
        job.execute("train", config, out, resume="auto", allow_changed=["data"])
    _arrays(path, 500, turned=True)
    job.execute("train", config, out, resume="auto", allow_changed=["data"])
    assert "[resume] the data changed since the checkpoint: " in (out / "log.txt").read_text()


def test_resume_names_what_it_cannot_use(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="'nowhere' does not exist"):
        go("train", (), tmp_path / "other", 0, "nowhere")
    assert go("train", (), tmp_path, 2, "never") == "preempted"
    with pytest.raises(CheckpointError, match="is of 'distcl train', not 'distcl run'"):
        go("run", (), tmp_path, 0, "auto")


def test_auto_without_a_checkpoint_begins_anew(tmp_path: Path) -> None:
    assert go("train", (), tmp_path, 0, "auto") == "done"
