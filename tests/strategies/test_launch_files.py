"""The launch files of a strategy start runs that agree with DDP's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.layouts import DEEPSPEED, WITHOUT
from tests.spawn import distcl, free_port

ROOT = Path(__file__).parents[2]
CONFIG = "configs/digits-zero3.toml"
QUICK = (
    "training.pretrain_epochs=1",
    "training.batch_size=31",
    "stream.samples_per_experience=90",
    "continual_learning.fisher_samples=20",
)
ENVIRONMENT = {k: v for k, v in os.environ.items() if not k.startswith(("DISTCL_", "ACCELERATE_"))}
without_deepspeed = pytest.mark.skipif(not DEEPSPEED, reason=WITHOUT)


def _launch(
    strategy: str, out: Path, *launcher: str, keys: tuple[str, ...] = ()
) -> subprocess.CompletedProcess[str]:
    keys = (*QUICK, f"parallel.strategy={strategy}", *keys)
    start = [sys.executable, "-m", "accelerate.commands.launch", *launcher]
    start += ["--main_process_port", str(free_port()), "-m", "distcl", "train", CONFIG]
    return subprocess.run(
        [*start, *(w for k in keys for w in ("--set", k)), "--out", str(out), "--quiet"],
        env=ENVIRONMENT | {"OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=170,
        check=False,
    )


def _result(out: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    summary = json.loads((out / "summary.json").read_text())
    return summary, load_file(out / "checkpoints" / "final.safetensors")


@pytest.fixture(scope="module")
def ddp(tmp_path_factory: Any) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    out = tmp_path_factory.mktemp("ddp")
    keys = (*QUICK, 'parallel.strategy="ddp"')
    words = [w for k in keys for w in ("--set", k)]
    done = distcl("train", CONFIG, *words, "--out", str(out), ranks=2)
    assert done.returncode == 0, done.stderr
    return _result(out)


@pytest.mark.parametrize(
    "strategy",
    [
        "fsdp2",
        pytest.param("zero2", marks=without_deepspeed),
        pytest.param("zero3", marks=without_deepspeed),
    ],
)
def test_a_launch_file_starts_its_strategy_and_agrees_with_ddp(
    strategy: str, ddp: Any, tmp_path: Path
) -> None:
    done = _launch(strategy, tmp_path, "--config_file", f"launch/accelerate/{strategy}.yaml")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("[INFO]") == 0
    summary, weights = _result(tmp_path)
    assert summary["world_size"] == 2
    assert summary["strategy"] == strategy
    digests = [[r["draws_sha256"] for r in s["rounds"]] for s in (summary, ddp[0])]
    assert digests[0] == digests[1]
    for name, value in ddp[1].items():
        np.testing.assert_allclose(weights[name], value, rtol=0, atol=1e-5)


@without_deepspeed
def test_flags_of_accelerate_launch_and_a_deepspeed_file_of_ours_go_together(
    ddp: Any, tmp_path: Path
) -> None:
    flags = ("--use_deepspeed", "--zero_stage", "1", "--num_processes", "2")
    file = "parallel.deepspeed_config=launch/deepspeed/zero1.json"
    done = _launch("zero1", tmp_path, *flags, keys=(file,))
    assert done.returncode == 0, done.stderr
    summary, weights = _result(tmp_path)
    assert summary["strategy"] == "zero1"
    for name, value in ddp[1].items():
        np.testing.assert_allclose(weights[name], value, rtol=0, atol=1e-5)


def test_a_launcher_that_asks_for_another_strategy_is_told_by_key(tmp_path: Path) -> None:
    done = distcl(
        "train",
        CONFIG,
        "--out",
        str(tmp_path),
        ACCELERATE_USE_DEEPSPEED="true",
        ACCELERATE_DEEPSPEED_ZERO_STAGE="2",
    )
    assert done.returncode == 2
    expected = "accelerate launch asks for 'zero2', but parallel.strategy = 'zero3'"
    assert expected in done.stderr
