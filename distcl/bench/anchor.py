"""Memory and time of theta_star as owned slices, against a full replica.

Per rank: how much the anchor adds to resident memory, the peak while it is swapped in and out, and
the median seconds of refresh, swap-in and swap-out; against ``copy.deepcopy`` of the model's whole
state and against a plain copy of as many elements as the rank owns. Slopes are least squares over
model sizes, in bytes per parameter and rank. Every figure is of the worst rank, in real processes.
"""

from __future__ import annotations

import copy
import ctypes
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from distcl.anchor import Anchor
from distcl.bench.rows import Row, compared, seconds_of
from distcl.config import ParallelConfig, RunConfig
from distcl.errors import UsageError
from distcl.partition.base import create_partition
from distcl.runtime import Runtime

REPEATS = 5


def resident() -> int:
    """Return this process's resident bytes, after freed memory went back to the system."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return _status("VmRSS")


def peak_of(work: Callable[[], Any]) -> int:
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


def copy_between(source: torch.Tensor, destination: torch.Tensor) -> Callable[[], Any]:
    """Return the work of a plain copy."""
    return lambda: destination.copy_(source)


def model_of(millions: int) -> nn.Module:
    """Return square Linear layers with ``millions`` · 2^20 weights."""
    width = {1: 256, 16: 1024, 64: 2048}.get(millions, 512)
    layers = (millions << 20) // width**2
    return nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(layers)))


def of_model(strategy: str, millions: int) -> dict[str, float]:
    """Measure one model under one strategy. Collective; the result is of the worst rank."""
    runtime = Runtime(RunConfig(), ParallelConfig(strategy=strategy))
    model, _ = runtime.prepare_training(
        model_of(millions), lambda params: torch.optim.SGD(params, lr=0.1)
    )
    partition = create_partition(runtime, model)
    before = resident()
    anchor = Anchor(partition)
    held = resident() - before
    owned = sum(len(value) for value in anchor.theta_star.values())
    plain = copy_between(torch.ones(owned), torch.zeros(owned))
    copy_s, refresh_s = seconds_of(plain, anchor.refresh, repeats=5 * REPEATS)
    found = {"owned": owned, "anchor_bytes": held, "copy_s": copy_s, "refresh_s": refresh_s}
    del plain
    swaps: list[tuple[float, float]] = []

    def swap() -> None:
        runtime.barrier()
        begun = time.perf_counter()
        with anchor.swapped_in():
            inside = time.perf_counter()
        swaps.append((inside - begun, time.perf_counter() - inside))

    def swaps_in_turn() -> None:
        for _ in range(REPEATS):
            swap()

    found["swap_peak_bytes"] = peak_of(swaps_in_turn)
    found["swap_in_s"], found["swap_out_s"] = map(statistics.median, zip(*swaps, strict=True))
    if not partition.sharded:
        state = runtime.unwrap(model).state_dict()
        before, begun = resident(), time.perf_counter()
        replica = copy.deepcopy(state)
        found["replica_s"] = time.perf_counter() - begun
        found["replica_bytes"] = resident() - before
        del replica
    worst = {key: max(ranks) for key in found if (ranks := _all(runtime, float(found[key])))}
    runtime.close()
    return worst


def _all(runtime: Runtime, value: float) -> list[float]:
    return runtime.gather_objects(value)


def in_processes(strategy: str, millions: int, ranks: int) -> dict[str, float]:
    """Measure in real processes; return the worst rank's figures."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", str(ranks), "-m", "distcl.bench.anchor"]
        done = subprocess.run(
            [*command, strategy, str(millions), str(out)],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise UsageError(f"bench anchor, {strategy} on {ranks} processes: {done.stderr[-400:]}")
        found: dict[str, float] = json.loads(out.read_text())
        return found


def measure(quick: bool) -> list[Row]:
    """Return the slopes over model sizes, and each step's time at the largest model."""
    sizes = [1, 4] if quick else [1, 16, 64]
    strategies = ["ddp", "fsdp2"]
    if not quick and importlib.util.find_spec("deepspeed") is not None:
        strategies.insert(1, "zero3")
    rows: list[Row] = []
    for strategy in strategies:
        for ranks in [2] if quick else [2, 4]:
            found = [in_processes(strategy, millions, ranks) for millions in sizes]
            rows += _rows(f"{strategy}, {ranks} ranks", sizes, found, ranks)
    return rows


def _rows(of: str, sizes: list[int], found: list[dict[str, float]], ranks: int) -> list[Row]:
    def slope(key: str) -> float:
        parameters = [float(m << 20) for m in sizes]
        return float(np.polyfit(parameters, [one[key] for one in found], 1)[0])

    held, largest = slope("anchor_bytes"), found[-1]
    at = f"{of}, {sizes[-1]} M parameters"
    replica = slope("replica_bytes") if "replica_bytes" in largest else 4.0
    rows = [
        compared(f"anchor {of}: memory", held, 4 / ranks, "B a parameter, of 1/W", "<= 1.05"),
        compared(f"anchor {of}: memory", held, replica, "B a parameter, of a replica"),
        compared(
            f"anchor {at}: refresh",
            1e3 * largest["refresh_s"],
            1e3 * largest["copy_s"],
            "ms, of a plain copy",
            "<= 1.2",
        ),
    ]
    for key, what in (("swap_in_s", "swap-in"), ("swap_out_s", "swap-out")):
        seconds, copied = 1e3 * largest[key], 1e3 * largest.get("replica_s", largest["copy_s"])
        against = "ms, of deepcopy" if "replica_s" in largest else "ms, of a plain copy"
        rows.append(compared(f"anchor {at}: {what}", seconds, copied, against))
    peak = max(one["swap_peak_bytes"] for one in found) / 2**20
    rows.append(Row(f"anchor {at}: peak of a swap", peak, None, "MB", peak))
    return rows


def _main(strategy: str, millions: str, out: str) -> None:
    result = of_model(strategy, int(millions))
    if os.environ["RANK"] == "0":
        Path(out).write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    _main(*sys.argv[1:])
