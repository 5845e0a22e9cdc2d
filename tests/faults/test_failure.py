"""Failure on one rank becomes failure on all, quickly, with the cause told once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.spawn import free_port, rank_environment

ROOT = Path(__file__).parent.parent.parent

RANK = """
import os, sys, time
import torch
from distcl.distributed.runtime import Runtime
from distcl.errors import DataError

case = sys.argv[1]
runtime = Runtime()
try:
    with runtime.guard():
        print("ready", flush=True)
        for step in range(10_000):
            if step == 20 and case == "raises" and runtime.rank == 1:
                raise DataError("shard 7 is torn")
            if step == 20 and case == "bug" and runtime.rank == 0:
                {}["absent"]
            if step == 20 and case == "waits" and runtime.rank == 1:
                raise DataError("shard 7 is torn")
            if step >= 20 and case == "waits" and runtime.rank == 0:
                time.sleep(1)   # not inside a collective: only the watching thread can notice
            else:
                runtime.all_reduce(torch.ones(1))
                time.sleep(0.01)
except Exception as error:
    if runtime.is_main:
        print(f"told: {error}", file=sys.stderr, flush=True)
    os._exit(getattr(error, "exit_code", 1))  # as the command line does, and for its reason
"""


def _start(case: str, world: int = 2) -> list[subprocess.Popen[str]]:
    port = free_port()
    return [
        subprocess.Popen(
            [sys.executable, "-c", RANK, case],
            env=os.environ | rank_environment(rank, world, port),
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]


def _end(processes: list[subprocess.Popen[str]], timeout: float) -> tuple[list[int], str]:
    try:
        errors = [p.communicate(timeout=timeout)[1] for p in processes]
    finally:
        for p in processes:
            p.kill()
    return [p.returncode for p in processes], "".join(errors)


@pytest.mark.parametrize(
    ("case", "cause"),
    [("raises", "shard 7 is torn"), ("waits", "shard 7 is torn"), ("bug", "absent")],
)
def test_an_exception_on_one_rank_ends_all_with_its_cause_told_once(case: str, cause: str) -> None:
    processes = _start(case)
    codes, errors = _end(processes, timeout=60)
    assert codes == ([3, 3] if case != "bug" else [1, 1])
    assert errors.count(cause) == 1, errors
    assert "Traceback" not in errors


@pytest.mark.parametrize("victim", [0, 1])
def test_killing_one_of_two_ranks_ends_the_other(victim: int) -> None:
    processes = _start("runs")
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    processes[victim].send_signal(signal.SIGKILL)
    begun = time.monotonic()
    codes, errors = _end(processes, timeout=60)
    assert time.monotonic() - begun < 60
    assert codes[victim] == -signal.SIGKILL
    assert codes[1 - victim] == 1
    assert "lost contact with" in errors
    assert "Traceback" not in errors
