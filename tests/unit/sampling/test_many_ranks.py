"""The plan of draws and gathers for 1,024 ranks, computed rank by rank in one process."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from distcl.distributed.runtime import Runtime
from distcl.parallel.inference import ShardedForward
from distcl.priority.population import Dealer
from distcl.sampling.groups import Part
from distcl.sampling.sampler import DistributedWeightedSampler
from distcl.sampling.sequential import LaneSampler

WORLD = 1024


@pytest.mark.parametrize("draw", ["systematic", "multinomial", "uniform"])
def test_parts_of_1024_ranks_are_the_global_batches_of_one(draw):
    batch, n = 4_100, 2 * 4_100 + 500  # uneven parts; in the last batch, 524 ranks have none
    weights = np.random.default_rng(0).gamma(0.5, size=n)
    ids = np.random.default_rng(1).permutation(10 * n)[:n]

    def sampler(rank: int, world: int) -> DistributedWeightedSampler:
        made = DistributedWeightedSampler(
            batch,
            rank=rank,
            world_size=world,
            seed=3,
            draw="multinomial" if draw == "uniform" else draw,
        )
        made.set_weights(ids, None if draw == "uniform" else weights)
        return made

    alone = sampler(0, 1)
    whole = list(alone)
    assert [len(ids) for ids in whole] == [4_100, 4_100, 500]
    joined: list[list[int]] = [[], [], []]
    for rank in range(WORLD):
        mine = list(sampler(rank, WORLD))
        assert [len(part) for part in mine] == [4 + (rank < 4), 4 + (rank < 4), int(rank < 500)]
        for step, part in enumerate(mine):
            joined[step] += part
    assert joined == whole
    assert sampler(1023, WORLD).plan_digest() == alone.plan_digest()


@pytest.mark.parametrize("n", [1, 50_001, 300_000])
def test_chunks_of_1024_ranks_are_all_samples_and_gathers_put_them_in_order(n):
    ids, size = np.random.default_rng(0).permutation(n), 64
    chunks = [ids[start : start + size] for start in range(0, n, size)]
    sent: list[torch.Tensor] = []
    dealt: list[np.ndarray] = []
    for rank in range(WORLD):
        runtime = SimpleNamespace(rank=rank, world_size=WORLD)
        runtime.share = lambda number, of=runtime: Runtime.share(of, number)
        runtime.all_gather = lambda mine, total, each: (mine, total, each)
        forward: Any = SimpleNamespace(runtime=runtime)
        mine = ShardedForward.mine(forward, ids, size)
        dealt += [mine[start : start + size] for start in range(0, len(mine), size)]
        rows, total, each = ShardedForward.gather(forward, torch.from_numpy(mine), n, size)
        assert total == n and len(rows) <= each
        sent.append(torch.cat([rows, torch.full((each - len(rows),), -1)]))
    assert [len(chunk) for chunk in dealt] == [len(chunk) for chunk in chunks]  # the same forwards
    assert torch.equal(torch.cat(sent)[:n], torch.from_numpy(ids))


def on_ranks(fn: Callable[[Dealer], Any], world: int, lanes: int, samples: int) -> list[Any]:
    """Run fn(dealer) on ranks that are threads, whose reductions are real; results by rank."""
    box: list[Any] = [None] * world
    ops: list[str] = [""]
    result: list[np.ndarray] = [np.empty(0)]

    def together() -> None:
        every = np.stack(box)
        result[0] = every.sum(0) if ops[0] == "sum" else every.max(0)

    barrier = threading.Barrier(world, together)

    def on_rank(rank: int) -> Any:
        def reduce(values: np.ndarray, op: str) -> np.ndarray:
            box[rank], ops[0] = values, op
            barrier.wait(60)
            found = result[0]
            barrier.wait(60)
            return found.copy()

        return fn(Dealer(lanes, lambda ids, of: ids * of // samples, rank, world, reduce))

    with ThreadPoolExecutor(world) as pool:
        return list(pool.map(on_rank, range(world)))


def test_lanes_of_1024_ranks_share_out_the_same_global_batches():
    n, batch, lanes = 16_384, 5_000, 2 * WORLD
    ids, weights = np.arange(n), np.random.default_rng(0).gamma(0.5, size=n)

    def run(dealer: Dealer) -> list[list[int]]:
        slices = dealer.deal(ids)
        made = LaneSampler(batch, window=16, seed=5)
        made.set_groups([Part(slices.ids, slices.pick(ids, weights), slices, draws=n)])
        steps = list(made)
        assert all(dealer.own(np.array(part, np.int64)).all() for part in steps)
        return steps

    (whole,) = on_ranks(run, 1, lanes, n)
    assert [len(step) for step in whole] == [5_000, 5_000, 5_000, n - 15_000]
    ranks = on_ranks(run, WORLD, lanes, n)
    for step, expected in enumerate(whole):
        assert [id_ for steps in ranks for id_ in steps[step]] == expected
    counts = np.bincount(np.concatenate(whole), minlength=n)
    assert np.abs(counts - n * weights / weights.sum()).max() < 1 + 1e-6
