"""Whole runs that a user would see fail: exit codes and one sentence, on one rank and on two."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests import forked
from tests.spawn import distcl

CONFIG = "configs/digits.toml"
QUICK = ("--set", "training.epochs=1", "--set", "training.pretrain_epochs=1")


def _line(errors: str) -> str:
    """The one line that distcl printed among what the launcher says."""
    lines = [line for line in errors.splitlines() if line.startswith("distcl: ")]
    assert len(lines) == 1, errors
    return lines[0]


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_loss_that_becomes_nan_names_round_step_and_rank(ranks: int, tmp_path: Path) -> None:
    out = tmp_path / "run"
    result = distcl(
        "train", CONFIG, "--set", "optimizer.lr=1e9", "--out", str(out), "--quiet", ranks=ranks
    )
    line = _line(result.stderr)
    assert "the loss became nan in round 0, step " in line
    assert "on rank " in line
    assert "sample ids: " in line
    assert result.returncode == (4 if ranks == 1 else 1)  # torchrun swallows a worker's code
    status = json.loads((out / "status.json").read_text())
    assert status["state"] == "failed"
    assert status["exit_code"] == 4
    assert status["reason"] in line


def test_a_batch_smaller_than_the_number_of_ranks_is_refused(tmp_path: Path) -> None:
    result = forked.distcl(
        "train", CONFIG, "--set", "training.batch_size=1", "--out", str(tmp_path), ranks=2
    )
    assert "training.batch_size = 1 is smaller than the number of processes, 2" in _line(
        result.stderr
    )
    assert result.returncode != 0


def test_fewer_processes_than_asked_for_stops_with_what_to_type(tmp_path: Path) -> None:
    result = distcl("train", CONFIG, "--set", "parallel.processes=2", "--out", str(tmp_path))
    assert result.returncode == 2
    assert "torchrun --nproc-per-node 2 -m distcl" in _line(result.stderr)


def test_an_output_folder_that_is_a_file_is_refused(tmp_path: Path) -> None:
    blocked = tmp_path / "blocked"
    blocked.write_text("")
    result = forked.distcl("train", CONFIG, "--out", str(blocked / "run"))
    assert result.returncode == 2
    assert f"the run folder '{blocked / 'run'}' is not writable" in _line(result.stderr)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("absent", "does not exist"),
        ("nan", "row 3"),
        ("lengths", "samples"),
        ("labels", "-1"),
        ("objects", "object"),
        ("truncated", "truncated"),
    ],
)
def test_bad_array_files_end_with_exit_code_3(bad: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "data.npz"
    x, y = np.random.default_rng(0).random((40, 6), dtype=np.float32), np.arange(40) % 4
    if bad == "nan":
        x[3, 2] = np.nan
    if bad == "labels":
        y[5] = -1
    arrays = {"x": x, "y": y[:-1] if bad == "lengths" else y}
    if bad == "objects":
        arrays["y"] = np.array([{}] * 40, dtype=object)
    if bad != "absent":
        np.savez(path, **arrays)
    if bad == "truncated":
        path.write_bytes(path.read_bytes()[:-200])
    keys = ('stream.source="arrays"', f'stream.path="{path}"', 'stream.drift="permute"')
    result = forked.distcl("train", *(w for k in keys for w in ("--set", k)), CONFIG, "--out",
                    str(tmp_path / "run"))  # fmt: skip
    line = _line(result.stderr)
    assert result.returncode == 3
    assert str(path) in line
    assert message in line


def test_torchrun_run_detects_drift_and_finishes(tmp_path: Path) -> None:
    result = distcl("run", CONFIG, *QUICK[:2], "--out", str(tmp_path), "--quiet", ranks=2)
    assert result.returncode == 0, result.stderr
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["world_size"] == 2
    assert len(summary["drifts"]) >= 1
    assert len(summary["accuracy"]) >= 4
    assert all(len(row) == len(summary["accuracy"]) for row in summary["accuracy"])
    assert json.loads((tmp_path / "status.json").read_text())["state"] == "done"
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert all({"round", "step", "time"} <= set(json.loads(line)) for line in lines)
    assert "[priority/cur] n=" in (tmp_path / "log.txt").read_text()
