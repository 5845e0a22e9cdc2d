"""Memory and time of theta_star as owned slices, against a full replica.

    python benchmarks/anchor.py [--strategies ddp,zero3] [--millions 1,16,64] [--ranks 2,4]
                                [--json FILE]

Per rank: how much the anchor adds to resident memory, the peak while it is swapped in and out, and
the seconds (median of five) of refresh, swap-in and swap-out; against ``copy.deepcopy`` of the
model's whole state and against a plain copy of as many elements as the rank owns. Slopes are least
squares over model sizes, in bytes per parameter and rank.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
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
from distcl.config import ParallelConfig, RunConfig
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


def seconds_of(*works: Callable[[], Any]) -> list[float]:
    """Return the median time of each work; they take turns, so that noise meets all alike."""
    times: list[list[float]] = [[] for _ in works]
    for _ in range(5 * REPEATS):
        for work, mine in zip(works, times, strict=True):
            begun = time.perf_counter()
            work()
            mine.append(time.perf_counter() - begun)
    return [statistics.median(mine) for mine in times]


def copy_between(source: torch.Tensor, destination: torch.Tensor) -> Callable[[], Any]:
    """Return the work of a plain copy."""
    return lambda: destination.copy_(source)


def model_of(millions: int) -> nn.Module:
    """Return square Linear layers with ``millions`` · 2^20 weights."""
    width = {1: 256, 16: 1024, 64: 2048}.get(millions, 512)
    layers = (millions << 20) // width**2
    return nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(layers)))


def measure(strategy: str, millions: int) -> dict[str, float]:
    """Measure one model under one strategy. Collective; the result is of the worst rank."""
    runtime = Runtime(RunConfig(), ParallelConfig(strategy=strategy))  # type: ignore[arg-type]
    model, _ = runtime.prepare_training(
        model_of(millions), lambda params: torch.optim.SGD(params, lr=0.1)
    )
    partition = create_partition(runtime, model)
    before = resident()
    anchor = Anchor(partition)
    held = resident() - before
    owned = sum(len(value) for value in anchor.theta_star.values())
    plain = copy_between(torch.ones(owned), torch.zeros(owned))
    copy_s, refresh_s = seconds_of(plain, anchor.refresh)
    found = {"owned": owned, "anchor_bytes": held, "copy_s": copy_s, "refresh_s": refresh_s}
    del plain
    swaps: list[tuple[float, float]] = []

    def swap() -> None:
        runtime.barrier()
        begun = time.perf_counter()
        with anchor.swapped_in():
            inside = time.perf_counter()
        swaps.append((inside - begun, time.perf_counter() - inside))

    found["swap_peak_bytes"] = peak_of(lambda: [swap() for _ in range(REPEATS)])
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


def run(strategy: str, millions: int, ranks: int) -> dict[str, float]:
    """Measure in real processes; return the worst rank's figures."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", str(ranks), __file__, "--one", f"{strategy},{millions}"]
        subprocess.run(
            [*command, "--json", str(out)],
            check=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stderr=subprocess.DEVNULL,
        )
        found: dict[str, float] = json.loads(out.read_text())
        return found


def slope(sizes: list[int], values: list[float]) -> float:
    """Return bytes per parameter, by least squares."""
    return float(np.polyfit([m << 20 for m in sizes], values, 1)[0])


def bench(strategies: list[str], sizes: list[int], worlds: list[int]) -> dict[str, Any]:
    """Return and print every figure, and the slopes."""
    table: dict[str, Any] = {}
    head = "strategy ranks  M params  anchor MB  peak MB  refresh ms (copy)   in ms  out ms"
    print(head)
    for strategy in strategies:
        for ranks in worlds:
            rows = {m: run(strategy, m, ranks) for m in sizes}
            for m, r in rows.items():
                print(
                    f"{strategy:8} {ranks:5} {m:9} {r['anchor_bytes'] / 2**20:10.1f} "
                    f"{r['swap_peak_bytes'] / 2**20:8.1f} {1e3 * r['refresh_s']:10.2f} "
                    f"({1e3 * r['copy_s']:.2f}) {1e3 * r['swap_in_s']:9.1f} "
                    f"{1e3 * r['swap_out_s']:7.1f}",
                    flush=True,
                )
            entry: dict[str, Any] = {"rows": rows}
            if len(sizes) > 1:
                for key in ("anchor_bytes", "replica_bytes"):
                    if key in rows[sizes[0]]:
                        entry[f"{key}_per_parameter"] = slope(sizes, [rows[m][key] for m in sizes])
                ratio = entry["anchor_bytes_per_parameter"] / (4 / ranks)
                refresh = rows[sizes[-1]]["refresh_s"] / rows[sizes[-1]]["copy_s"]
                entry |= {"of_one_share": ratio, "refresh_of_copy": refresh}
                replica = entry.get("replica_bytes_per_parameter")
                against = f", full replica {replica:.2f}" if replica else ""
                print(
                    f"         slope: {entry['anchor_bytes_per_parameter']:.3f} bytes a parameter "
                    f"and rank{against}; {ratio:.3f} × 1/W of the model; refresh {refresh:.2f} × a "
                    "plain copy"
                )
            table[f"{strategy}/{ranks}"] = entry
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--strategies", default="ddp,zero3,fsdp2")
    parser.add_argument("--millions", default="1,16,64")
    parser.add_argument("--ranks", default="2,4")
    parser.add_argument("--json", default="")
    parser.add_argument("--one", default="", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        strategy, millions = given.one.split(",")
        result: Any = measure(strategy, int(millions))
        if int(os.environ["RANK"]) > 0:
            return
    else:
        sizes = [int(m) for m in given.millions.split(",")]
        worlds = [int(w) for w in given.ranks.split(",")]
        result = bench(given.strategies.split(","), sizes, worlds)
    if given.json:
        Path(given.json).write_text(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
