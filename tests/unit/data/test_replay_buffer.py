from itertools import combinations

import numpy as np
import pytest
import torch
from scipy.stats import chi2, chisquare

from distcl.data.replay_buffer import ReplayBuffer
from distcl.errors import DataError
from distcl.priority.loss_cache import LossCache
from distcl.types import Batch, DataSpec, Experience, SourceInfo, frozen, pack_ids, unpack_ids


class Leaving:
    """A stream whose experiences cannot be read once a later one has begun."""

    def __init__(self) -> None:
        self.spec = DataSpec((3,), 2)
        self.experiences: list[Experience] = []
        self.now = 0

    def __len__(self) -> int:
        return 100

    def read(self, ids):
        experience, rows, _ = unpack_ids(ids)
        if (experience != self.now).any():
            raise DataError(f"experience {experience.min()} is gone")
        values = torch.from_numpy(100.0 * experience + rows)
        x = {"a": values[:, None].expand(-1, 3).clone(), "b": values.long()}
        return Batch(torch.from_numpy(ids), x, values.long() % 2, len(ids))


STREAM = Leaving()


def test_history_keeps_ids_in_order_and_once():
    history = ReplayBuffer(STREAM)
    assert len(history) == 0 and history.ids().shape == (0,)
    history.add(pack_ids(0, [5, 2, 9]))
    history.add(pack_ids(1, [2, 2, 5]))
    history.add(pack_ids(0, [9, 1]))
    expected = [*pack_ids(0, [5, 2, 9]), *pack_ids(1, [2, 5]), *pack_ids(0, [1])]
    assert history.ids().tolist() == expected
    assert history.ids().dtype == np.int64 and len(history) == 6


def test_what_history_hands_out_is_not_what_it_keeps():
    history = ReplayBuffer(STREAM)
    given = pack_ids(0, [1, 2])
    history.add(given)
    given[0] = 7
    with pytest.raises(ValueError, match="read-only"):
        history.ids()[1] = 8
    assert history.ids().tolist() == [1, 2]


def test_history_shares_ids_that_cannot_change():
    given = frozen(pack_ids(0, np.arange(1000)[::-1]))
    history = ReplayBuffer(STREAM)
    assert np.shares_memory(history.after(given), given)
    history.add(given)
    assert np.shares_memory(history.ids(), given)
    history.add(frozen(pack_ids(1, [5, 4, 5])))
    assert history.ids()[1000:].tolist() == pack_ids(1, [5, 4]).tolist()


def test_history_survives_a_weights_only_checkpoint(tmp_path):
    history = ReplayBuffer(STREAM)
    history.add(pack_ids(3, [4, 1]))
    torch.save(history.state_dict(), tmp_path / "history.pt")
    again = ReplayBuffer(STREAM)
    again.add(pack_ids(0, [1]))
    again.load_state_dict(torch.load(tmp_path / "history.pt", weights_only=True))
    assert np.array_equal(again.ids(), history.ids())
    again.add(pack_ids(4, [0]))
    assert len(again) == 3 and len(history) == 2


def test_a_full_history_is_any_set_of_its_size_with_equal_probability():
    ids = np.concatenate([pack_ids(0, range(4)), pack_ids(3, range(4))])
    subsets = {s: k for k, s in enumerate(combinations(ids.tolist(), 3))}
    counts = np.zeros(len(subsets))
    for seed in range(5600):
        history = ReplayBuffer(STREAM, 3, seed)
        history.add(ids[:5])
        history.add(ids[5:])
        counts[subsets[tuple(history.ids().tolist())]] += 1
    assert 1e-3 < chisquare(counts).pvalue < 1 - 1e-3


def test_ids_of_a_large_stream_are_kept_equally_often():
    n, capacity, seeds = 2000, 300, 400
    counts = np.zeros(n)
    for seed in range(seeds):
        history = ReplayBuffer(STREAM, capacity, seed)
        history.add(np.arange(n))
        counts[history.ids()] += 1
    p = capacity / n
    statistic = ((counts - seeds * p) ** 2).sum() / (seeds * p * (1 - p)) * (n - 1) / n
    assert 1e-3 < chi2.sf(statistic, n - 1) < 1 - 1e-3


def test_what_a_full_history_holds_does_not_depend_on_how_it_was_filled():
    ids = np.random.default_rng(0).permutation(500)
    whole, parts = ReplayBuffer(STREAM, 40, seed=7), ReplayBuffer(STREAM, 40, seed=7)
    whole.add(ids)
    for part in np.array_split(ids, 9):
        parts.add(part)
    assert np.array_equal(whole.ids(), parts.ids())  # and both oldest first
    assert np.array_equal(np.isin(ids, whole.ids()), np.isin(ids, parts.ids()))
    assert not np.array_equal(ReplayBuffer(STREAM, 40, seed=8).after(ids), whole.ids())


def test_a_full_history_says_beforehand_what_it_will_hold_and_what_was_let_go_stays_out():
    history = ReplayBuffer(STREAM, 10, seed=1)
    history.add(np.arange(8))
    before = history.ids()
    expected = history.after(np.arange(8, 30))
    assert np.array_equal(history.ids(), before)
    history.add(np.arange(8, 30))
    assert np.array_equal(history.ids(), expected) and len(history) == 10
    history.add(np.setdiff1d(np.arange(30), expected))
    assert np.array_equal(history.ids(), expected)


def test_copies_serve_what_the_history_holds_and_the_stream_the_rest():
    leaving = Leaving()
    history = ReplayBuffer(leaving, 12, seed=3, copies=True)
    assert history.source is history
    for experience in range(3):
        leaving.now = experience
        ids = pack_ids(experience, np.arange(10))
        wanted = np.random.default_rng(experience).permutation(np.r_[ids, history.ids()])
        batch = history.read(wanted)
        e, rows, _ = unpack_ids(wanted)
        assert batch.ids.tolist() == wanted.tolist() and batch.total == len(wanted)
        assert batch.x["b"].tolist() == (100 * e + rows).tolist()
        assert batch.x["a"][:, 2].tolist() == batch.x["b"].tolist()
        assert batch.y.tolist() == (rows % 2).tolist()
        history.add(ids)
    leaving.now = 3
    assert len(history.read(history.ids())) == 12
    gone = np.setdiff1d(pack_ids(0, np.arange(10)), history.ids())
    with pytest.raises(DataError, match="experience 0 is gone"):
        history.read(gone[:1])


def test_copies_survive_a_weights_only_checkpoint(tmp_path):
    leaving = Leaving()
    history = ReplayBuffer(leaving, copies=True)
    history.add(pack_ids(0, np.arange(5)))
    torch.save(history.state_dict(), tmp_path / "history.pt")
    leaving.now = 1
    again = ReplayBuffer(leaving, copies=True)
    again.load_state_dict(torch.load(tmp_path / "history.pt", weights_only=True))
    assert again.read(pack_ids(0, [4, 2])).x["b"].tolist() == [4, 2]


def test_the_loss_cache_is_a_dictionary_of_two_sets_of_weights():
    rng, cache = np.random.default_rng(0), LossCache()
    expected: dict[int, dict[int, float]] = {}
    for weights in (1, 1, 2, 2, 3, 2):  # with 3, that of 1 is dropped
        ids = rng.permutation(300)[: rng.integers(1, 200)]
        losses = torch.from_numpy(rng.random(len(ids)))
        cache.put(weights, ids, losses)
        table = expected.setdefault(weights, {})
        for i, loss in zip(ids.tolist(), losses.tolist(), strict=True):
            table.setdefault(i, loss)
    del expected[1]
    assert len(cache) == sum(map(len, expected.values()))
    for weights in (1, 2, 3):
        table = expected.get(weights, {})
        for asked in (ids, rng.permutation(300), np.arange(0), np.array(sorted(table), np.int64)):
            known, losses = cache.get(weights, asked)
            assert known.tolist() == [i in table for i in asked.tolist()]
            assert losses.tolist() == [table.get(i, 0.0) for i in asked.tolist()]


class Skipping:
    """Ten samples, of which 7 is bad: the next one is read in its place."""

    spec, experiences = DataSpec((1,), 2), []

    def __init__(self):
        self.info = SourceInfo(replaces=True)

    def __len__(self):
        return 10

    def read(self, ids):
        ids = np.array(ids, dtype=np.int64)
        self.info.replaced.update(ids[ids == 7].tolist())
        ids[ids == 7] = 8
        x = torch.from_numpy(ids)
        return Batch(x, x.float()[:, None], x, len(ids))


@pytest.mark.parametrize("kept", [[], [1, 2], [1, 7], [1, 7, 8]])
def test_a_copy_says_which_sample_it_is_of(kept):
    buffer = ReplayBuffer(Skipping(), copies=True)
    buffer.retain(np.array(kept, dtype=np.int64))
    again = ReplayBuffer(Skipping(), copies=True)
    again.load_state_dict(buffer.state_dict())
    for source in (buffer, again):
        for asked in ([7], [1, 7], [7, 3, 1, 7, 2, 9], [8, 7], []):
            batch = source.read(np.array(asked, dtype=np.int64))
            read = [8 if i == 7 else i for i in asked]
            assert batch.ids.tolist() == batch.y.tolist() == read
            assert batch.x[:, 0].tolist() == read
        assert source.info.replaced == {7}  # also where it was kept in another process


@pytest.mark.parametrize(
    ("held", "instead"),
    [([], 8), ([1, 2], 8), ([5, 7, 2, 9], 9), ([7, 8], 8), ([2, 7, 1], 1), ([7], 8)],
)
def test_in_the_place_of_a_bad_sample_that_is_held_comes_another_one_that_is(held, instead):
    buffer = ReplayBuffer(Skipping())
    assert buffer.source is buffer
    buffer.add(np.array(held, dtype=np.int64))
    batch = buffer.read(np.array([3, 7, 9, 7]))
    assert batch.ids.tolist() == batch.y.tolist() == [3, instead, 9, instead]
    assert buffer.info.replaced == {7}


class Wrapping:
    """Experiences of ten samples, of which rows 1 and 6 are sound: they come for those before."""

    spec, experiences, info = DataSpec((1,), 2), [], SourceInfo(replaces=True)

    def __len__(self):
        return 30

    def read(self, ids):
        e, rows, _ = unpack_ids(ids)
        rows = np.select([rows < 2, rows < 7], [1, 6], 1)
        x = torch.from_numpy((e << 40) | rows)
        return Batch(x, x.float()[:, None], x, len(ids))


@pytest.mark.parametrize(
    ("held", "instead"),
    [
        ([(1, 7), (1, 8), (2, 6)], (2, 6)),
        ([(1, 7), (1, 8), (1, 9), (2, 3), (2, 4), (2, 6), (0, 1)], (2, 6)),
        ([(1, 7), (1, 8), (2, 3), (2, 9), (0, 1), (0, 2)], (0, 1)),
        ([(1, 7), (1, 2), (1, 6), (2, 9)], (1, 6)),
        ([(1, 7), (1, 8), (0, 0), (2, 3)], (1, 1)),
    ],
)
def test_a_stand_in_is_looked_for_in_all_that_is_held(held, instead):
    buffer = ReplayBuffer(Wrapping())
    buffer.add(np.concatenate([pack_ids(e, [row]) for e, row in held]))
    read = buffer.read(pack_ids(1, [7])).ids.numpy()
    assert (int(read[0] >> 40), int(read[0] & 0xFF)) == instead
