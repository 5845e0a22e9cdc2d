import math

import numpy as np
import pytest
from scipy import stats

from distcl.reporting.verdict import holm, paired


def test_interval_and_p_are_those_of_scipy():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=9), rng.normal(0.5, 1, size=9)
    found = paired(b, a)
    test = stats.ttest_rel(b, a)
    low, high = test.confidence_interval(0.95)
    assert found.n == 9 and found.mean == pytest.approx(np.mean(b - a))
    assert (found.p, found.low, found.high) == pytest.approx((test.pvalue, low, high))
    error = (b - a).std(ddof=1) / 3  # written out, by Student's t with 8 degrees of freedom
    assert found.high - found.mean == pytest.approx(stats.t.ppf(0.975, 8) * error)
    assert found.p == pytest.approx(2 * stats.t.sf(abs(found.mean) / error, 8))


def test_one_pair_has_a_mean_and_nothing_else():
    found = paired([2.0], [1.5])
    assert found.mean == 0.5
    assert all(math.isnan(value) for value in (found.low, found.high, found.p))
    assert math.isnan(paired([], []).mean)


def test_equal_differences_have_no_spread():
    assert paired([1.0, 2.0, 3.0], [1.0, 2.0, 3.0]).p == 1.0
    same = paired([1.5, 2.5, 3.5], [1.0, 2.0, 3.0])
    assert (same.p, same.low, same.high) == (0.0, 0.5, 0.5)


def test_holm_multiplies_the_smallest_most_and_keeps_the_order():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    corrected = holm([math.nan, 0.01])
    assert math.isnan(corrected[0]) and corrected[1] == 0.01
