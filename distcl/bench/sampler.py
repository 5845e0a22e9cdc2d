"""``distcl bench sampler``: one epoch's draws by weights, from new weights to the last batch."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.utils.data import BatchSampler, WeightedRandomSampler

from distcl.bench.measure import on_ranks, peak_of, seconds_of
from distcl.bench.rows import Row
from distcl.priority import draws
from distcl.priority.draws import Weights
from distcl.priority.sampler import DistributedWeightedSampler

BATCH = 256
FASTER = {"systematic": 9.0, "multinomial": 5.0}


def bench(quick: bool) -> Iterator[Row]:
    """Draw an epoch of 1e7 (``quick``: 3e5) samples."""
    n = 300_000 if quick else 10_000_000
    repeats = 3
    torch.set_num_threads(1)
    weights = np.random.default_rng(0).gamma(1.0, size=n)
    tensor: Any = torch.from_numpy(weights)  # which torch takes, and types as a list of floats
    for draw, target in FASTER.items():
        sampler = DistributedWeightedSampler(BATCH, draw=draw)

        ours, theirs, limit = seconds_of(
            partial(_plan, sampler, weights),
            lambda: list(WeightedRandomSampler(tensor, n)),
            lambda: np.random.default_rng(0).permutation(n),
            repeats=repeats,
            warmup=0,
        )
        yield Row(
            f"sampler {draw}: {n:,} weights, one epoch's ids",
            ours,
            theirs,
            target=target,
            limit=limit,
            note="against list(WeightedRandomSampler); limit: one permutation",
        )
    batched = DistributedWeightedSampler(BATCH, draw="systematic")
    ours, theirs = seconds_of(
        partial(_batches, batched, weights),
        lambda: [None for _ in BatchSampler(WeightedRandomSampler(tensor, n), BATCH, False)],
        repeats=1 if quick else 2,
        warmup=0,
    )
    yield Row(
        f"sampler systematic: the same, as lists of {BATCH} ids",
        ours,
        theirs,
        note="against BatchSampler(WeightedRandomSampler)",
    )
    fresh = DistributedWeightedSampler(BATCH, draw="systematic")
    peak = peak_of(lambda: _plan(fresh, weights)) / n
    yield Row(
        "sampler systematic: peak memory a sample, of 48",
        peak,
        48.0,
        unit="bytes",
        better="less",
        target=1.0,
        limit=24.0,
        note="limit: weights, ids and counts of 8 bytes each",
    )
    one = on_ranks(1, f"{__name__}:counts", n, repeats)
    two = on_ranks(2, f"{__name__}:counts", n, repeats)
    yield Row(
        "sampler systematic counts: 2 ranks, own slices only",
        two,
        one,
        target=1.7,
        limit=one / 2,
        note="against 1 rank; memory 1/W; limit: half the time",
    )


def _plan(sampler: DistributedWeightedSampler, weights: Weights) -> None:
    """Rebuild the sampler and draw the epoch."""
    sampler.set_weights(len(weights), weights)
    sampler.global_batch(0)


def _batches(sampler: DistributedWeightedSampler, weights: Weights) -> None:
    sampler.set_weights(len(weights), weights)
    for _ in sampler:
        pass


def counts(n: int, repeats: int) -> float:
    """Return the median seconds of systematic counts of this rank's slice of n weights.

    Ranks exchange the largest weight, then the sums of their quantized slices. Collective.
    """
    from distcl.runtime import Runtime

    runtime = Runtime()
    lo, hi = runtime.share(n)
    weights = np.random.default_rng(runtime.rank).gamma(1.0, size=hi - lo)

    def count() -> None:
        largest = runtime.all_reduce(torch.tensor(float(weights.max())), "max")
        whole = draws.quantize(weights, draws.fixed_point_exponent(float(largest), n))
        sums = runtime.all_gather(torch.tensor([int(whole.sum())]), runtime.world_size, 1)
        before = int(sums[: runtime.rank].sum())
        draws.systematic_counts_local(whole, before, int(sums.sum()), n, 0.5)

    def together() -> None:
        runtime.barrier()
        count()
        runtime.barrier()

    (seconds,) = seconds_of(together, repeats=repeats)
    runtime.close()
    return seconds
