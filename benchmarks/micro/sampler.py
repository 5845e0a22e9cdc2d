"""Drawing an epoch by weights, from new weights to the last id, against torch's sampler.

torch's WeightedRandomSampler is given the weights as a tensor, which is kinder to it than the list
of floats that it is typed for, and turned into a list, which is all that it can become.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
from torch.utils.data import BatchSampler, WeightedRandomSampler

from benchmarks.micro.measure import CPU, on_ranks, peak_of, seconds_of
from benchmarks.micro.rows import Row, compared, times_faster
from distcl.distributed.runtime import Runtime
from distcl.priority.weighting import Weights
from distcl.sampling import draws
from distcl.sampling.sampler import DistributedWeightedSampler

BATCH = 256
FASTER = {"systematic": ">= 9", "multinomial": ">= 5"}
COUNTS = "benchmarks.micro.sampler:counts"


def measure(quick: bool) -> list[Row]:
    """Draw an epoch of 1e7 (``quick``: 1e6) samples."""
    n = 1_000_000 if quick else 10_000_000
    torch.set_num_threads(1)
    weights = np.random.default_rng(0).gamma(1.0, size=n)
    tensor: Any = torch.from_numpy(weights)
    rows: list[Row] = []
    samplers = [DistributedWeightedSampler(BATCH, draw=draw) for draw in FASTER]
    *ours, theirs, limit = seconds_of(
        *(partial(_ids, sampler, weights) for sampler in samplers),
        lambda: list(WeightedRandomSampler(tensor, n)),
        lambda: torch.randperm(n),
        repeats=3,
        warmup=0,
        clock=CPU,
    )
    for (draw, target), mine in zip(FASTER.items(), ours, strict=True):
        name, unit = f"sampler {draw}: {n:,.0f} weights", "CPU s, of list(WeightedRandomSampler)"
        rows.append(times_faster(name, mine, theirs, unit, target, limit))
    batched = DistributedWeightedSampler(BATCH, draw="systematic")
    lists, theirs = seconds_of(
        partial(_batches, batched, weights),
        lambda: [None for _ in BatchSampler(WeightedRandomSampler(tensor, n), BATCH, False)],
        repeats=3 if quick else 1,
        warmup=0,
        clock=CPU,
    )
    unit = "CPU s, of BatchSampler(WeightedRandomSampler)"
    rows.append(times_faster(f"sampler systematic: lists of {BATCH}", lists, theirs, unit))
    fresh = DistributedWeightedSampler(BATCH, draw="systematic")
    peak = peak_of(lambda: _ids(fresh, weights)) / n
    unit = "bytes a sample, of 48"
    rows.append(compared("sampler systematic: peak memory", peak, 48.0, unit, "<= 1", limit=24.0))
    found = on_ranks(2, COUNTS, n)
    name = "sampler systematic: counts at 2 ranks"
    unit = "s, of 1 rank, the other idle"
    rows.append(times_faster(name, found["both"], found["alone"], unit, ">= 1.7", found["limit"]))
    unit = "bytes of a rank, of 1 rank"
    pair = found["both bytes"], found["alone bytes"]
    rows.append(compared(f"{name}: memory", *pair, unit, "<= 0.51"))
    return rows


def _ids(sampler: DistributedWeightedSampler, weights: Weights) -> None:
    """Rebuild the sampler and draw all ids of the epoch."""
    sampler.set_weights(len(weights), weights)
    sampler.global_batch(0)


def _batches(sampler: DistributedWeightedSampler, weights: Weights) -> None:
    """Rebuild the sampler and iterate over the epoch."""
    sampler.set_weights(len(weights), weights)
    for _ in sampler:
        pass


def counts(n: int) -> dict[str, float]:
    """Return seconds and bytes of systematic counts of ``n`` weights. Collective.

    ``both``: of each rank's slice; ranks exchange the largest weight, then the sums of their
    quantized slices. ``alone``: of all of them, on rank 0. ``limit``: seconds of a cumulative sum
    of the slice, all ranks at once.
    """
    runtime = Runtime()
    lo, hi = runtime.share(n)
    weights = np.random.default_rng(0).gamma(1.0, size=n)
    mine = weights[lo:hi].copy()
    if not runtime.is_main:
        weights = mine[:0]
    found: dict[str, float] = {}

    def both() -> None:
        largest = runtime.all_reduce(torch.tensor(float(mine.max())), "max")
        whole = draws.quantize(mine, draws.fixed_point_exponent(float(largest), n))
        sums = runtime.all_gather(torch.tensor([int(whole.sum())]), runtime.world_size)
        before = int(sums[: runtime.rank].sum())
        counted = draws.systematic_counts_local(whole, before, int(sums.sum()), n, 0.5)
        found["both bytes"] = float(mine.nbytes + whole.nbytes + counted.nbytes)
        runtime.barrier()

    def alone() -> None:
        if runtime.is_main:
            whole = draws.quantize(weights, draws.fixed_point_exponent(float(weights.max()), n))
            counted = draws.systematic_counts_local(whole, 0, int(whole.sum()), n, 0.5)
            found["alone bytes"] = float(weights.nbytes + whole.nbytes + counted.nbytes)
        runtime.barrier()

    def cumulate() -> None:
        np.cumsum(mine)
        runtime.barrier()

    seconds = seconds_of(both, alone, cumulate, repeats=15)
    runtime.close()
    return found | dict(zip(("both", "alone", "limit"), seconds, strict=True))
