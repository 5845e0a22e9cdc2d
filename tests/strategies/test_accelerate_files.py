"""The files of launch/accelerate that need no DeepSpeed: one is run, all are read by accelerate."""

import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file

from tests.runs import read
from tests.small import SMALL
from tests.spawn import free_port

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "launch" / "accelerate"


@pytest.mark.parametrize("name", ["one_gpu", "eight_gpus", "several_nodes", "cpu"])
def test_accelerate_reads_the_file(name):
    found = load_config_from_file(str(FOLDER / f"{name}.yaml"))
    counts = {"one_gpu": 1, "eight_gpus": 8, "several_nodes": 16, "cpu": 2}
    assert found.num_processes == counts[name]


@pytest.mark.parametrize(
    ("name", "more", "processes"),
    [
        ("cpu", (), "2 processes"),
        ("eight_gpus", ("--num_processes", "2"), "2 processes"),
        ("one_gpu", (), "1 process"),
    ],
)
def test_accelerate_launch_starts_what_the_file_says(name, more, processes, tmp_path):
    port = () if name == "one_gpu" else ("--main_process_port", str(free_port()))
    sets = [word for one in SMALL for word in ("--set", one)]
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "accelerate.commands.launch",
            "--config_file",
            str(FOLDER / f"{name}.yaml"),
            *more,
            *port,
            "-m",
            "distcl",
            "train",
            "configs/digits.toml",
            *sets,
            "--out",
            str(tmp_path / "run"),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=150,
    )
    assert done.returncode == 0, done.stderr
    assert f"started by accelerate launch: {processes}; " in read(tmp_path / "run", "log.txt")
