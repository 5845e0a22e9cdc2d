"""Draws from data that are read from front to back: each rank knows its own weights only."""

import threading
import tracemalloc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from distcl.config import ParallelConfig, RunConfig
from distcl.distributed.runtime import Runtime
from distcl.priority.population import Dealer
from distcl.priority.weighting import Slices, WeightVector
from distcl.sampling.draw_log import DrawLog, digest_of
from distcl.sampling.groups import Part
from distcl.sampling.sequential import LaneSampler
from distcl.types import pack_ids

N, LANES, WINDOW = 120, 4, 16
ALL = np.arange(N)
RUNTIME = Runtime(RunConfig(), ParallelConfig())


def lanes_of(ids: np.ndarray, lanes: int) -> np.ndarray:
    return (ids & 0xFFFF) * lanes // N


def on_ranks(world: int, fn: Callable[[Dealer], Any], lanes: int = LANES) -> list[Any]:
    """Run fn(dealer) on ranks that are threads, whose reductions are real; results by rank."""
    barrier, box = threading.Barrier(world), [None] * world

    def on_rank(rank: int) -> Any:
        def reduce(values: np.ndarray, op: str) -> np.ndarray:
            box[rank] = values.copy()
            barrier.wait(10)
            every = np.stack(box)
            barrier.wait(10)
            return every.sum(0) if op == "sum" else every.max(0)

        return fn(Dealer(lanes, lanes_of, rank, world, reduce))

    with ThreadPoolExecutor(world) as pool:
        return list(pool.map(on_rank, range(world)))


def sampler(size: int = 10, **keys: int) -> LaneSampler:
    return LaneSampler(size, window=WINDOW, **{"seed": 7, **keys})


def group(
    dealer: Dealer, ids: np.ndarray, weights: np.ndarray | None, draws_: int | None = None
) -> Part:
    slices = dealer.deal(ids)
    mine = None if weights is None else slices.pick(ids, weights)
    return Part(slices.ids, mine, slices, draws=len(ids) if draws_ is None else draws_)


WEIGHTS = np.random.default_rng(0).exponential(size=N) ** 2
WEIGHTS[::5] = 0


def alone(size: int = 10, n: int = N, **keys: int) -> LaneSampler:
    made = sampler(size, **keys)
    made.set_groups([group(Dealer(LANES, lanes_of), ALL, WEIGHTS, n)])
    return made


def batch(made: LaneSampler, step: int) -> np.ndarray:
    return np.concatenate([np.empty(0, np.int64), *(ids for _, ids in made.parts(step))])


def sequence(made: LaneSampler) -> np.ndarray:
    return np.concatenate([batch(made, step) for step in range(len(made))])


@given(
    world=st.integers(1, 6),
    lanes=st.sampled_from([1, 2, 4, 6]),
    size=st.integers(9, 40),
    n=st.integers(1, 300),
    history=st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_ranks_share_out_the_same_global_batches_at_every_world_size(
    world, lanes, size, n, history
):
    def run(dealer: Dealer) -> tuple[list[list[int]], list[int], dict[int, bytes]]:
        made, log = sampler(size), DrawLog(RUNTIME, dealer)
        groups = [group(dealer, pack_ids(1, ALL), ALL + 0.5, n)]
        if history:
            groups.append(group(dealer, pack_ids(0, np.arange(0, N, 3)), None, 40))
        made.set_groups(groups)
        steps = list(made)
        for step in range(len(made)):
            log.add(made.parts(step))
        assert all(dealer.own(np.array(part, np.int64)).all() for part in steps)
        return steps, [made.total(step) for step in range(len(made))], log.chains

    (whole, totals, chains) = on_ranks(1, run, lanes)[0]
    assert len(whole) == -(-(n + 40 * history) // size) and sum(totals) == n + 40 * history
    assert [len(ids) for ids in whole] == totals
    ranks = on_ranks(world, run, lanes)
    for step, expected in enumerate(whole):  # rank by rank, it is the same sequence
        assert list(chain.from_iterable(steps[step] for steps, _, _ in ranks)) == expected
    assert digest_of([part for _, _, part in ranks]) == digest_of([chains])


@given(
    world=st.integers(1, 5),
    alpha=st.sampled_from([0.5, 1.0]),
    cap=st.sampled_from([0.0, 2.0]),
    ess=st.sampled_from([0.0, 0.8]),
    floor=st.sampled_from([0.0, 0.2]),
)
@settings(max_examples=25, deadline=None)
def test_weights_are_shaped_over_slices_as_they_are_over_all(world, alpha, cap, ess, floor):
    def run(dealer: Dealer) -> tuple[np.ndarray, np.ndarray, float]:
        slices = dealer.deal(ALL)
        mine = WeightVector(slices.ids, slices.pick(ALL, WEIGHTS), slices)
        shaped = mine.shaped(alpha, cap, ess, floor)
        return slices.ids, shaped.held, shaped.ess()

    first, *_ = one = on_ranks(1, run)
    ranks = on_ranks(world, run)
    np.testing.assert_array_equal(np.concatenate([ids for ids, _, _ in ranks]), first[0])
    np.testing.assert_array_equal(np.concatenate([w for _, w, _ in ranks]), first[1])  # every bit
    whole = WeightVector(ALL, WEIGHTS).shaped(alpha, cap, ess, floor)
    np.testing.assert_allclose(first[1], whole.held, rtol=1e-5)
    assert {fraction for _, _, fraction in ranks} == {one[0][2]}


def test_each_rank_holds_its_lanes_only_and_every_sample_once():
    ids = np.random.default_rng(3).permutation(np.concatenate([pack_ids(e, ALL) for e in range(3)]))

    def run(dealer: Dealer) -> Slices:
        return dealer.deal(ids)

    for world in (1, 2, 3, 4, 7):  # more ranks than lanes too
        ranks = on_ranks(world, run)
        held = np.concatenate([part.ids for part in ranks])
        np.testing.assert_array_equal(np.sort(held), np.sort(ids))
        assert {part.number for part in ranks} == {len(ids)}
        if LANES % world == 0:
            assert {len(part.ids) for part in ranks} == {len(ids) // world}
        for part in ranks:
            pieces = part.pieces(7)
            assert sum(map(len, pieces)) == len(part.ids)
            assert all(len(set(lanes_of(piece, LANES))) == 1 for piece in pieces)


def test_ids_that_lie_together_in_order_are_not_copied():
    for world in (1, 2, 4):
        assert all(
            np.shares_memory(part.ids, ALL) for part in on_ranks(world, lambda d: d.deal(ALL))
        )
    backwards = on_ranks(2, lambda dealer: dealer.deal(ALL[::-1]))
    np.testing.assert_array_equal(np.concatenate([part.ids for part in backwards]), ALL)


def test_a_pass_without_weights_has_every_sample_once():
    made = sampler()
    made.set_groups([group(Dealer(LANES, lanes_of), ALL, None)])
    first = sequence(made)
    np.testing.assert_array_equal(np.sort(first), ALL)
    made.set_epoch(1)
    assert (sequence(made) != first).any()


def test_counts_are_within_one_of_their_expectation_and_equal_it_on_average():
    rounds, expected = 200, N * WEIGHTS / WEIGHTS.sum()

    def run(dealer: Dealer) -> list[np.ndarray]:
        made = sampler()
        made.set_groups([group(dealer, ALL, WEIGHTS)])
        found = []
        for k in range(rounds):
            made.set_round(k)
            found.append(np.bincount(sequence(made), minlength=N))
        return found

    counts = np.sum(on_ranks(2, run), axis=0)
    assert (np.abs(counts - expected) < 1).all() and (counts.sum(1) == N).all()
    share = expected - np.floor(expected)
    deviation = np.sqrt(rounds * share * (1 - share))
    z = np.abs(counts.sum(0) - rounds * expected) / np.maximum(deviation, 1e-9)
    z[deviation < 1e-6] = 0
    assert z.max() < stats.norm.isf(0.01 / 2 / N)


def test_samples_are_shuffled_within_windows_only_and_lanes_keep_their_order():
    ids = sequence(alone(n=400))
    lanes = lanes_of(ids, LANES)
    for lane in range(LANES):
        mine = ids[lanes == lane]
        assert (mine < np.maximum.accumulate(mine)).any()
        assert (np.maximum.accumulate(mine) - mine).max() < WINDOW


@pytest.mark.parametrize("size", [1, 10, 64])
def test_lanes_and_experiences_are_mixed_evenly_in_every_batch(size):
    made = sampler(size)
    dealer = Dealer(LANES, lanes_of)
    made.set_groups([group(dealer, pack_ids(e, ALL), None, N - 50 * e) for e in range(3)])
    due, seen = np.zeros((3, LANES)), np.zeros((3, LANES))
    share = np.array([N, N - 50, N - 100])[:, None] / LANES / (3 * N - 150)
    for step in range(len(made)):
        for lane, ids in made.parts(step):
            np.add.at(seen, (ids >> 40, lane), 1)
        due = due + made.total(step) * share
        assert np.abs(seen - due).max() < 3


@pytest.mark.parametrize("world", [1, 2, 3])
def test_a_resumed_pass_goes_on_exactly(world):
    keys = {"round_index": 4}
    whole, other = alone(**keys), alone(**keys)
    for made in (whole, other):
        made.set_epoch(2)
    steps = iter(other)
    for _ in range(5):
        next(steps)
    state = other.state_dict(5)

    def run(dealer: Dealer) -> list[list[int]]:
        resumed = sampler(round_index=4)
        resumed.set_groups([group(dealer, ALL, WEIGHTS)])
        resumed.load_state_dict(state)
        assert resumed.first_step == 5
        return list(resumed)

    ranks = on_ranks(world, run)
    together = [list(chain.from_iterable(parts)) for parts in zip(*ranks, strict=True)]
    assert together == list(whole)[5:]
    with pytest.raises(ValueError, match="not"):
        alone(12).load_state_dict(state)


def test_nothing_to_draw_from_and_bad_weights_are_refused():
    dealer = Dealer(LANES, lanes_of)
    with pytest.raises(ValueError, match="no ids"):
        sampler().set_groups([group(dealer, ALL[:0], None, 5)])
    with pytest.raises(ValueError, match="id 3"):
        sampler().set_groups([group(dealer, ALL, np.where(ALL == 3, np.nan, 1))])

    def zero(dealer: Dealer) -> str:
        with pytest.raises(ValueError, match="all 120 weights are zero") as error:
            sampler().set_groups([group(dealer, ALL, 0.0 * ALL)])
        return str(error.value)

    on_ranks(2, zero)


@pytest.mark.parametrize("world", [1, 2])
def test_a_rank_holds_at_most_48_bytes_a_sample_over_the_number_of_ranks(world):
    n = 1_500_000  # so many that nothing else in this process counts
    ids, weights = np.arange(n), np.random.default_rng(0).random(n)

    def cut(ids: np.ndarray, lanes: int) -> np.ndarray:
        return ids * lanes // n

    def run(dealer: Dealer) -> int:
        dealer = Dealer(12, cut, dealer.rank, dealer.world_size, dealer.reduce)
        slices = dealer.deal(ids)
        made = LaneSampler(64, window=1024)
        made.set_groups([Part(slices.ids, weights[slices.ids], slices, draws=n)])
        return len(made.parts(0))

    tracemalloc.start(1)
    try:
        on_ranks(world, run)
        together = tracemalloc.get_traced_memory()[1]  # of all ranks, at most
    finally:
        tracemalloc.stop()
    assert ids.nbytes + together / world <= 48 * n / world
