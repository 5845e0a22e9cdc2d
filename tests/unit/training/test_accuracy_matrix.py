import json

import numpy as np
import pytest

from distcl.errors import CheckpointError
from distcl.training.accuracy_matrix import AccuracyMatrix, Matrices

METRICS = (
    "average_accuracy",
    "average_forgetting",
    "backward_transfer",
    "average_anytime_accuracy",
    "worst_experience_accuracy",
)


def matrix(rows, seen):
    made = AccuracyMatrix()
    for row, count in zip(rows, seen, strict=True):
        made.append(row, count)
    return made


def test_values_computed_by_hand():
    m = matrix([[0.9, 0.2, 0.1], [0.7, 0.8, 0.3], [0.6, 0.85, 0.95]], [1, 2, 3])
    assert m.average_accuracy() == pytest.approx((0.6 + 0.85 + 0.95) / 3)
    assert m.average_forgetting() == pytest.approx(((0.9 - 0.6) + (0.8 - 0.85)) / 2)
    assert m.backward_transfer() == pytest.approx(((0.6 - 0.9) + (0.85 - 0.8)) / 2)
    assert m.forward_transfer([0.1, 0.1, 0.1]) == pytest.approx(((0.2 - 0.1) + (0.3 - 0.1)) / 2)
    assert m.average_anytime_accuracy() == pytest.approx((0.9 + 0.75 + 0.8) / 3)
    assert m.worst_experience_accuracy() == 0.6


def test_where_less_is_better_a_rise_is_forgotten_and_what_fell_was_gained():
    rows = [[0.9, 0.2, 0.1], [0.7, 0.8, 0.3], [0.6, 0.85, 0.95]]
    m, contrary = matrix(rows, [1, 2, 3]), AccuracyMatrix(higher_is_better=False)
    for row, seen in zip(rows, [1, 2, 3], strict=True):
        contrary.append([1 - value for value in row], seen)
    for name in METRICS:
        ours, theirs = getattr(m, name)(), getattr(contrary, name)()
        gain = name in ("average_forgetting", "backward_transfer")
        assert theirs == pytest.approx(ours if gain else 1 - ours), name
    assert contrary.forward_transfer([0.9] * 3) == pytest.approx(m.forward_transfer([0.1] * 3))


def test_the_matrices_of_several_scores_are_one_part_of_a_checkpoint():
    several = Matrices({"accuracy": True, "loss": False})
    several.append({"accuracy": [0.5, None], "loss": [2.0, 3.0]}, 1)
    several.fill_last([0.1, 4.0])
    assert several.of["loss"].rows() == [[2.0, 3.0, 4.0]]
    other = Matrices({"accuracy": True, "loss": False})
    other.load_state_dict(json.loads(json.dumps(several.state_dict())))
    assert other.state_dict() == several.state_dict()
    with pytest.raises(CheckpointError, match="judged by accuracy, loss, this one by auroc"):
        Matrices({"auroc": True}).load_state_dict(several.state_dict())


@pytest.mark.parametrize("tasks", [2, 3, 7])
def test_square_matrices_agree_with_a_dense_reference(tasks):
    r = np.random.default_rng(tasks).random((tasks, tasks))
    baseline = np.random.default_rng(9).random(tasks)
    m = matrix(r.tolist(), range(1, tasks + 1))
    last, below = r[-1], np.arange(tasks - 1)
    assert m.average_accuracy() == pytest.approx(last.mean())
    assert m.average_forgetting() == pytest.approx((r[:-1].max(0) - last)[:-1].mean())
    assert m.backward_transfer() == pytest.approx((last - np.diag(r))[:-1].mean())
    assert m.forward_transfer(baseline.tolist()) == pytest.approx(
        (r[below, below + 1] - baseline[1:]).mean()
    )
    assert m.average_anytime_accuracy() == pytest.approx(
        np.mean([r[i, : i + 1].mean() for i in range(tasks)])
    )
    assert m.worst_experience_accuracy() == last.min()


def test_columns_that_come_with_their_round():
    m = matrix([], [])
    m.fill_last(0.5)  # no row yet: nothing to fill
    assert m.rows() == []
    m.append([0.9], 1)
    m.fill_last(0.3)
    m.append([0.8, 0.7], 2)
    m.fill_last(0.4)
    m.append([0.5, 0.75, 0.6], 3)
    assert m.rows() == [[0.9, 0.3, None], [0.8, 0.7, 0.4], [0.5, 0.75, 0.6]]
    assert m.forward_transfer([0.1] * 3) == pytest.approx((0.2 + 0.3) / 2)
    assert m.average_forgetting() == pytest.approx((0.4 - 0.05) / 2)
    assert m.average_anytime_accuracy() == pytest.approx((0.9 + 0.75 + 1.85 / 3) / 3)


def test_rounds_without_a_new_experience_and_several_new_at_once():
    m = matrix([[0.9, 0.1, 0.2], [0.8, 0.1, 0.2], [0.7, 0.6, 0.5], [0.95, 0.65, 0.4]], [1, 1, 3, 3])
    assert m.backward_transfer() == pytest.approx((0.05 + 0.05 - 0.1) / 3)
    assert m.average_forgetting() == pytest.approx((-0.05 - 0.05 + 0.1) / 3)
    assert m.forward_transfer([0.0, 0.1, 0.1]) == pytest.approx((0.0 + 0.1) / 2)


def test_what_was_not_evaluated_is_left_out():
    m = matrix([[0.9, None], [None, 0.8], [0.6, None, 0.7]], [1, 2, 3])
    assert m.average_accuracy() == pytest.approx(0.65)
    assert m.worst_experience_accuracy() == 0.6
    assert m.average_forgetting() == pytest.approx(0.3)
    assert m.backward_transfer() == pytest.approx(-0.3)
    assert m.forward_transfer([0.1, 0.1, None]) is None
    assert m.average_anytime_accuracy() == pytest.approx((0.9 + 0.8 + 0.65) / 3)


def test_nothing_to_say_is_none():
    for m in (matrix([], []), matrix([[None, None]], [2])):
        assert all(getattr(m, name)() is None for name in METRICS)
        assert m.forward_transfer([0.1, 0.1]) is None
    one = matrix([[0.5]], [1])
    assert one.average_forgetting() is one.backward_transfer() is None
    assert one.average_accuracy() == one.average_anytime_accuracy() == 0.5
    unseen = matrix([[0.5], [0.6]], [0, 0])
    assert unseen.average_accuracy() is unseen.worst_experience_accuracy() is None


def test_state_goes_through_json():
    m = matrix([[0.9, None], [0.1, 0.8, 0.3]], [1, 2])
    other = matrix([[0.1]], [1])
    other.load_state_dict(json.loads(json.dumps(m.state_dict(), allow_nan=False)))
    assert other.rows() == m.rows()
    assert other.average_accuracy() == m.average_accuracy()
    other.append([0.1, 0.1, 0.1], 3)
    assert len(m.rows()) == 2


def test_rows_that_cannot_be_are_refused():
    m = matrix([[0.5, 0.5]], [2])
    for row, seen in [([0.5, 0.5], 1), ([0.5, 0.5], 3)]:
        with pytest.raises(ValueError, match=f"seen = {seen}"):
            m.append(row, seen)
    with pytest.raises(ValueError, match="an accuracy is nan"):
        m.append([0.5, float("nan")], 2)
    with pytest.raises(ValueError, match="1 baselines for 2 experiences"):
        m.forward_transfer([0.1])
