"""The sweep file, run as W&B's agent runs it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

pytest.importorskip("wandb", reason="the package wandb is not installed")

ROOT = Path(__file__).parents[2]
SWEEP = yaml.safe_load((ROOT / "launch" / "wandb-sweep.yaml").read_text())


def test_the_sweep_runs_uniform_against_prioritized_draws(tmp_path):
    parameters = SWEEP["parameters"]
    assert parameters["continual_learning.importance_alpha"]["values"] == [0.0, 1.0]
    chosen = [f"{name}={part['values'][0]}" for name, part in parameters.items()]
    macros = {"${env}": ["/usr/bin/env"], "${args_no_hyphens}": chosen}
    command = [piece for part in SWEEP["command"] for piece in macros.get(part, [part])]
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    short = {"DISTCL_TRAINING__EPOCHS": "1", "DISTCL_TRAINING__PRETRAIN_EPOCHS": "1"}
    environment = {
        "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin",
        "HOME": str(tmp_path),
        "OMP_NUM_THREADS": "1",
        "WANDB_SWEEP_ID": "s1",  # as the agent sets it
        **short,
    }
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, timeout=150)
    (run,) = (tmp_path / "runs" / "sweep-s1").iterdir()
    assert run.name == "-".join(chosen)
    assert SWEEP["metric"]["name"] in json.loads((run / "summary.json").read_text())
    assert list(run.glob("wandb/offline-run-*"))
