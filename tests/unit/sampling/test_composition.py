"""Counts that are a share of something: of the decimal number that was written, exactly."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from distcl.config import ContinualLearningConfig, StreamConfig, TrainingConfig
from distcl.data.sources.arrays import stratified
from distcl.data.stream import create_stream
from distcl.priority.weighting import WeightVector
from distcl.sampling.composition import Mix
from distcl.types import exact


def mix(ratio: float = 1.0, **training: float) -> Mix:
    continual = ContinualLearningConfig(current_ratio=ratio, mix_historic_data=True)
    return Mix(TrainingConfig(**training), continual, union=False)


def test_a_share_is_the_number_that_was_written() -> None:
    assert exact(0.57) == Fraction(57, 100)
    assert exact(np.float64(0.1)) == Fraction(1, 10)
    assert exact(1e-7) == Fraction(1, 10**7)


@pytest.mark.parametrize("percent", range(1, 100))
def test_current_ratio_draws_r_and_1_minus_r(percent: int) -> None:
    assert mix(percent / 100).draws(100, 100) == (percent, 100 - percent)
    current, history = percent * 10 // 100, (100 - percent) * 10 // 100
    assert mix(percent / 100).draws(10, 10) == (max(1, current), history)
    assert mix(percent / 100).draws(1000, 5) == (10 * percent, (100 - percent) * 5 // 100)


def test_other_shares_are_exact_too() -> None:
    assert mix(batch_size=1, step_factor=0.57, epochs=1).steps(150, 0) == 86  # 85.5
    rows, test = stratified(np.zeros(150, dtype=np.int64), 0.57)
    assert (len(rows), len(test)) == (64, 86)
    ones = np.ones(150)
    assert WeightVector(np.arange(len(ones)), ones).top_share(0.57) == pytest.approx(86 / 150)


class Zeros:
    """Draws that are all zero: whatever may come from the concept before does."""

    def random(self, n: int) -> np.ndarray:
        return np.zeros(n)

    def permutation(self, values: np.ndarray) -> np.ndarray:
        return values


def test_a_transition_ends_where_it_says() -> None:
    keys = {"experiences": 2, "transition_fraction": 0.14}
    stream = create_stream(StreamConfig(**keys), 0)
    rows, other = np.arange(100), np.arange(len(stream._older[1])) >= 100
    stream._older[:] = False
    stream._blend(1, rows, other, Zeros())
    assert stream._older[1].sum() == 14 and (rows[14:] == np.arange(14, 100)).all()
