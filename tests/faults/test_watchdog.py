"""A rank that hangs is named, and where it hangs is in the log."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.spawn import free_port, rank_environment

ROOT = Path(__file__).parent.parent.parent

RANK = """
import ctypes, logging, os, signal, sys, time
from pathlib import Path
import torch
from distcl.config import RunConfig
from distcl.distributed.runtime import Runtime

def lost_in_thought(how):
    if how == "sleeps":
        time.sleep(1000)
    elif how == "clings to the interpreter":
        ctypes.PyDLL(None).sleep(1000)
    elif how == "is stopped":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif how == "is slow":
        time.sleep(14)

how, culprit, log = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
logging.getLogger("distcl").addHandler(logging.FileHandler(log))
runtime = Runtime(RunConfig(timeout_seconds=20 if how == "is slow" else 5))
runtime.watchdog.write_to(log)
model = runtime.prepare(torch.nn.Linear(4, 4))
try:
    with runtime.guard():
        for step in range(40):
            if step == 5 and runtime.rank == culprit:
                lost_in_thought(how)
            runtime.watchdog.beat()
            model(torch.ones(1, 4)).sum().backward()   # a collective within backward
        time.sleep(1.5)
except Exception as error:
    print(f"told: {error}", file=sys.stderr, flush=True)
    os._exit(getattr(error, "exit_code", 1))
"""


def _run(how: str, culprit: int, log: Path, world: int = 2) -> tuple[list[int | None], str]:
    port = free_port()
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, how, str(culprit), str(log)],
            env=os.environ | rank_environment(rank, world, port),
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    deadline = time.monotonic() + 100
    waiting = [p for rank, p in enumerate(processes) if how != "is stopped" or rank != culprit]
    while any(p.poll() is None for p in waiting) and time.monotonic() < deadline:
        time.sleep(0.1)
    codes = [p.poll() for p in processes]
    for process in processes:
        process.kill()
    return codes, "".join(p.communicate()[1] for p in processes)


@pytest.mark.parametrize("culprit", [0, 1])
def test_a_rank_that_hangs_is_named_with_its_stack(culprit: int, tmp_path: Path) -> None:
    codes, errors = _run("sleeps", culprit, tmp_path / "log.txt")
    assert codes == [1, 1], errors
    log = (tmp_path / "log.txt").read_text()
    named = f"no progress for 2 s: rank {culprit} hangs at <string>:"
    assert named in log
    assert "in lost_in_thought" in log
    assert f"stack of rank {1 - culprit}:" in log
    assert f"rank {culprit} hangs at <string>:" in errors
    assert f"rank {1 - culprit} hangs" not in log + errors


def test_a_rank_that_never_lets_go_of_the_interpreter_ends_with_its_stack(tmp_path: Path) -> None:
    codes, errors = _run("clings to the interpreter", 1, tmp_path / "log.txt")
    assert codes == [1, 1], errors
    log = (tmp_path / "log.txt").read_text()
    assert "rank 1 does not answer" in log
    assert "Timeout (0:00:05)!" in log
    assert "in lost_in_thought" in log


def test_a_rank_that_is_stopped_is_named(tmp_path: Path) -> None:
    codes, errors = _run("is stopped", 1, tmp_path / "log.txt")
    assert codes[0] == 1, errors
    assert "rank 1 does not answer" in errors


def test_a_slow_rank_is_reported_and_goes_on(tmp_path: Path) -> None:
    codes, errors = _run("is slow", 1, tmp_path / "log.txt")
    assert codes == [0, 0], errors
    log = (tmp_path / "log.txt").read_text()
    assert "rank 1 hangs at <string>:" in log
    assert "rank 0 gets on again" in log
