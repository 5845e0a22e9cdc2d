"""A rank that is stopped, or gone without a word: the others end in time, and say which it was."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.runs import read, wait_for
from tests.small import SMALL
from tests.spawn import free_port, rank_environment

pytestmark = pytest.mark.timeout(400)
ROOT = Path(__file__).parent.parent.parent
TIMEOUT = 12
BUSY = 5
"""Seconds that a machine which has much else to do may take longer."""
KEYS = (*SMALL, "training.epochs=4000", f"run.timeout_seconds={TIMEOUT}", "data.workers=0")

MEETING = """
import os, signal, sys
from distcl.distributed import rendezvous, runtime
from distcl.config import RunConfig

where, culprit = sys.argv[1], int(sys.argv[2])
if int(os.environ["RANK"]) == culprit:
    if where == "before the store":
        os.kill(os.getpid(), signal.SIGSTOP)
    if where == "before it introduces itself":
        runtime.introduce = lambda *_: os.kill(os.getpid(), signal.SIGSTOP)
    if where == "after it was introduced":
        introduce = runtime.introduce
        def stop(*given):
            introduce(*given)
            os.kill(os.getpid(), signal.SIGSTOP)
        runtime.introduce = stop
print("ready", flush=True)
made = runtime.Runtime(RunConfig(timeout_seconds=12))
with made.guard():
    made.barrier()
"""


def start(world: int, *command: str) -> list[subprocess.Popen[str]]:
    port = free_port()
    return [
        subprocess.Popen(
            [sys.executable, *command],
            env=os.environ | rank_environment(rank, world, port),
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]


def rest(processes: list[subprocess.Popen[str]], culprit: int, seconds: float) -> str:
    """Wait for all but one; return what they said on stderr."""
    deadline = time.monotonic() + seconds
    others = [p for rank, p in enumerate(processes) if rank != culprit]
    try:
        for process in others:
            process.wait(max(0.1, deadline - time.monotonic()))
    finally:
        for process in processes:
            process.kill()
    assert all(p.returncode == 1 for p in others), [p.returncode for p in others]
    return "".join(p.communicate()[1] for p in processes)


@pytest.mark.parametrize(
    ("culprit", "number"),
    [(0, signal.SIGSTOP), (1, signal.SIGSTOP), (0, signal.SIGKILL)],
)
def test_a_rank_that_is_stopped_or_killed_ends_the_run(
    culprit: int, number: signal.Signals, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    words = [word for key in KEYS for word in ("--set", key)]
    (tmp_path / "a.toml").write_text("")
    command = ("-m", "distcl", "train", str(tmp_path / "a.toml"), "--out", str(out), *words)
    processes = start(3, *command)
    wait_for(
        lambda: '"loss"' in read(out, "metrics.jsonl") or any(p.poll() for p in processes),
        "the first step",
        250,
    )
    processes[culprit].send_signal(number)
    said = rest(processes, culprit, TIMEOUT + 5 + BUSY)
    status = json.loads(read(out, "status.json"))
    assert (status["state"], status["exit_code"]) == ("failed", 1)
    assert f"rank {culprit}" in status["reason"]
    assert f"rank {culprit}" in read(out, "log.txt").split("failed: ", 1)[1]
    assert f"rank {culprit}" in said and "Traceback" not in said


@pytest.mark.parametrize(
    ("where", "culprit"),
    [
        ("before the store", 0),
        ("before it introduces itself", 0),
        ("before it introduces itself", 2),
        ("after it was introduced", 0),
    ],
)
def test_a_rank_that_is_stopped_while_they_meet_ends_the_run(where: str, culprit: int) -> None:
    processes = start(3, "-c", MEETING, where, str(culprit))
    for rank, process in enumerate(processes):
        assert process.stdout is not None
        if rank != culprit or where != "before the store":
            assert process.stdout.readline() == "ready\n"
    said = rest(processes, culprit, TIMEOUT + 5 + 3 * BUSY)  # the others have to get there
    assert "is stopped" in said or "lost contact" in said, said
