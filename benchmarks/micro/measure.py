"""Time and memory: interleaved, medians, and in real processes where ranks are wanted."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.micro import ROOT
from distcl.distributed.memory import give_back
from distcl.errors import UsageError

Work = Callable[[], Any]


Clock = Callable[[], float]
WALL: Clock = time.perf_counter
CPU: Clock = time.process_time
"""Seconds of this process alone, on whatever else the machine works: where nothing waits."""


def seconds_of(*works: Work, repeats: int = 5, warmup: int = 1, clock: Clock = WALL) -> list[float]:
    """Return the median seconds of each work. They take turns, A B A B, so that noise meets all.

    What a work took is first divided by the mean of its turn: a machine whose speed changes from
    turn to turn changes no ratio. The first ``warmup`` turns of each are not counted.
    """
    times = np.empty((warmup + repeats, len(works)))
    for turn in times:
        for k, work in enumerate(works):
            begun = clock()
            work()
            turn[k] = clock() - begun
    times = times[warmup:]
    turns = times.mean(axis=1, keepdims=True)
    found: list[float] = (np.median(times / turns, axis=0) * np.median(turns)).tolist()
    return found


def resident() -> int:
    """Return this process's resident bytes, after freed memory went back to the system."""
    give_back()
    return _status("VmRSS")


def peak_of(work: Work) -> int:
    """Return how many bytes resident memory rose above what it was, at most, during ``work``."""
    before = resident()
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    work()
    return max(0, _status("VmHWM") - before)


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


def on_ranks(world: int, work: str, *args: Any) -> Any:
    """Return what rank 0 returns of ``work(*args)``, run by ``world`` processes of one thread each.

    ``work`` is ``package.module:function``; arguments and result are plain JSON values. Raises
    UsageError with the processes' last words if they fail.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        command = [sys.executable, "-m"]
        if world > 1:
            command += ["torch.distributed.run", "--standalone"]
            command += ["--nproc-per-node", str(world), "-m"]
        command += ["benchmarks.micro.measure", work, json.dumps(args)]
        done = subprocess.run(
            [*command, str(out)],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
        if done.returncode:
            raise UsageError(f"{work} on {world} processes: {done.stderr.strip()[-400:]}")
        return json.loads(out.read_text())


def _child(work: str, args: str, out: str) -> None:
    import torch

    torch.set_num_threads(1)
    module, _, name = work.partition(":")
    result = getattr(importlib.import_module(module), name)(*json.loads(args))
    if os.environ.get("RANK", "0") == "0":
        Path(out).write_text(json.dumps(result))


if __name__ == "__main__":
    _child(*sys.argv[1:])
