"""Draws from data that are read from front to back."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from distcl.priority.lanes import LaneSampler
from distcl.priority.sampler import Group
from distcl.types import pack_ids

N, LANES, WINDOW = 120, 4, 16


def lanes_of(ids: np.ndarray, lanes: int) -> np.ndarray:
    return (ids & 0xFFFF) * lanes // N


def sampler(size: int = 10, **keys: int) -> LaneSampler:
    return LaneSampler(size, LANES, lanes_of, window=WINDOW, **{"seed": 7, **keys})


def weighted(made: LaneSampler, draws: int = N) -> np.ndarray:
    weights = np.random.default_rng(0).exponential(size=N) ** 2
    weights[::5] = 0
    made.set_groups([Group(np.arange(N), weights, draws)])
    return draws * weights / weights.sum()


def sequence(made: LaneSampler) -> np.ndarray:
    return np.concatenate([made.global_batch(step) for step in range(len(made))])


@given(
    world=st.integers(1, 9),
    size=st.integers(9, 40),
    draws=st.integers(1, 300),
    history=st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_ranks_share_out_the_same_global_batches_at_every_world_size(world, size, draws, history):
    groups = [Group(pack_ids(1, np.arange(N)), np.arange(N) + 0.5, draws)]
    if history:
        groups.append(Group(pack_ids(0, np.arange(0, N, 3)), None, 40))
    alone = sampler(size)
    alone.set_groups(groups)
    ranks = [sampler(size, rank=r, world_size=world) for r in range(world)]
    for made in ranks:
        made.set_groups(groups)
    parts = [list(made) for made in ranks]
    assert {len(p) for p in parts} == {len(alone)} == {-(-(draws + 40 * history) // size)}
    for step in range(len(alone)):
        together = np.sort(np.concatenate([np.array(p[step], np.int64) for p in parts]))
        np.testing.assert_array_equal(together, np.sort(alone.global_batch(step)))


def test_a_pass_without_weights_has_every_sample_once():
    made = sampler()
    made.set_groups([Group(np.arange(N), None, N)])
    first = sequence(made)
    np.testing.assert_array_equal(np.sort(first), np.arange(N))
    made.set_epoch(1)
    assert (sequence(made) != first).any()


def test_counts_are_within_one_of_their_expectation_and_equal_it_on_average():
    made, rounds = sampler(), 200
    expected = weighted(made)
    counts = np.zeros((rounds, N))
    for k in range(rounds):
        made.set_round(k)
        counts[k] = np.bincount(sequence(made), minlength=N)
    assert (np.abs(counts - expected) < 1).all()
    share = expected - np.floor(expected)
    deviation = np.sqrt(rounds * share * (1 - share))
    z = np.abs(counts.sum(0) - rounds * expected) / np.maximum(deviation, 1e-9)
    z[deviation < 1e-6] = 0
    assert z.max() < stats.norm.isf(0.01 / 2 / N)


def test_samples_are_shuffled_within_windows_only_and_lanes_keep_their_order():
    made = sampler()
    weighted(made, draws=400)
    ids = sequence(made)
    lanes = lanes_of(ids, LANES)
    for lane in range(LANES):
        mine = ids[lanes == lane]
        assert (mine < np.maximum.accumulate(mine)).any()
        assert (np.maximum.accumulate(mine) - mine).max() < WINDOW
    sizes = np.bincount(lanes)
    seen = np.cumsum(np.eye(LANES)[lanes], axis=0)
    due = np.arange(1, len(ids) + 1)[:, None] / len(ids) * sizes
    assert np.abs(seen - due).max() < LANES


def test_experiences_are_mixed_evenly_along_a_pass():
    made = sampler()
    made.set_groups([Group(pack_ids(e, np.arange(N)), None, N) for e in range(3)])
    experience = sequence(made) >> 40
    for part in np.split(experience, 6):
        assert np.bincount(part, minlength=3).min() >= 15


@pytest.mark.parametrize("world", [1, 3])
def test_a_resumed_pass_goes_on_exactly(world):
    whole = sampler(rank=world - 1, world_size=world)
    weighted(whole)
    whole.set_round(4)
    whole.set_epoch(2)
    other = sampler()
    weighted(other)
    other.set_round(4)
    other.set_epoch(2)
    steps = iter(other)
    for _ in range(5):
        next(steps)
    resumed = sampler(rank=world - 1, world_size=world)
    resumed.load_state_dict(other.state_dict())
    assert resumed.first_step == 5
    assert list(resumed) == list(whole)[5:]
    with pytest.raises(ValueError, match="not"):
        sampler(12).load_state_dict(other.state_dict())


def test_nothing_to_draw_from_is_refused():
    with pytest.raises(ValueError, match="no ids"):
        sampler().set_groups([Group(np.arange(0), None, 5)])
    with pytest.raises(ValueError, match="id 3"):
        sampler().set_groups([Group(np.arange(9), np.where(np.arange(9) == 3, np.nan, 1), 5)])
