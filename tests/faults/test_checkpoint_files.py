"""Checkpoints on disk: whole or absent, verified, never unpickled."""

from __future__ import annotations

import json
import pickle
import resource
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from distcl.checkpoint.store import MANIFEST, CheckpointStore, load, rank_file, sealed, verify
from distcl.distributed.runtime import Runtime
from distcl.errors import CheckpointError
from tests.spawn import run_ranks


def _save(folder: Path, steps: tuple[int, ...], scores: tuple[float, ...], keep: int) -> list[str]:
    runtime = Runtime()
    warned: list[str] = []
    store = CheckpointStore(runtime, folder, keep, warned.append)
    for step, score in zip(steps, scores, strict=True):
        weight = torch.full((4,), float(step))
        store.save(
            step,
            {"slice": torch.full((3,), float(runtime.rank)), "step": step},
            {"who": "rank 0", "list": [1, (2, 3)]},
            {"w": weight},
            {"score": score, "config": {}},
        )
        weight.fill_(-1)  # training goes on while the file is written
        assert store.finish()
    return warned


def test_two_ranks_write_one_checkpoint_that_verifies(tmp_path: Path) -> None:
    run_ranks(2, _save, tmp_path, (7,), (0.5,), 2)
    path = tmp_path / "step-00000007"
    manifest = verify(path)
    assert manifest["world_size"] == 2
    assert set(manifest["files"]) == {
        "rank-00000.pt",
        "rank-00001.pt",
        "shared.pt",
        "model.safetensors",
    }
    assert load(path / "rank-00001.pt")["slice"].tolist() == [1.0, 1.0, 1.0]
    assert load(path / "shared.pt") == {"who": "rank 0", "list": [1, [2, 3]]}
    assert load(path / "model.safetensors")["w"].tolist() == [7.0] * 4
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_the_newest_and_the_best_stay(tmp_path: Path) -> None:
    _save(tmp_path, (1, 2, 3, 4, 5), (0.1, 0.9, 0.2, 0.3, 0.4), keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"step-0000000{k}" for k in (2, 4, 5)]


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "flipped": (lambda p: _flip(p / "shared.pt"), "shared.pt' is damaged"),
    "truncated": (
        lambda p: (p / rank_file(0)).write_bytes((p / rank_file(0)).read_bytes()[:-9]),
        "bytes, not",
    ),
    "missing": (lambda p: (p / "model.safetensors").unlink(), "model.safetensors' is missing"),
    "empty": (lambda p: (p / "model.safetensors").write_bytes(b""), "has 0 bytes, not"),
    "manifest": (lambda p: (p / MANIFEST).write_text("{"), "it is not JSON"),
    "a number": (
        lambda p: (p / MANIFEST).write_text(
            (p / MANIFEST).read_text().replace('"step": 2', '"step": 3')
        ),
        "manifest.json' is damaged",
    ),
    "no manifest": (lambda p: (p / MANIFEST).unlink(), "No such file"),
    "schema": (
        lambda p: (p / MANIFEST).write_text(json.dumps({"schema": 0, "files": {}})),
        "has schema 0; this version reads 3",
    ),
    "escape": (
        lambda p: (p / MANIFEST).write_text(
            json.dumps(
                sealed(
                    (found := json.loads((p / MANIFEST).read_text()))
                    | {"files": {"../x": {"bytes": 1, "sha256": ""}} | found["files"]}
                )
            )
        ),
        "names a file outside itself: '../x'",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named_and_the_checkpoint_before_is_used(damage: str, tmp_path: Path) -> None:
    _save(tmp_path, (1, 2), (0.0, 0.0), keep=3)
    harm, message = DAMAGE[damage]
    harm(tmp_path / "step-00000002")
    with pytest.raises(CheckpointError, match=message):
        verify(tmp_path / "step-00000002")
    warned: list[str] = []
    store = CheckpointStore(Runtime(), tmp_path, 3, warned.append)
    assert store.newest() == tmp_path / "step-00000001"
    assert len(warned) == 1
    assert "falling back to the one before" in warned[0]


def test_a_link_out_of_a_checkpoint_is_not_followed(tmp_path: Path) -> None:
    _save(tmp_path / "run", (1,), (0.0,), keep=1)
    path = tmp_path / "run" / "step-00000001"
    (path / "shared.pt").rename(tmp_path / "elsewhere")
    (path / "shared.pt").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="names a file outside itself"):
        verify(path)


def test_a_pickle_is_never_executed(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "executed",))

    for name, write in (
        ("a.pt", torch.save),
        ("b.pt", lambda o, p: p.write_bytes(pickle.dumps(o))),
    ):
        write(Evil(), tmp_path / name)
        with pytest.raises(CheckpointError, match="cannot be read"):
            load(tmp_path / name)
    assert not (tmp_path / "executed").exists()


def _disk_full(folder: Path) -> tuple[list[str], bool]:
    runtime = Runtime()
    warned: list[str] = []
    store = CheckpointStore(runtime, folder, 2, warned.append)
    store.save(1, {}, {}, {"w": torch.zeros(8)}, {"config": {}})
    assert store.finish()
    if runtime.rank == 1:  # this rank cannot write more than 64 KiB
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, resource.RLIM_INFINITY))
    store.save(2, {"big": torch.zeros(1 << 16)}, {}, {"w": torch.zeros(8)}, {"config": {}})
    return warned, store.finish()


def test_a_full_disk_on_one_rank_keeps_the_last_good_checkpoint(tmp_path: Path) -> None:
    (warned, good), (_, good_elsewhere) = run_ranks(2, _disk_full, tmp_path)
    assert not good
    assert not good_elsewhere
    assert len(warned) == 1
    assert "the checkpoint of step 2 was not written (rank 1: " in warned[0]
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]


def test_what_an_interrupted_writer_left_is_cleaned(tmp_path: Path) -> None:
    (tmp_path / ".partial-00000009").mkdir()
    store = CheckpointStore(Runtime(), tmp_path, 2, print)
    store.clean()
    assert store.newest() is None
    assert list(tmp_path.iterdir()) == []
