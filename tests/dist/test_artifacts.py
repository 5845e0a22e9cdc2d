"""What a run leaves can be evaluated, inspected, verified and exported."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from distcl.checkpoint.export import describe_checkpoint, evaluate, export, verify_all
from distcl.checkpoint.store import SCHEMA, sealed
from distcl.errors import CheckpointError
from tests.small import execute
from tests.forked import distcl
from tests.files import shard_folder


def test_a_run_and_its_checkpoints_are_evaluated_and_exported(tmp_path: Path) -> None:
    run = tmp_path / "run"
    summary = execute("train", ("run.precision=fp64",), run)
    result = evaluate(run)
    assert result["accuracy"] == summary["accuracy"][-1]
    newest = sorted((run / "checkpoints").glob("step-*"))[-1]
    assert evaluate(newest)["accuracy"] == summary["accuracy"][-1]
    assert describe_checkpoint(newest)["where"] == "between rounds"
    assert describe_checkpoint(newest)["rounds"] == 2
    assert describe_checkpoint(run) == describe_checkpoint(newest)
    assert list(verify_all(run)) == [str(p) for p in sorted((run / "checkpoints").glob("step-*"))]
    assert set(verify_all(run).values()) == {3}

    weights, config = export(newest, tmp_path / "export")
    exported, final = load_file(weights), load_file(run / "checkpoints" / "final.safetensors")
    assert {k: v.tobytes() for k, v in exported.items()} == {
        k: v.tobytes() for k, v in final.items()
    }
    assert tomllib.loads(config.read_text())["run"]["precision"] == "fp64"
    with pytest.raises(CheckpointError, match="exists"):
        export(newest, tmp_path / "export")


def test_eval_reads_the_data_as_the_run_did(tmp_path: Path) -> None:
    shard_folder(tmp_path / "sh", [60, 40, 40])
    keys = (
        "stream.source=shards",
        f"stream.path={tmp_path / 'sh'}",
        "stream.drift=none",
        "stream.experiences=1",
        "stream.samples_per_experience=0",
        "training.pretrain_epochs=0",
        "training.epochs=20",
        f"data.transforms=[{{name='{__name__}:by_label'}}]",
        "data.on_bad_sample=skip",
        "data.workers=1",
    )
    summary = execute("train", keys, tmp_path / "run")
    assert summary["average_accuracy"] == 1.0
    assert evaluate(tmp_path / "run")["accuracy"] == summary["accuracy"][-1]


def by_label(sample: dict[str, Any]) -> dict[str, Any]:
    """Samples that only a transform makes easy to tell apart."""
    turn = sample["npy"][0] % 3 * 2 * np.pi / 3
    return sample | {"npy": 3 * np.array([np.cos(turn), np.sin(turn)], np.float32)}


def test_the_commands_say_what_is_wrong(tmp_path: Path) -> None:
    result = distcl("eval", str(tmp_path))
    assert result.returncode == 5
    assert "is neither a run folder (no config.toml) nor a checkpoint" in result.stderr
    manifest = {"schema": SCHEMA, "step": 1, "world_size": 1, "config": {}}
    names = ("model.safetensors", "shared.pt", "rank-00000.pt")
    files = {name: {"bytes": 1, "sha256": "0" * 64} for name in names}
    (tmp_path / "manifest.json").write_text(json.dumps(sealed(manifest | {"files": files})))
    result = distcl("checkpoint", "verify", str(tmp_path))
    assert result.returncode == 5
    assert result.stderr.count("\n") == 1
    assert "/model.safetensors' is missing" in result.stderr
