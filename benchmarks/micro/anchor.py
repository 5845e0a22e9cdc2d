"""Memory and time of theta_star as owned slices, against a full replica.

Per rank: how much the anchor adds to resident memory, the peak while it is swapped in and out, and
the median seconds of refresh, swap-in and swap-out; against ``copy.deepcopy`` of the model's whole
state and against a plain copy of as many elements as the rank owns. Slopes are those between two
model sizes, in bytes per parameter and rank. Every figure is of the worst rank, in real processes.
"""

from __future__ import annotations

import copy
import importlib.util
import statistics
import time

import numpy as np
import torch
from torch import nn

from benchmarks.micro.measure import Work, on_ranks, peak_of, resident, seconds_of
from benchmarks.micro.rows import Row, compared, skipped
from distcl.config import ParallelConfig, RunConfig
from distcl.distributed.runtime import Runtime
from distcl.parallel.anchor import Anchor
from distcl.parallel.partition import create_partition

REPEATS = 5
OF_MODELS = "benchmarks.micro.anchor:of_models"
"""What ranks run; see :func:`on_ranks`."""


def copy_between(source: torch.Tensor, destination: torch.Tensor) -> Work:
    """Return the work of a plain copy."""
    return lambda: destination.copy_(source)


def model_of(millions: int) -> nn.Module:
    """Return square Linear layers with ``millions`` · 2^20 weights."""
    width = {1: 256, 32: 2048}.get(millions, 512)
    layers = (millions << 20) // width**2
    return nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(layers)))


def of_models(strategy: str, sizes: list[int]) -> list[dict[str, float]]:
    """Measure models one after another under one strategy. Collective; of the worst rank each."""
    runtime = Runtime(RunConfig(), ParallelConfig(strategy=strategy))
    found = [_of_model(runtime, millions) for millions in sizes]
    runtime.close()
    return found


def _of_model(runtime: Runtime, millions: int) -> dict[str, float]:
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
        state = runtime.strategy.unwrap(model).state_dict()
        before, begun = resident(), time.perf_counter()
        replica = copy.deepcopy(state)
        found["replica_s"] = time.perf_counter() - begun
        found["replica_bytes"] = resident() - before
        del replica
    every = runtime.gather_objects({key: float(value) for key, value in found.items()})
    return {key: max(one[key] for one in every) for key in found}


def measure(quick: bool) -> list[Row]:
    """Return the slopes over model sizes, and each step's time at the largest model."""
    sizes = [1, 4] if quick else [1, 32]
    strategies = ["ddp", "fsdp2"]
    rows: list[Row] = []
    if importlib.util.find_spec("deepspeed") is None:
        rows.append(skipped("anchor zero3", "it needs pip install 'distcl[deepspeed]'"))
    elif not quick:
        strategies.insert(1, "zero3")
    for strategy in strategies:
        for ranks in [2] if quick or strategy != "ddp" else [2, 4]:
            # DeepSpeed takes one model a process
            runs = [[size] for size in sizes] if strategy == "zero3" else [sizes]
            found = [one for run in runs for one in on_ranks(ranks, OF_MODELS, strategy, run)]
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
        compared(
            f"anchor {of}: memory",
            held,
            4 / ranks,
            "B a parameter, of 1/W",
            "<= 1.05",
            limit=4 / ranks,
        ),
        compared(f"anchor {of}: memory", held, replica, "B a parameter, of a replica"),
        compared(
            f"anchor {at}: refresh",
            1e3 * largest["refresh_s"],
            1e3 * largest["copy_s"],
            "ms, of a plain copy",
            "<= 1.2",
            limit=1e3 * largest["copy_s"],
        ),
    ]
    for key, what in (("swap_in_s", "swap-in"), ("swap_out_s", "swap-out")):
        seconds, copied = 1e3 * largest[key], 1e3 * largest.get("replica_s", largest["copy_s"])
        against = "ms, of deepcopy" if "replica_s" in largest else "ms, of a plain copy"
        rows.append(compared(f"anchor {at}: {what}", seconds, copied, against))
    peak = max(one["swap_peak_bytes"] for one in found) / 2**20
    rows.append(Row(f"anchor {at}: peak of a swap", peak, None, "MB", peak))
    return rows
