"""The plan whose weights change on the way: windows, groups, ranks, resumes."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from scipy.stats import chisquare

from distcl.errors import UsageError
from distcl.sampling.draws import apportion
from distcl.sampling.groups import Group
from distcl.sampling.sampler import DistributedWeightedSampler

IDS = 1000 + 7 * np.arange(40, dtype=np.int64)
OLD = np.arange(30, dtype=np.int64)


def _plan(
    groups: list[Group] | None,
    steps: int,
    rank: int = 0,
    world: int = 1,
    draw: str = "systematic",
    size: int = 8,
    number: int = 1,
) -> DistributedWeightedSampler:
    plan = DistributedWeightedSampler(
        size,
        window=5,
        num_samples=steps * size,
        rank=rank,
        world_size=world,
        seed=3,
        draw=draw,
        stream=17,
        round_index=number,
    )
    if groups is not None:
        plan.set_groups(groups)
    return plan


def _parts(weights: np.ndarray | None, ids: np.ndarray = OLD) -> list[Group]:
    return [Group(IDS, None, 40), Group(ids, weights, 40)]


def _drawn(plan: DistributedWeightedSampler) -> np.ndarray:
    return np.stack([plan.global_batch(step) for step in range(len(plan))])


def test_every_batch_has_its_share_of_each_group_evenly_mixed() -> None:
    plan = _plan([Group(IDS, None, 60), Group(OLD, np.ones(30), 20)], 12)
    batches = _drawn(plan)
    assert batches.shape == (12, 8)
    assert (np.isin(batches, OLD).sum(1) == 2).all()
    assert (np.isin(batches[:, :4], OLD).sum(1) == 1).all()  # each half has one


def test_uniform_groups_go_through_permutations_across_windows() -> None:
    plan = _plan(_parts(np.ones(30)), 20)
    current = _drawn(plan)
    current = current[np.isin(current, IDS)].reshape(-1, 40)  # 4 a step: two passes of 40
    assert len(current) == 2
    for one in current:
        assert sorted(one) == sorted(IDS)
    assert (current[0] != current[1]).any()


def test_new_weights_hold_from_their_window_on_and_change_nothing_before() -> None:
    plan, same = (_plan(_parts(np.ones(30)), 20) for _ in range(2))
    only = np.zeros(30)
    only[4] = 1.0
    before = [plan.global_batch(step) for step in range(7)]  # the second window is drawn
    with pytest.raises(UsageError, match="drawn up to step 10"):
        plan.set_groups(_parts(only), from_step=5)
    with pytest.raises(UsageError, match="from step 12 on"):
        plan.set_groups(_parts(only), from_step=12)
    plan.set_groups(_parts(only), from_step=15)
    after = np.stack([plan.global_batch(step) for step in range(7, 20)])
    unchanged = _drawn(same)
    assert (np.concatenate([before, after])[:15] == unchanged[:15]).all()
    assert (after[8:][np.isin(after[8:], OLD)] == 4).all()
    assert (plan.groups(19)[1].values == only).all()
    # the current data goes on with its permutation
    assert (
        after[8:][np.isin(after[8:], IDS)] == unchanged[15:][np.isin(unchanged[15:], IDS)]
    ).all()


def test_ids_may_change_with_the_weights_for_a_pool() -> None:
    plan = _plan(_parts(np.ones(5), OLD[:5]), 10)
    plan.set_groups(_parts(np.ones(3), OLD[20:23]), from_step=5)
    old = _drawn(plan)
    first, second = (part[np.isin(part, OLD)] for part in (old[:5], old[5:]))
    assert set(first) == set(OLD[:5])
    assert set(second) == set(OLD[20:23])


def test_ranks_partition_every_batch_and_draw_the_same() -> None:
    weights = np.random.default_rng(0).random(30)
    for world in (1, 2, 3, 9):
        if world > 8:
            with pytest.raises(ValueError, match="cannot be split over 9 ranks"):
                _plan(None, 7, 0, world)
            continue
        parts = [list(_plan(_parts(weights), 7, rank, world)) for rank in range(world)]
        reference = _plan(_parts(weights), 7)
        for step, expected in enumerate(_drawn(reference)):
            joined = [i for rank in range(world) for i in parts[rank][step]]
            assert joined == expected.tolist()
            sizes = [len(parts[rank][step]) for rank in range(world)]
            assert max(sizes) - min(sizes) <= 1


def test_draws_follow_the_weights() -> None:
    weights = np.random.default_rng(1).random(30) + 0.1
    share = weights / weights.sum()
    plan = _plan([Group(OLD, weights, 1)], 40, draw="multinomial", size=500)
    counts = np.bincount(_drawn(plan).ravel(), minlength=30)
    assert chisquare(counts, share * counts.sum()).pvalue > 1e-3
    plan = _plan([Group(OLD, weights, 1)], 10, draw="systematic", size=500)
    for window in np.split(_drawn(plan), 2):  # each by itself
        counts = np.bincount(window.ravel(), minlength=30)
        assert (np.abs(counts - share * counts.sum()) < 1).all()


def test_rounds_and_windows_have_draws_of_their_own() -> None:
    seen = set()
    for number in (1, 2):
        plan = _plan([Group(OLD, np.ones(30), 30)], 10, number=number)
        seen |= {plan.global_batch(0).tobytes(), plan.global_batch(5).tobytes()}
    assert len(seen) == 4


@pytest.mark.parametrize("draw", ["systematic", "credit"])
@pytest.mark.parametrize("consumed", [0, 3, 5, 9, 10, 14])
def test_a_resumed_plan_goes_on_as_it_would_have(consumed: int, draw: str) -> None:
    weights = np.random.default_rng(2).random(30)
    plan = _plan(_parts(np.ones(30)), 23, number=4, draw=draw)
    expected = []
    for step in range(23):
        if step == 5:
            plan.set_groups(_parts(weights), from_step=10)
        if step == consumed:
            if consumed % 2:
                plan.global_batch(min(step + 4, 22))  # prefetched
            state = plan.state_dict(consumed)
        expected.append(plan.global_batch(step).tolist() if step >= consumed else [])
    resumed = _plan(None, 23, 1, 2, draw=draw)
    resumed.load_state_dict(state)
    assert resumed.first_step == consumed
    if consumed < 5:
        resumed.set_groups(_parts(weights), from_step=10)
    parts = list(resumed)
    assert parts == [ids[4:] for ids in expected[consumed:]]


def test_credit_goes_on_over_windows_whatever_the_weights_become() -> None:
    """Equal weights draw each sample once in two passes or so; others in proportion to them."""
    weights = np.random.default_rng(5).random(30) + 0.2
    plan = _plan(_parts(np.ones(30)), 60, draw="credit")
    old = np.stack([plan.global_batch(step) for step in range(30)])  # 4 of 30 a step
    counts = np.bincount(old[np.isin(old, OLD)], minlength=30)
    assert counts.min() >= 3 and counts.max() <= 5  # 120 draws; permutations have 4 each
    plan.set_groups(_parts(weights), from_step=30)
    old = np.stack([plan.global_batch(step) for step in range(30, 60)])
    counts = np.bincount(old[np.isin(old, OLD)], minlength=30)
    assert (np.abs(counts - 120 * weights / weights.sum()) < 2.5).all()
    with pytest.raises(UsageError, match="give the same ids"):
        plan = _plan(_parts(np.ones(30)), 20, draw="credit")
        plan.global_batch(0)
        plan.set_groups(_parts(weights, OLD[::-1].copy()), from_step=5)
    plan, same = (_plan(_parts(weights), 20, draw="credit") for _ in range(2))
    digest, batches = plan.plan_digest(), _drawn(same)
    assert digest == hashlib.sha256(batches.astype("<i8").tobytes()).hexdigest()
    assert (_drawn(plan) == batches).all()


def test_apportion_is_exact_and_leaves_nobody_out() -> None:
    assert apportion(64, [1, 4]) == [12, 52]
    assert apportion(8, [1, 1000]) == [1, 7]
    assert apportion(5, [0, 1, 1]) == [1, 2, 2]
    with pytest.raises(UsageError, match="a batch of 1 cannot hold samples of 2 groups"):
        apportion(1, [3, 3])


def test_epochs_go_on_with_permutations_and_have_windows_of_their_own() -> None:
    plan = _plan(_parts(np.ones(30)), 15)
    first = _drawn(plan)
    plan.set_epoch(1)
    both = np.concatenate([first, _drawn(plan)])
    current = both[np.isin(both, IDS)].reshape(-1, 40)  # 4 of 30 steps: three passes of 40
    assert [sorted(one) for one in current] == [sorted(IDS)] * 3
    assert len({both[k : k + 5].tobytes() for k in range(0, 30, 5)}) == 6


def test_weights_change_within_an_epoch_only_in_windows() -> None:
    plain = DistributedWeightedSampler(8)
    plain.set_weights(OLD, np.ones(30))
    with pytest.raises(UsageError, match="give window"):
        plain.set_weights(OLD, np.ones(30), from_step=1)
    batches = DistributedWeightedSampler(8, window=1)  # from any step on
    batches.set_weights(OLD, np.ones(30))
    iterator = iter(batches)
    seen = [next(iterator)]
    for k in range(1, 4):
        batches.set_weights(OLD, k == OLD, from_step=k)
        seen.append(next(iterator))
    assert [set(part) for part in seen[1:]] == [{1}, {2}, {3}]
    assert len(seen[0]) == 8


def test_a_plan_that_is_gone_cannot_be_saved_nor_read() -> None:
    plan = _plan(_parts(np.ones(30)), 20)
    for step in range(16):
        plan.global_batch(step)
    assert plan.state_dict(15)["step"] == 15
    with pytest.raises(UsageError, match="step 4"):
        plan.state_dict(4)
    with pytest.raises(UsageError, match="step 4 is of a window that is gone"):
        plan.global_batch(4)
    resumed = _plan(None, 20)
    resumed.load_state_dict(plan.state_dict(15))
    with pytest.raises(UsageError, match="step 14 is of a window that is gone"):
        resumed.groups(14)


def test_nothing_to_draw_is_no_step() -> None:
    plan = DistributedWeightedSampler(8, window=5)
    plan.set_groups([Group(IDS, None, 0)])
    assert [*plan] == []
