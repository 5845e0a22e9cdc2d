import math
from collections import Counter
from fractions import Fraction
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from distcl.priority import weighting
from distcl.priority.weighting import WeightVector
from distcl.sampling import draws

SIGNIFICANT = 0.001  # about 1 % in all, over the dozen p-values below; seeds are fixed
WEIGHTS = st.lists(
    st.one_of(st.just(0.0), st.floats(1e-6, 1e6), st.integers(1, 5).map(float)),
    min_size=1,
    max_size=40,
).filter(any)


def skewed(number: int, seed: int = 7) -> np.ndarray:
    return draws.generator(seed).standard_exponential(number) ** 2


def vector(values: object, ids: object = None) -> WeightVector:
    array = np.asarray(values, dtype=np.float64)
    return WeightVector(np.arange(len(array)) if ids is None else np.asarray(ids), array)


def chi_square_p(drawn: np.ndarray, weights: np.ndarray, cells: int = 1000) -> float:
    """Chi-square of draws counted in ``cells`` runs of neighbouring positions of equal mass."""
    cell = np.minimum((np.cumsum(weights) / weights.sum() * cells).astype(int), cells - 1)
    expected = np.bincount(cell, weights, cells) / weights.sum() * len(drawn)
    observed = np.bincount(cell[drawn], minlength=cells)
    assert expected.min() > 5
    return float(stats.chisquare(observed, expected).pvalue)


# ---------------------------------------------------------------- generator


def test_generator_is_a_pure_function_of_seed_and_counters() -> None:
    keys = [(0,), (1,), (0, 1), (0, 0, 1), (0, 0, 0, 1), (0, 0, 0, 0, 1), (1, 2, 3, 4, 5)]
    first = {key: draws.generator(*key).integers(1 << 62) for key in keys}
    assert len(set(first.values())) == len(keys)
    assert first == {key: draws.generator(*key).integers(1 << 62) for key in keys}
    assert draws.generator(3, 1).random() == draws.generator(3, 1, 0, 0, 0).random()


@pytest.mark.parametrize("words", [(-1,), (1 << 64,), (0, -1), (0, 1, 2, 3, 4, 5)])
def test_generator_refuses_what_does_not_fit(words: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="four counters"):
        draws.generator(*words)


# ---------------------------------------------------------------- order


def test_a_shuffle_by_keys_gives_all_orders_alike() -> None:
    rng, seen = draws.generator(3), Counter[tuple[int, ...]]()
    for _ in range(12_000):
        values = np.arange(4, dtype=np.uint32)
        draws._shuffle(values, rng)
        seen[tuple(values.tolist())] += 1
    assert set(seen) == set(permutations(range(4)))
    assert stats.chisquare(list(seen.values())).pvalue > SIGNIFICANT


@pytest.mark.parametrize("number", [0, 1, 2, 1000, 1 << 20, (1 << 20) + 1])
def test_a_shuffle_loses_nothing(number: int) -> None:
    values = np.arange(number) + (1 << 40)
    draws._shuffle(values, draws.generator(4, number))
    assert number < 3 or (np.diff(values) != 1).any()
    assert (np.sort(values) == np.arange(number) + (1 << 40)).all()


def test_keys_that_are_alike_are_drawn_again() -> None:
    class Keys:
        def __init__(self) -> None:
            self.rows = [[1 << 60, 5 << 60, 1 << 60], [9 << 60, 8 << 60, 7 << 60]]

        def integers(self, high: int, size: int, dtype: type) -> np.ndarray:
            assert high == 1 << 64 and size == 3
            return np.array(self.rows.pop(0), dtype=dtype)

    values = np.array([10, 20, 30])
    draws._shuffle(values, Keys())  # type: ignore[arg-type]
    assert values.tolist() == [30, 20, 10]


# ---------------------------------------------------------------- weights


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, -1e-300])
def test_bad_weight_names_the_first_bad_id(bad: float) -> None:
    weights = np.ones(5)
    weights[[2, 4]] = bad
    with pytest.raises(ValueError, match=r"id 72 .*\(2 of 5"):
        weighting.check_weights(weights, ids=[70, 71, 72, 73, 74])
    with pytest.raises(ValueError, match="position 2"):
        draws.multinomial(weights, 1, draws.generator(0))


def test_all_zero_and_empty_weights_are_refused() -> None:
    with pytest.raises(ValueError, match="all 3 weights are zero, from id 9 on"):
        weighting.check_weights([0, 0, 0], ids=[9, 8, 7])
    with pytest.raises(ValueError, match="at least one"):
        weighting.check_weights([])


def test_ess_fraction_by_its_formula() -> None:
    w = skewed(1000)
    assert vector(w).ess() == pytest.approx(w.sum() ** 2 / (1000 * (w**2).sum()))
    assert vector(np.full(9, 1e300)).ess() == pytest.approx(1)
    assert vector([0, 0, 5, 0]).ess() == pytest.approx(0.25)


@pytest.mark.parametrize("min_ess", [0.1, 0.5, 0.9, 0.999, 1.0])
def test_tempering_finds_the_largest_power(min_ess: float) -> None:
    w = skewed(5000) * 1e200
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        good = vector((w / w.max()) ** middle).ess() >= min_ess
        low, high = (middle, high) if good else (low, middle)
    tempered = vector(w).temper(min_ess).held
    assert vector(tempered).ess() >= min_ess - 1e-12
    np.testing.assert_allclose(tempered / tempered.max(), (w / w.max()) ** low, rtol=1e-4)


def test_tempering_leaves_what_is_flat_enough_and_keeps_zeros() -> None:
    assert vector([3.0, 3.0]).temper(1.0).held.tolist() == [3.0, 3.0]
    assert vector([1.0, 2.0]).temper(0.9).held.tolist() == [1.0, 2.0]
    assert vector([0.0, 1.0, 2.0, 0.0]).temper(0.8).held.tolist() == [0, 1, 1, 0]


@given(weights=WEIGHTS, cap=st.floats(1, 20))
def test_cap_holds_in_means_of_the_result_and_takes_no_more_than_needed(
    weights: list[float], cap: float
) -> None:
    w = np.array(weights)
    capped = vector(w).cap(cap).held
    positive = w > 0
    assert ((capped > 0) == positive).all()
    if positive.sum() * cap < len(w) * (1 + 1e-9):
        assert np.ptp(capped[positive]) <= 1e-9 * capped.max()
        return
    assert capped.max() <= cap * capped.mean() * (1 + 1e-9)
    untouched = capped < capped.max() * (1 - 1e-9)
    np.testing.assert_allclose(capped[untouched], w[untouched] / w.max())
    if (w / w.max() > capped.max() * (1 + 1e-9)).any():  # something was cut: then to the limit
        assert capped.max() == pytest.approx(cap * capped.mean())


def test_floor_mixes_in_a_uniform_share() -> None:
    assert vector([0.0, 1.0, 3.0, 0.0]).floor(0.2).held == pytest.approx([0.05, 0.25, 0.65, 0.05])
    assert vector([0.0, 7.0]).floor(1.0).held == pytest.approx([0.5, 0.5])


def test_shaping_goes_alpha_cap_tempering_floor() -> None:
    scores = skewed(2000)
    scores[0] = 0
    w = np.maximum(scores, 1e-8) ** 1.5
    assert vector(scores).shaped(1.5).held == pytest.approx(w)
    w = vector(w).cap(3).held
    assert vector(scores).shaped(1.5, cap=3).held == pytest.approx(w)
    w = vector(w).temper(0.8).held
    assert vector(scores).shaped(1.5, cap=3, min_ess=0.8).held == pytest.approx(w)
    w = vector(w).floor(0.1).held
    assert vector(scores).shaped(1.5, cap=3, min_ess=0.8, floor=0.1).held == pytest.approx(w)
    assert (vector(scores).shaped(0).held == 1).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_shaping_names_the_id_of_a_score_that_is_not_finite(bad: float, alpha: float) -> None:
    with pytest.raises(ValueError, match="id 11"):
        vector([1.0, bad, 2.0], [10, 11, 12]).shaped(alpha)


def test_shaping_names_the_id_of_a_weight_that_overflows() -> None:
    with pytest.raises(ValueError, match=r"id 12 is inf"):
        vector([1.0, 2.0, 1e200], [10, 11, 12]).shaped(2.0)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: vector([1.0]).shaped(-1).held, "alpha"),
        (lambda: vector([1.0]).cap(0.5).held, "cap"),
        (lambda: vector([1.0]).temper(1.5).held, "min_ess"),
        (lambda: vector([1.0]).floor(-0.1).held, "floor"),
        (lambda: draws.multinomial([1.0], -1, draws.generator(0)), "number of draws"),
        (lambda: draws.uniform(0, 1, draws.generator(0)), "nothing to draw"),
        (lambda: draws.systematic_counts_local(np.ones(3, np.int64), 0, 1 << 61, 3, 0.5), "total"),
    ],
)
def test_parameters_out_of_range_are_refused(call, says: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=says):
        call()


# ---------------------------------------------------------------- draws


def test_multinomial_matches_the_weights() -> None:
    w = skewed(100_000)
    drawn = draws.multinomial(w, 1_000_000, draws.generator(1))
    assert drawn.dtype == np.uint32  # half the memory
    assert drawn.shape == (1_000_000,)
    assert chi_square_p(drawn, w) > SIGNIFICANT
    assert chi_square_p(drawn[:200_000], w) > SIGNIFICANT  # any part of the order is a fair draw


def test_multinomial_is_independent_from_draw_to_draw() -> None:
    w = np.array([1.0, 2.0, 0.0, 5.0])
    drawn = draws.multinomial(w, 200_000, draws.generator(3)).reshape(-1, 2)
    table = np.zeros((4, 4))
    np.add.at(table, (drawn[:, 0], drawn[:, 1]), 1)
    expected = np.outer(w, w)[np.ix_([0, 1, 3], [0, 1, 3])].ravel() / 64 * len(drawn)
    assert table[2].sum() == table[:, 2].sum() == 0
    observed = table[np.ix_([0, 1, 3], [0, 1, 3])].ravel()
    assert stats.chisquare(observed, expected).pvalue > SIGNIFICANT


def test_zero_weights_are_never_drawn() -> None:
    w = np.zeros(200_000)
    w[[5, 70_000, 70_001]] = [1e-300, 3, 2]
    for draw in (draws.multinomial, draws.systematic):
        assert set(draw(w, 10_000, draws.generator(2)).tolist()) <= {5, 70_000, 70_001}
    assert draws.without_replacement(w, 3, draws.generator(2)).tolist()[2] == 5


@settings(deadline=None)
@given(weights=WEIGHTS, n=st.integers(0, 300), u=st.floats(0, 1, exclude_max=True))
def test_systematic_counts_are_within_one_of_expectation(
    weights: list[float], n: int, u: float
) -> None:
    w = np.array(weights)
    counts = draws.systematic_counts(w, n, u)
    assert counts.sum() == n
    assert (counts[w == 0] == 0).all()
    exponent = draws.fixed_point_exponent(float(w.max()), len(w))
    quantized = [int(q) for q in draws.quantize(w, exponent)]
    total, edge = sum(quantized), 0
    points = [Fraction(j * total + min(int(u * total), total - 1), n) for j in range(n)]
    for q, count, weight in zip(quantized, counts.tolist(), weights, strict=True):
        assert math.floor(n * q / total) <= count <= math.ceil(n * q / total)
        assert count == sum(edge <= point < edge + q for point in points)
        assert q / total == pytest.approx(weight / w.sum(), rel=1e-6, abs=1e-15)
        edge += q


def test_systematic_counts_have_the_right_mean() -> None:
    w = skewed(50)
    offsets = (np.arange(2000) + 0.5) / 2000
    mean = np.mean([draws.systematic_counts(w, 37, u) for u in offsets], axis=0)
    np.testing.assert_allclose(mean, 37 * w / w.sum(), atol=1e-3)


def test_equal_weights_are_each_drawn_once_by_systematic() -> None:
    assert (draws.systematic_counts(np.full(100_003, 0.1), 100_003, 0.999) == 1).all()


def test_systematic_counts_do_not_depend_on_how_weights_are_cut() -> None:
    w = skewed(100_003)
    n, u = 250_001, 0.123
    whole = draws.systematic_counts(w, n, u)
    for shards in (1, 2, 3, 7, 101):
        quantized = [
            draws.quantize(part, draws.fixed_point_exponent(float(w.max()), len(w)))
            for part in np.array_split(w, shards)
        ]
        sums = [int(part.sum()) for part in quantized]
        parts = [
            draws.systematic_counts_local(part, sum(sums[:rank]), sum(sums), n, u)
            for rank, part in enumerate(quantized)
        ]
        np.testing.assert_array_equal(np.concatenate(parts), whole)


def test_an_empty_slice_has_no_counts() -> None:
    none = np.empty(0, np.int64)
    assert draws.systematic_counts_local(none, 5, 5, 3, 0.5).shape == (0,)


@pytest.mark.parametrize("n", [1, 1000, (1 << 40) + 7])
def test_systematic_counts_are_exact_where_products_exceed_64_bits(n: int) -> None:
    quantized = draws.generator(5).integers(0, 1 << 48, size=1000)
    total, u, edge = int(quantized.sum()), 0.7, 0
    counts = draws.systematic_counts_local(quantized, 0, total, n, u)
    r = int(u * total)
    for q, count in zip(quantized.tolist(), counts.tolist(), strict=True):
        below, edge = -((r - edge * n) // total), edge + q
        assert count == -((r - edge * n) // total) - below


@pytest.mark.parametrize("scale", [5e-324, 1e-200, 1.0, 1e305])
def test_weights_of_any_magnitude_can_be_drawn(scale: float) -> None:
    w = np.array([1.0, 0.0, 2.0, 5.0]) * scale
    assert draws.systematic_counts(w, 80, 0.5).tolist() == [10, 0, 20, 50]
    counts = np.bincount(draws.multinomial(w, 8000, draws.generator(0)), minlength=4)
    np.testing.assert_allclose(counts, [1000, 0, 2000, 5000], atol=200)
    assert draws.without_replacement(w, 3, draws.generator(0)).max() == 3


def test_systematic_draw_spells_out_its_counts_in_random_order() -> None:
    w = skewed(100_000)
    drawn = draws.systematic(w, 300_000, draws.generator(4))
    u = draws.generator(4).random()
    np.testing.assert_array_equal(
        np.bincount(drawn, minlength=len(w)), draws.systematic_counts(w, 300_000, u)
    )
    assert chi_square_p(drawn[:100_000], w) > SIGNIFICANT
    assert abs(stats.spearmanr(drawn, np.arange(len(drawn))).statistic) < 0.01


def test_first_draws_without_replacement_match_the_weights() -> None:
    w = np.array([1.0, 2.0, 0.5, 4.0, 0.0, 2.5])
    rng = draws.generator(11)
    first = [int(draws.without_replacement(w, 2, rng)[0]) for _ in range(20_000)]
    observed = np.bincount(first, minlength=6)
    assert observed[4] == 0
    keep = w > 0
    assert stats.chisquare(observed[keep], w[keep] / w.sum() * 20_000).pvalue > SIGNIFICANT


@pytest.mark.parametrize("weights", [[1.0, 3.0], [1.0, 2.0, 0.5], [3.0, 1.0, 2.0, 0.2, 1.5]])
def test_whole_orders_without_replacement_match_enumeration(weights: list[float]) -> None:
    tries, rng = 40_000, draws.generator(12)
    number = len(weights)
    seen = Counter(
        tuple(draws.without_replacement(weights, number, rng).tolist()) for _ in range(tries)
    )
    orders = list(permutations(range(number)))
    expected = []
    for order in orders:
        probability, left = 1.0, sum(weights)
        for i in order:
            probability, left = probability * weights[i] / left, left - weights[i]
        expected.append(probability * tries)
    assert stats.chisquare([seen[order] for order in orders], expected).pvalue > SIGNIFICANT


def test_fewer_draws_without_replacement_are_the_head_of_the_whole_order() -> None:
    w = skewed(5000)
    whole = draws.without_replacement(w, 5000, draws.generator(6))
    assert sorted(whole.tolist()) == list(range(5000))
    np.testing.assert_array_equal(
        draws.without_replacement(w, 700, draws.generator(6)), whole[:700]
    )


def test_more_draws_without_replacement_than_positive_weights_are_refused() -> None:
    with pytest.raises(ValueError, match=r"3 draws .* 2 among 4"):
        draws.without_replacement([0, 1, 2, 0], 3, draws.generator(0))


def test_uniform_draws_are_permutations_one_after_another() -> None:
    drawn = draws.uniform(10, 34, draws.generator(9))
    for first in (0, 10, 20):
        assert sorted(drawn[first : first + 10].tolist()) == list(range(10))
    assert len(set(drawn[30:].tolist())) == 4
    assert drawn[:10].tolist() != drawn[10:20].tolist()
    assert draws.uniform(10, 4, draws.generator(9)).tolist() == drawn[:4].tolist()


def test_all_orders_are_equally_likely() -> None:
    rng = draws.generator(10)
    seen = Counter(tuple(draws.uniform(4, 4, rng).tolist()) for _ in range(24_000))
    assert stats.chisquare([seen[order] for order in permutations(range(4))]).pvalue > SIGNIFICANT


def test_order_is_random_across_the_buckets_of_a_large_draw() -> None:
    number = 3_000_000
    drawn = draws.uniform(number, number, draws.generator(13))
    assert np.array_equal(np.bincount(drawn), np.ones(number))
    where, value = (np.arange(number) * 20 // number), drawn * 20 // number
    table = np.bincount(where * 20 + value, minlength=400)
    assert stats.chisquare(table, np.full(400, number / 400), ddof=38).pvalue > SIGNIFICANT
    assert abs(np.corrcoef(drawn[:-1], drawn[1:])[0, 1]) < 0.003
    assert abs((drawn == np.arange(number)).sum() - 1) < 8  # fixed points: Poisson of mean 1


def test_more_than_2_to_the_24_categories() -> None:
    number, n = (1 << 24) + 1, 1_000_000
    w = np.ones(number)
    w[-1] = number / 3
    for draw in (draws.multinomial, draws.systematic):
        drawn = draw(w, n, draws.generator(0))
        assert np.mean(drawn == number - 1) == pytest.approx(0.25, abs=2e-3)
        assert drawn[drawn < number - 1].mean() == pytest.approx(number / 2, rel=2e-3)
    counts = draws.systematic_counts(w, number, 0.5)
    assert counts.sum() == number
    assert np.abs(counts - number * w / w.sum()).max() < 1


@pytest.mark.parametrize("scale", [5e-324, 1e-310, 1e-200, 1e-8, 1.0, 1e200, 1e305])
def test_quantized_weights_are_floors_of_exact_products(scale):
    weights = np.concatenate([skewed(50), [0.0, 1.0]]) * scale
    exponent = draws.fixed_point_exponent(float(weights.max()), len(weights))
    exact = [math.floor(Fraction(w) * Fraction(2) ** exponent) for w in weights.tolist()]
    assert draws.quantize(weights, exponent).tolist() == exact


def test_credit_is_earned_by_weight_and_paid_by_draws() -> None:
    """Beside its definition, written out; windows that share what is held."""
    w = np.random.default_rng(1).random(23) + 0.05
    held = np.random.default_rng(2).random(23)
    mine = held.copy()
    for window, n in enumerate((7, 20, 0, 11)):
        rng = draws.generator(9, window)
        found = draws.credit(w, n, draws.generator(9, window), held)
        wanted: list[int] = []
        while len(wanted) < n:
            k = min(n - len(wanted), 11)
            mine += np.minimum(w / w.sum() * k, 1)
            best = sorted(np.argsort(mine)[-k:])
            mine[best] -= 0.7 + 0.6 * rng.random(k)
            order = np.array(best)
            rng.shuffle(order)
            wanted += order.tolist()
        assert found.tolist() == wanted
        np.testing.assert_allclose(held, mine, rtol=0, atol=1e-12)


def test_credit_draws_in_proportion_and_seldom_twice() -> None:
    w = np.random.default_rng(3).random(50) + 0.2
    held, counts = np.random.default_rng(4).random(50), np.zeros(50)
    for window in range(400):
        drawn = draws.credit(w, 10, draws.generator(5, window), held)
        assert len({*drawn.tolist()}) == 10
        counts += np.bincount(drawn, minlength=50)
    assert (np.abs(counts - 4000 * w / w.sum()) < 4).all()  # of independent draws: 9 of 80
    assert draws.credit([0.0, 1.0, 0.0], 5, draws.generator(1)).tolist() == [1] * 5
    counts = np.bincount(draws.credit(w, 1030, draws.generator(6)), minlength=50)
    assert (np.abs(counts - 1030 * w / w.sum()) < 2).all()


def test_credit_is_not_hoarded_by_what_is_drawn_every_time() -> None:
    w, held, late = np.ones(100), np.zeros(100), 0
    w[3] = 99.0  # half of all draws, but one of ten at a time
    for window in range(300):
        weights = w if window < 100 else np.ones(100)
        drawn = draws.credit(weights, 10, draws.generator(7, window), held)
        assert (3 in drawn) or window >= 100
        late += window >= 100 and 3 in drawn
    assert 15 <= late <= 25  # of 200 windows, a tenth
