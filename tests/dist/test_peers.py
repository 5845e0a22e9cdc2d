"""Processes that cannot work together are refused before they start."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from tests.spawn import free_port, rank_environment, run_ranks

ROOT = Path(__file__).parents[2]


def _ahead() -> str:
    import time

    from distcl import Runtime
    from distcl.errors import UsageError

    real = time.time
    if os.environ["RANK"] == "1":
        time.time = lambda: real() + 100
    try:
        Runtime()
    except UsageError as error:
        return str(error)
    return ""


def test_a_clock_that_is_ahead_is_refused_on_all_ranks():
    first, second = run_ranks(2, _ahead)
    assert first == second
    assert first.startswith("the clock of rank 1 on ")
    assert " 100 s ahead of rank 0's on " in first


def _about() -> tuple[str, int]:
    from distcl import Runtime

    runtime = Runtime()
    try:
        return runtime.about, len(runtime.peers)
    finally:
        runtime.close()


def test_ranks_know_each_other():
    told = run_ranks(2, _about)
    assert told[0] == told[1]
    line, count = told[0]
    assert count == 2
    assert line.startswith("started by RANK and WORLD_SIZE: 2 processes; ")
    assert ": ranks 0 to 1 on cpu; distcl 0." in line


def test_ranks_that_run_other_code_are_refused_by_name(tmp_path):
    shutil.copytree(ROOT / "distcl", tmp_path / "distcl")
    with (tmp_path / "distcl" / "losses.py").open("a") as file:
        file.write("# a line more\n")
    port = free_port()
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "distcl", "train", str(ROOT / "configs/digits.toml")],
            env=os.environ | rank_environment(rank, 2, port) | {"PYTHONPATH": str(folder)},
            cwd=folder,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, folder in enumerate((ROOT, tmp_path))
    ]
    try:
        errors = [process.communicate(timeout=120)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert processes[0].returncode == 2
    assert processes[1].returncode != 0  # 2, or 1 if rank 0, which hosts the store, left first
    assert errors[0].startswith("distcl: rank 1 on ")
    assert "install the same on every node" in errors[0]
    assert errors[1] == ""


def test_ranks_that_read_another_configuration_are_refused_by_name(tmp_path):
    port = free_port()
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "distcl", "train", "configs/digits.toml", "--out", tmp_path],
            env=os.environ | rank_environment(rank, 2, port) | {"DISTCL_RUN__SEED": str(rank)},
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        errors = [process.communicate(timeout=120)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [2, 2]
    assert " has 'seed = 1' where rank 0 has 'seed = 0'; give all processes the same" in errors[0]
    assert list(tmp_path.iterdir()) == []
