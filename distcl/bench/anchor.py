"""``distcl bench anchor``: memory and time of theta_star as owned slices, against a full replica.

Per rank: what the anchor adds to resident memory, the peak while it is swapped in and out, and the
seconds of refresh, swap-in and swap-out; against ``copy.deepcopy`` of the model's whole state and
against a plain copy of as many elements as the rank owns. Slopes are least squares over model
sizes, in bytes per parameter and rank.
"""

from __future__ import annotations

import copy
import importlib.util
import statistics
import time
from collections.abc import Iterator

import numpy as np
import torch
from torch import nn

from distcl.anchor import Anchor
from distcl.bench.measure import Work, on_ranks, peak_of, resident, seconds_of
from distcl.bench.rows import Row, skipped
from distcl.config import ParallelConfig, RunConfig
from distcl.partition.base import create_partition
from distcl.runtime import Runtime

REPEATS = 5


def bench(quick: bool) -> Iterator[Row]:
    """Measure models of 1, 16 and 64 M parameters at 2 and 4 ranks (``quick``: 1 and 4 M at 2)."""
    sizes, worlds = ([1, 4], [2]) if quick else ([1, 16, 64], [2, 4])
    for strategy in ("ddp",) if quick else ("ddp", "zero3", "fsdp2"):
        if strategy == "zero3" and importlib.util.find_spec("deepspeed") is None:
            yield skipped(
                "anchor zero3", "DeepSpeed is not installed: pip install 'distcl[deepspeed]'"
            )
            continue
        for ranks in worlds:
            found = [on_ranks(ranks, f"{__name__}:measure", strategy, m) for m in sizes]
            yield from _rows(f"anchor {strategy}, {ranks} ranks", ranks, sizes, found)


def _rows(name: str, ranks: int, sizes: list[int], found: list[dict[str, float]]) -> Iterator[Row]:
    largest = found[-1]
    yield Row(
        f"{name}: bytes a parameter, beside 1/W of the model",
        _slope(sizes, [each["anchor_bytes"] for each in found]),
        4 / ranks,
        unit="bytes",
        better="less",
        target=1.05,
        limit=4 / ranks,
        note="slope over " + ", ".join(f"{m} M" for m in sizes),
    )
    yield Row(
        f"{name}: refresh, {sizes[-1]} M parameters",
        largest["refresh_s"],
        largest["copy_s"],
        better="less",
        target=1.2,
        limit=largest["copy_s"],
        note="against a plain copy of the owned slice",
    )
    yield Row(
        f"{name}: swap in and out, {sizes[-1]} M parameters",
        largest["swap_in_s"] + largest["swap_out_s"],
        largest.get("replica_s"),
        note="against copy.deepcopy of the model's state",
    )
    yield Row(
        f"{name}: peak memory of swapping, {sizes[-1]} M parameters",
        largest["swap_peak_bytes"],
        largest.get("replica_bytes"),
        unit="bytes",
        better="less",
        note="above the anchor's own, against a replica",
    )


def _slope(sizes: list[int], values: list[float]) -> float:
    """Return bytes per parameter, by least squares."""
    return float(np.polyfit([m << 20 for m in sizes], values, 1)[0])


def copy_between(source: torch.Tensor, destination: torch.Tensor) -> Work:
    """Return the work of a plain copy."""
    return lambda: destination.copy_(source)


def model_of(millions: int) -> nn.Module:
    """Return square Linear layers with ``millions`` · 2^20 weights."""
    width = {1: 256, 16: 1024, 64: 2048}.get(millions, 512)
    layers = (millions << 20) // width**2
    return nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(layers)))


def measure(strategy: str, millions: int) -> dict[str, float]:
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

    def swaps_in_a_row() -> None:
        for _ in range(REPEATS):
            swap()

    found["swap_peak_bytes"] = peak_of(swaps_in_a_row)
    found["swap_in_s"], found["swap_out_s"] = map(statistics.median, zip(*swaps, strict=True))
    if not partition.sharded:
        state = runtime.unwrap(model).state_dict()
        before, begun = resident(), time.perf_counter()
        replica = copy.deepcopy(state)
        found["replica_s"] = time.perf_counter() - begun
        found["replica_bytes"] = resident() - before
        del replica
    every = runtime.gather_objects({key: float(value) for key, value in found.items()})
    runtime.close()
    return {key: max(each[key] for each in every) for key in found}
