"""When checkpoints are written, which stay, and that training does not wait for the disk."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch

from distcl import job
from distcl.checkpoint import store as checkpoint
from distcl.checkpoint.store import CheckpointStore, read_manifest, verify
from distcl.distributed.runtime import Runtime
from distcl.training.build import Quiet
from tests.small import small

QUICK = (
    "run.poll_steps=2",
    "stream.samples_per_experience=121",
    "training.batch_size=20",
    "checkpoint.every_round=false",
    "checkpoint.every_minutes=0",
)


def _steps(out: Path) -> list[int]:
    return sorted(read_manifest(p)["step"] for p in (out / "checkpoints").glob("step-*"))


def test_by_steps_by_rounds_or_not_at_all(tmp_path: Path) -> None:
    found = {}
    for name, keys in {
        "never": (),
        "rounds": ("checkpoint.every_round=true", "checkpoint.keep=99"),
        "steps": ("checkpoint.every_steps=4", "checkpoint.keep=99"),
    }.items():
        job.execute("train", small(*QUICK, *keys), tmp_path / name)
        found[name] = _steps(tmp_path / name)
    assert found["never"] == []
    assert len(found["rounds"]) == 3  # the pretraining, and two rounds
    within = [b - a for a, b in zip(found["steps"], found["steps"][1:], strict=False)]
    assert len(found["steps"]) >= 5
    assert min(within) >= 4


def test_by_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = ("checkpoint.every_minutes=0.01", "checkpoint.keep=99")  # 0.6 s

    class Slow(Quiet):
        def step(self, done: int, value: float, samples_per_second: float) -> None:
            saved.append(len(list((tmp_path / "checkpoints").glob("step-*"))))
            time.sleep(0.25)

    saved: list[int] = []
    begun = time.monotonic()
    job.execute("train", small(*QUICK, *keys), tmp_path, Slow())
    seconds = time.monotonic() - begun
    assert 2 <= len(_steps(tmp_path)) <= seconds / 0.6
    assert saved[0] == 0


def test_the_best_stays_whatever_its_age(tmp_path: Path) -> None:
    keys = ("checkpoint.every_round=true", "checkpoint.keep=1", "stream.experiences=4")
    job.execute("train", small(*QUICK, *keys), tmp_path)
    kept = {s["step"]: s["score"] for s in map(read_manifest, _paths(tmp_path))}
    rows = json.loads((tmp_path / "summary.json").read_text())["accuracy"]
    assert max(kept) == sum(r["steps"] for r in _rounds(tmp_path)) + _pretraining(tmp_path)
    scores = [sum(row[: k + 1]) / (k + 1) for k, row in enumerate(rows)]
    assert max(s for s in kept.values()) == pytest.approx(max(scores))
    assert len(kept) <= 2


def _paths(out: Path) -> list[Path]:
    return sorted((out / "checkpoints").glob("step-*"))


def _rounds(out: Path) -> list[dict[str, int]]:
    found: list[dict[str, int]] = json.loads((out / "summary.json").read_text())["rounds"]
    return found


def _pretraining(out: Path) -> int:
    return int(json.loads((out / "summary.json").read_text())["pretrain"]["steps"])


def test_training_goes_on_while_a_slow_disk_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sync = checkpoint.sync_to_disk

    def slow(path: Path) -> None:
        time.sleep(0.7)
        sync(path)

    monkeypatch.setattr(checkpoint, "sync_to_disk", slow)
    store = CheckpointStore(Runtime(), tmp_path, 2, print)
    weight = torch.zeros(1 << 20)
    begun = time.perf_counter()
    store.save(1, {"w": weight}, {}, {"w": weight}, {"config": {}})
    stalled = time.perf_counter() - begun
    weight += 1  # a step
    assert store.pending
    assert not store.written
    assert stalled < 0.3
    assert store.finish()
    assert time.perf_counter() - begun > 2
    saved = checkpoint.load(tmp_path / "step-00000001" / checkpoint.MODEL)
    assert float(saved["w"].sum()) == 0


def test_a_run_takes_steps_while_its_checkpoint_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sync, partial = checkpoint.sync_to_disk, []

    def slow(path: Path) -> None:
        time.sleep(0.02)
        sync(path)

    class Looks(Quiet):
        def step(self, done: int, value: float, samples_per_second: float) -> None:
            partial.append(bool(list((tmp_path / "checkpoints").glob(".partial-*"))))

    monkeypatch.setattr(checkpoint, "sync_to_disk", slow)
    keys = ("checkpoint.every_steps=4", "checkpoint.keep=99", "run.poll_steps=1")
    job.execute("train", small(*QUICK, *keys), tmp_path, Looks())
    assert sum(partial) >= 5
    for path in _paths(tmp_path):
        verify(path)


def test_a_later_checkpoint_does_not_outlive_going_back(tmp_path: Path) -> None:
    store = CheckpointStore(Runtime(), tmp_path, 1, print)
    for step in (4, 8):
        store.save(step, {}, {}, {"w": torch.ones(1)}, {"config": {}, "score": None})
        assert store.finish()
    (tmp_path / "step-00000009").mkdir()  # damaged: it has no manifest
    store.go_on_from(7)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "aside-step-00000008",
        "aside-step-00000009",
    ]
    store.save(7, {}, {}, {"w": torch.ones(1)}, {"config": {}, "score": None})
    assert store.finish()
    assert store.newest() == tmp_path / "step-00000007"


def test_a_kill_while_a_checkpoint_is_replaced_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = CheckpointStore(Runtime(), tmp_path, 1, print)
    store.save(4, {}, {}, {"w": torch.ones(1)}, {"config": {}})
    assert store.finish()
    rename = checkpoint._rename

    def only_the_first(path: Path, to: Path) -> None:
        rename(path, to)
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "_rename", only_the_first)
    store.save(4, {}, {}, {"w": torch.ones(1)}, {"config": {}})
    with pytest.raises(KeyboardInterrupt):
        store.finish()
    monkeypatch.undo()
    again = CheckpointStore(Runtime(), tmp_path, 1, print)
    again.clean()
    assert again.newest() == tmp_path / "step-00000004"
