"""Ids in runs read as the array that they stand for."""

from __future__ import annotations

import operator

import numpy as np
import pytest

from distcl.config import StreamConfig
from distcl.data import ids as ids_module
from distcl.data.ids import (
    IdIndex,
    IdRuns,
    among,
    blocks,
    ids_tensor,
    in_runs,
    joined_ids,
    tensor_ids,
)
from distcl.data.replay_buffer import ReplayBuffer
from distcl.data.stream import create_stream
from distcl.types import pack_ids

BEGINS, SIZES = [50, 3, 1 << 40], [4, 7, 5]
PLAIN = np.concatenate([np.arange(b, b + n) for b, n in zip(BEGINS, SIZES, strict=True)])
RUNS = IdRuns(BEGINS, SIZES)

KEYS = [
    0,
    -1,
    slice(None),
    slice(2, 9),
    slice(-3, None),
    slice(None, None, 3),
    slice(None, None, -1),
    slice(9, 2),
    [3, -1, 3, 0],
    np.empty(0, dtype=np.int64),
    PLAIN % 2 == 0,
]


@pytest.mark.parametrize("block", [1, 3, 1 << 16])
@pytest.mark.parametrize("key", KEYS, ids=str)
def test_an_index_gives_what_an_array_would(key, block, monkeypatch):
    monkeypatch.setattr(ids_module, "BLOCK", block)
    assert np.array_equal(RUNS[key], PLAIN[key])


@pytest.mark.parametrize("key", [16, -17, [0, 16], np.ones(15, bool)], ids=str)
def test_what_is_outside_is_refused(key):
    with pytest.raises(IndexError):
        RUNS[key]


def test_numpy_takes_them_as_an_array():
    assert (len(RUNS), RUNS.shape, RUNS.min(), RUNS.max()) == (16, (16,), 3, PLAIN.max())
    assert np.array_equal(np.asarray(RUNS), PLAIN)
    assert np.array_equal(np.sort(RUNS), np.sort(PLAIN))
    assert np.array_equal(np.concatenate([RUNS, RUNS]), np.concatenate([PLAIN, PLAIN]))
    assert np.array_equal(RUNS >> 1, PLAIN >> 1)
    assert np.array_equal(operator.and_(7, RUNS), 7 & PLAIN)
    assert list(RUNS) == RUNS.tolist() == PLAIN.tolist()


def test_among():
    asked = np.array([2, 3, 9, 10, 49, 50, 53, 54, 1 << 40, (1 << 40) + 5, -1])
    for others in (RUNS, PLAIN):
        assert among(asked, others).tolist() == np.isin(asked, PLAIN).tolist()
    assert not among(asked, IdRuns([], [])).any()


RUN = np.arange(40)
HELD = {
    "runs": RUNS,
    "array of runs": PLAIN,
    "one run": 7 + RUN,
    "few runs": np.concatenate([RUN, pack_ids(3, RUN), 90 + RUN]),
    "ascending": RUN**2,
    "in any order": np.random.default_rng(0).permutation(RUN**2),
    "twice in runs": np.concatenate([RUN, 5 + RUN[:20]]),
    "none": RUN[:0],
    "no runs": IdRuns([], []),
}


@pytest.mark.parametrize("block", [7, 1 << 16])
@pytest.mark.parametrize("held", HELD)
def test_an_index_knows_the_row_of_each_id(held, block, monkeypatch):
    monkeypatch.setattr(ids_module, "BLOCK", block)
    ids = HELD[held]
    plain = np.asarray(ids).tolist()
    asked = np.random.default_rng(1).permutation(np.r_[np.arange(-3, 150), PLAIN, ids, ids])
    rows, there = IdIndex(ids).locate(asked)
    assert there.tolist() == [i in set(plain) for i in asked.tolist()]
    assert rows[there].tolist() == [plain.index(i) for i in asked.tolist() if i in set(plain)]
    assert len(IdIndex(ids).locate(asked[:0])[0]) == 0


@pytest.mark.parametrize("size", [1, 2, 5, 100])
def test_pieces_become_runs_across_their_edges(size, monkeypatch):
    monkeypatch.setattr(ids_module, "BLOCK", size)
    found = in_runs(blocks(PLAIN))
    assert isinstance(found, IdRuns)
    assert (found.begins.tolist(), found.sizes.tolist()) == (BEGINS, SIZES)


def test_what_has_no_runs_stays_an_array():
    scattered = np.array([9, 5, 1, 0])
    assert isinstance(in_runs([scattered]), np.ndarray)
    assert in_runs([scattered]).tolist() == scattered.tolist()
    assert isinstance(in_runs([]), np.ndarray)
    assert len(in_runs([scattered[:0]])) == 0


def test_join():
    more = np.arange(100, 110)
    both = joined_ids([RUNS, more[:0], more])
    assert isinstance(both, IdRuns)
    assert np.asarray(both).tolist() == [*PLAIN, *more]
    assert joined_ids([more[::2], RUNS]).tolist() == [*more[::2], *PLAIN]
    assert isinstance(joined_ids([more, more]), np.ndarray)


@pytest.mark.parametrize("given", [RUNS, PLAIN, None], ids=["runs", "array", "none"])
def test_a_checkpoint_keeps_them_as_they_are(given):
    found = tensor_ids(ids_tensor(given))
    assert type(found) is type(given)
    assert given is None or np.array_equal(np.asarray(found), PLAIN)


STREAM = create_stream(StreamConfig(), 0)

# -- in a history ---------------------------------------------------------------------------------


@pytest.mark.parametrize("capacity", [0, 7])
@pytest.mark.parametrize("block", [2, 1 << 16])
def test_a_history_of_runs_holds_what_one_of_arrays_does(capacity, block, monkeypatch):
    monkeypatch.setattr(ids_module, "BLOCK", block)
    monkeypatch.setattr("distcl.data.replay_buffer.BLOCK", block)
    plain, runs = ReplayBuffer(STREAM, capacity, seed=3), ReplayBuffer(STREAM, capacity, seed=3)
    parts = [pack_ids(1, np.arange(10)), pack_ids(0, np.arange(4, 30)), pack_ids(1, np.arange(40))]
    for ids in parts:
        plain.add(ids)
        runs.add(in_runs([ids]))
        assert np.asarray(runs.ids()).tolist() == plain.ids().tolist()
    assert isinstance(runs.ids(), IdRuns) == (not capacity)
    again = ReplayBuffer(STREAM, capacity, seed=3)
    again.load_state_dict(runs.state_dict())
    assert np.asarray(again.ids()).tolist() == plain.ids().tolist()
