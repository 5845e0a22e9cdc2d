"""The table of scores by id, and what it says of samples that were never seen."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from distcl import Runtime
from distcl.errors import ConfigError
from distcl.priority.online import Ledger
from distcl.priority.signal_table import SignalTable
from distcl.priority.signals import create_signal
from distcl.types import Batch, Ids, pack_ids

FIRST = pack_ids(0, np.arange(6))
SECOND = pack_ids(3, np.arange(4))
NONE = np.full(20, -1)


def _table(classes: int = 0) -> SignalTable:
    table = SignalTable(classes)
    table.keep(np.concatenate([SECOND, FIRST]))
    return table


def _write(table: SignalTable, ids: Any, scores: Any, labels: Any = None) -> None:
    ids, scores = np.asarray(ids), np.asarray(scores, dtype=np.float64)
    table.write(ids, scores, NONE[: len(ids)] if labels is None else np.asarray(labels))


def test_the_last_write_of_an_id_wins() -> None:
    table = _table()
    _write(table, FIRST[[0, 1, 0, 2, 0]], [1, 2, 3, 4, 5])
    assert table.read(FIRST[[0, 1, 2]]).tolist() == [5, 2, 4]
    _write(table, FIRST[[1, 1]], [7, 6])
    assert table.read(FIRST[[2, 1, 0]]).tolist() == [4, 6, 5]


def test_ids_never_seen_take_the_mean_of_those_seen() -> None:
    table = _table()
    assert table.read(FIRST).tolist() == [1.0] * 6  # nothing is known: all alike
    _write(table, [*FIRST[:2], SECOND[0]], [1, 2, 6])
    assert table.read(FIRST[2:4]).tolist() == [3, 3]
    _write(table, FIRST[:1], [4])
    assert table.read(SECOND[1:3]).tolist() == [4, 4]


def test_with_classes_the_mean_is_of_the_same_experience_and_class() -> None:
    table = _table(classes=3)
    table.label(FIRST[3:], np.array([0, 1, 2]))
    _write(table, [*FIRST[:3], SECOND[0]], [1, 3, 8, 20], [0, 0, 1, 0])
    assert table.read(FIRST[3:]).tolist() == [2, 8, 8]  # class 2 was never seen: mean of all
    assert table.read(SECOND[1:2]).tolist() == [8]  # its class is unknown
    _write(table, FIRST[2:3], [5], [1])
    assert table.read(FIRST[4:5]).tolist() == [5]
    table.label(SECOND[1:2], np.array([7]))  # no such class: unknown
    assert table.read(SECOND[1:2]).tolist() == [7.25]


def test_the_running_means_are_those_of_a_fresh_count() -> None:
    rng = np.random.default_rng(0)
    ids = np.concatenate([pack_ids(e, np.arange(50)) for e in range(3)])
    labels = rng.integers(0, 4, len(ids))
    table = SignalTable(4)
    table.keep(ids)
    last: dict[int, float] = {}
    for _ in range(20):
        at = rng.integers(0, len(ids), 17)
        scores = rng.random(17)
        table.write(ids[at], scores, labels[at])
        last |= dict(zip(at.tolist(), scores.tolist(), strict=True))
    unseen = np.array([k for k in range(len(ids)) if k not in last])
    table.label(ids[unseen], labels[unseen])
    for k, found in zip(unseen, table.read(ids[unseen]), strict=True):
        like = [s for j, s in last.items() if j // 50 == k // 50 and labels[j] == labels[k]]
        assert found == pytest.approx(np.mean(like or list(last.values())), abs=1e-12)


@pytest.mark.parametrize("share", [1.0, 0.99, 0.3], ids=["all", "runs", "scattered"])
def test_what_is_held_is_found_and_nothing_else(share: float) -> None:
    rng = np.random.default_rng(2)
    every = np.concatenate([pack_ids(e, np.arange(400)) for e in (1, 2, 7)])
    held = every[rng.random(len(every)) < share]
    table, last = SignalTable(), dict[int, float]()
    table.keep(rng.permutation(held))
    around = [every - 1, every + 1, pack_ids(0, np.arange(9)), pack_ids(9, np.arange(9))]
    asked = np.concatenate([every, *around])
    for _ in range(3):
        ids, scores = rng.choice(asked, 3000), rng.random(3000)
        _write(table, ids, scores, np.zeros(3000, dtype=np.int64))
        last |= dict(zip(ids.tolist(), scores.tolist(), strict=True))
    seen = np.array([i for i in held.tolist() if i in last])
    assert len(seen) > 0.9 * len(held)
    assert table.read(seen).tolist() == [last[i] for i in seen.tolist()]
    never = np.setdiff1d(held, seen)
    assert np.isnan(table.state_dict()["scores"].numpy()).sum() == len(never)


def test_what_is_kept_stays_what_is_evicted_goes_and_comes_back_unseen() -> None:
    table = _table()
    _write(table, FIRST, np.arange(6) + 1.0)
    table.keep(np.concatenate([FIRST[2:], SECOND]))
    assert table.read(FIRST[[5, 2]]).tolist() == [6, 3]
    assert table.read(SECOND[:1]).tolist() == [4.5]  # of those still held
    _write(table, FIRST[:1], [100])  # not held: passed over
    assert table.read(SECOND[:1]).tolist() == [4.5]
    table.keep(FIRST)
    assert table.read(FIRST[:2]).tolist() == [4.5, 4.5]


def test_the_state_is_all_there_is() -> None:
    table, other = _table(classes=3), SignalTable(3)
    _write(table, FIRST[:3], [1, 3, 8], [0, 0, 1])
    other.load_state_dict(table.state_dict())
    other.label(FIRST[3:4], np.array([0]))
    assert other.read(FIRST[:4]).tolist() == [1, 3, 8, 2]
    assert other.ids.tolist() == table.ids.tolist()


class Labelled:
    """A source that counts what is read of it; the label is the row modulo 3."""

    def __init__(self) -> None:
        self.read_ids: list[int] = []

    def __len__(self) -> int:
        return 10

    def read(self, ids: Ids) -> Batch:
        self.read_ids += ids.tolist()
        return Batch(torch.from_numpy(ids), torch.zeros(len(ids), 1), torch.from_numpy(ids % 3))


def _observed(ledger: Ledger, ids: Ids, losses: Any) -> None:
    y = torch.from_numpy(ids % 3)
    batch = Batch(torch.from_numpy(ids), torch.zeros(len(ids), 1), y, len(ids))
    ledger.observe(batch, torch.zeros(len(ids), 3), torch.tensor(losses, dtype=torch.float64))


def test_labels_are_read_once_and_only_of_history_never_seen() -> None:
    source, ledger = Labelled(), Ledger(Runtime(), create_signal("loss"), 3)
    ledger.expect(0, source, FIRST, FIRST[:0])
    assert source.read_ids == []
    _observed(ledger, FIRST[:3], [1.0, 2.0, 6.0])
    ledger.gather()
    ledger.expect(1, source, SECOND, FIRST)
    assert sorted(source.read_ids) == FIRST[3:].tolist()
    ledger.expect(1, source, SECOND, FIRST)
    ledger.expect(2, source, SECOND[:0], FIRST)
    assert len(source.read_ids) == 3
    assert ledger.table.read(FIRST).tolist() == [1, 2, 6, 1, 2, 6]


def test_bad_scores_are_named_and_a_loss_that_diverged_is_left_to_the_loss_watch() -> None:
    ledger = Ledger(Runtime(), create_signal("loss"), 0)
    ledger.expect(0, Labelled(), FIRST, FIRST[:0])
    _observed(ledger, FIRST[:3], [1.0, float("nan"), 3.0])
    ledger.gather()
    assert ledger.table.read(FIRST[:3]).tolist() == [1, 2, 3]
    _observed(ledger, FIRST[:3], [1.0, -2.0, 3.0])
    message = f"the score of signal 'Loss' of sample id {FIRST[1]} is -2.0"
    with pytest.raises(ConfigError, match=message):
        ledger.gather()
    signal = create_signal("tests.dist.test_scoring:Bad", {"how": "shape"})
    ledger = Ledger(Runtime(), signal, 0)
    with pytest.raises(ConfigError, match=r"signal 'Bad' returned \(3, 1\)"):
        _observed(ledger, FIRST[:3], [1.0, 2.0, 3.0])


def test_an_updater_that_hides_its_forward_is_told_what_to_call() -> None:
    with pytest.raises(ConfigError, match=r"Updater\.losses_of"):
        Ledger(Runtime(), create_signal("loss"), 0).gather()


def test_gathering_early_to_save_the_state_changes_nothing() -> None:
    ledger, other = (Ledger(Runtime(), create_signal("loss"), 3) for _ in range(2))
    ledger.expect(5, Labelled(), FIRST, FIRST[:0])
    _observed(ledger, FIRST[:2], [1.0, 2.0])
    assert ledger.waits
    ledger.gather()
    other.load_state_dict(ledger.state_dict())
    for each in (ledger, other):
        _observed(each, FIRST[1:3], [4.0, 6.0])
        each.gather()
    assert (
        other.table.read(FIRST[:3]).tolist() == ledger.table.read(FIRST[:3]).tolist() == [1, 4, 6]
    )


@pytest.mark.parametrize("classes_first", [False, True])
def test_texts_of_unequal_lengths_are_scored_as_each_batch_alone(classes_first: bool) -> None:
    ledger = Ledger(Runtime(), create_signal("entropy", loss="cross_entropy", classes=7), 7)
    ledger.expect(0, Labelled(), FIRST, FIRST[:0])
    torch.manual_seed(0)
    expected: list[float] = []
    for ids, length in ((FIRST[:2], 3), (FIRST[2:3], 3), (FIRST[3:6], 5)):
        logits, y = torch.randn(len(ids), length, 7), torch.zeros(len(ids), length).long()
        p = logits.softmax(-1)
        expected += (-(p * p.log()).sum(-1)).mean(1).tolist()
        outputs = logits.movedim(-1, 1) if classes_first else logits
        batch = Batch(torch.from_numpy(ids), None, y, len(ids))
        ledger.observe(batch, outputs, torch.ones(len(ids)))
    ledger.gather()
    np.testing.assert_allclose(ledger.table.read(FIRST), expected, rtol=1e-6)
