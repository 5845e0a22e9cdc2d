"""What a run has imported when it takes its first step: no more than it needs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

LOOK = """
import json, os, sys, traceback
from importlib.abc import MetaPathFinder

class Note(MetaPathFinder):
    "Notes which of torch's files had torch._dynamo imported."

    def find_spec(self, name, path=None, target=None):
        if name == "torch._dynamo" and "DYNAMO" not in os.environ:
            files = [f.filename for f in traceback.extract_stack() if "importlib" not in f.filename]
            os.environ["DYNAMO"] = [f for f in files if not f.endswith("torch/_compile.py")][-2]

sys.meta_path.insert(0, Note())

from distcl.cli.app import main

def step(self, *args):
    with open("modules.json", "w") as file:
        json.dump({"names": sorted(sys.modules), "dynamo": os.environ.get("DYNAMO", "")}, file)
    raise SystemExit("seen")

if __name__ == "__main__":
    from distcl import register
    import look
    register("updater", "look", "look:create")
    main()

def create(setup):
    from distcl.updaters.base import Updater

    class Look(Updater):
        update_pre_fwd_bwd = step

    return Look(setup)
"""


@pytest.mark.parametrize("command", ["train", "run"])
def test_a_first_step_needs_no_plots_and_a_detector_only_where_one_watches(command, tmp_path):
    (tmp_path / "look.py").write_text(LOOK)
    keys = ["continual_learning.update_mode=look", "stream.experiences=2", "run.out=out"]
    sets = [word for key in keys for word in ("--set", key)]
    done = subprocess.run(
        [sys.executable, "look.py", command, str(ROOT / "configs" / "digits.toml"), *sets],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert (tmp_path / "modules.json").exists(), done.stderr
    seen = json.loads((tmp_path / "modules.json").read_text())
    assert "torch" in seen["names"]
    unneeded = {"matplotlib", "wandb", "datasets", "deepspeed", "timm"}
    unneeded |= {"scipy.stats", "sklearn"} if command == "train" else set()  # river has it
    assert not unneeded & set(seen["names"])
    assert ("river" in seen["names"]) == (command == "run")
    assert seen["dynamo"] == "" or "/torch/" in seen["dynamo"]  # its optimizers do it themselves
