"""Weights from scores, and draws from weights: pure functions on numpy arrays in float64.

Every draw returns *positions* into the weights, int64 [n], in random order. A draw depends on
nothing but its arguments and the state of ``rng``, so ranks that pass equal ones get equal draws
(at equal numpy versions); all functions are local. Wrong arguments raise ValueError.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

Weights = npt.NDArray[np.float64]
Positions = npt.NDArray[np.int64]


class Sums(Protocol):
    """Sums over arrays of values [n], one a sample; all there are, or over slices of all ranks.

    Over slices every method is collective, and every rank gets the same.
    """

    def number(self, values: npt.NDArray[Any]) -> int:
        """Return how many values there are."""
        ...

    def total(self, values: npt.NDArray[np.float64]) -> float:
        """Return their sum."""
        ...

    def largest(self, values: npt.NDArray[np.float64]) -> float:
        """Return the largest of them, -inf of none."""
        ...


class _Whole:
    """Sums over arrays that are whole. Local."""

    def number(self, values: npt.NDArray[Any]) -> int:
        return len(values)

    def total(self, values: npt.NDArray[np.float64]) -> float:
        return float(values.sum())

    def largest(self, values: npt.NDArray[np.float64]) -> float:
        return float(values.max(initial=-math.inf))


WHOLE: Sums = _Whole()
"""Sums over arrays that are whole on every rank."""

_BLOCK = 1 << 15  # elements worked on at a time, so that temporaries stay in the cache
_TOTAL_BITS = 60  # quantized weights sum to at most 2**60


def generator(seed: int, *counters: int) -> np.random.Generator:
    """Return a generator that is a pure function of ``seed`` and up to four counters.

    Philox (Salmon et al. 2011) is a block cipher of a 256-bit counter under a 128-bit key. Seed
    and first counter are the key, the other three the upper counter words; the lowest word counts
    the blocks drawn. So generators with any two different (seed, counters), each number below
    2**64 and missing ones 0, never share a block, with no hashing that could collide.
    """
    words = [seed, *counters, 0, 0, 0, 0][: max(5, 1 + len(counters))]
    if len(words) > 5 or not all(0 <= word < 1 << 64 for word in words):
        raise ValueError(
            f"a seed and at most four counters from 0 to 2**64 - 1 are needed: {seed}, {counters}"
        )
    key = np.array(words[:2], dtype=np.uint64)
    counter = np.array([0, *words[2:]], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


def check_weights(
    weights: npt.ArrayLike, ids: npt.ArrayLike | None = None, over: Sums = WHOLE
) -> Weights:
    """Return ``weights`` [N] as float64 (no copy if they are) if they can be drawn from.

    Raises ValueError when they are empty or all zero, or for NaN, infinite and negative ones; it
    names the first bad id, or its position where ``ids`` [N] is not given.
    """
    array = np.asarray(weights, dtype=np.float64)
    if array.ndim != 1 or (array.size == 0 and over is WHOLE):
        raise ValueError(f"weights must be one row of at least one number, not {array.shape}")
    low, high = array.min(initial=0), array.max(initial=0)
    # NaN fails every comparison; that others have positive weights is asked only if these are sound
    if low >= 0 and high < math.inf and over.largest(array) > 0:
        return array
    bad = np.flatnonzero(~(np.isfinite(array) & (array >= 0)))
    first = int(bad[0]) if len(bad) else 0
    who = f"position {first}" if ids is None or not array.size else f"id {np.asarray(ids)[first]}"
    if len(bad):
        raise ValueError(
            f"the weight of {who} is {array[first]}; weights must be finite and not negative "
            f"({len(bad)} of {array.size} are bad)"
        )
    raise ValueError(f"all {over.number(array)} weights are zero, from {who} on")


# ---------------------------------------------------------------- weights from scores


def shape_weights(
    scores: npt.ArrayLike,
    alpha: float = 1.0,
    cap: float = 0.0,
    min_ess: float = 0.0,
    floor: float = 0.0,
    ids: npt.ArrayLike | None = None,
    min_score: float = 1e-8,
    over: Sums = WHOLE,
) -> Weights:
    """Return weights float64 [N] of scores [N]: alpha, then cap, then tempering, then floor.

    w = max(score, min_score)^alpha, handed to :func:`cap_weights`, :func:`temper` and
    :func:`mix_floor`, each left out where its parameter is 0; alpha = 0 gives all ones. Of scores
    that lie in slices on several ranks, ``over`` sums all of them; collective then. Raises
    ValueError naming the first id (or position) whose score or weight is not finite.
    """
    weights = np.array(scores, dtype=np.float64)
    finite = np.isfinite(weights)
    if not finite.all():
        check_weights(np.where(finite, 1.0, weights), ids)
    if not 0 <= alpha < math.inf:
        raise ValueError(f"alpha must be finite and not negative, not {alpha}")
    np.maximum(weights, min_score, out=weights)
    if alpha != 1:
        with np.errstate(over="ignore"):
            np.power(weights, alpha, out=weights)
    weights = check_weights(weights, ids, over)
    if cap:
        weights = cap_weights(weights, cap, over)
    if min_ess:
        weights = temper(weights, min_ess, over)
    return mix_floor(weights, floor, over) if floor else weights


def ess_fraction(weights: npt.ArrayLike, over: Sums = WHOLE) -> float:
    """Return the effective sample size as a share of N: (sum w)^2 / (N sum w^2), Kish (1965)."""
    array = _scaled(check_weights(weights, over=over), over)
    total = over.total(array)
    np.square(array, out=array)
    return min(1.0, total * total / (over.number(array) * over.total(array)))


def top_share(weights: npt.ArrayLike, share: float = 0.01, over: Sums = WHOLE) -> float:
    """Return the part of sum w that the largest ``share`` of the N weights has (at least one).

    Over slices the threshold is found by bisection, to 2**-60 of the largest weight; collective.
    """
    array = _scaled(check_weights(weights, over=over), over)
    number = over.number(array)
    most = max(1, round(share * number))
    if over is WHOLE:
        return float(np.partition(array, number - most)[number - most :].sum() / array.sum())
    low, high = 0.0, 1.0  # at most ``most`` weights exceed ``high``, and more exceed ``low``
    for _ in range(60):
        middle = (low + high) / 2
        few = over.total((array > middle).astype(np.float64)) <= most
        low, high = (low, middle) if few else (middle, high)
    above = array > high
    ties = (most - over.total(above.astype(np.float64))) * high
    return float((over.total(np.where(above, array, 0.0)) + ties) / over.total(array))


def cap_weights(weights: npt.ArrayLike, cap: float, over: Sums = WHOLE) -> Weights:
    """Return min(w, t), t the largest threshold that leaves no weight above ``cap`` means.

    The mean is that of the result: no sample is drawn more than ``cap`` (>= 1) times as often as
    samples are on average. t solves t = cap/N sum_i min(w_i, t), by Newton's method, exact after
    finitely many steps since the right side is concave and piecewise linear. With fewer than
    N/cap positive weights there is no such t; then these become equal.
    """
    if not 1 <= cap < math.inf:
        raise ValueError(f"the cap is in means, so it must be at least 1, not {cap}")
    array = _scaled(check_weights(weights, over=over), over)
    number = over.number(array)
    before, threshold = 0, cap * over.total(array) / number
    while (above := int(over.total((array > threshold).astype(np.float64)))) > before:
        before, room = above, number - cap * above
        if room <= 0:
            break  # the threshold is the solution, but for rounding
        threshold = cap * over.total(np.where(array <= threshold, array, 0.0)) / room
        if threshold == 0:
            return (array > 0).astype(np.float64)
    return np.minimum(array, threshold, out=array)


def temper(weights: npt.ArrayLike, min_ess: float, over: Sums = WHOLE) -> Weights:
    """Return w^a with the largest a in [0, 1] whose :func:`ess_fraction` is >= ``min_ess``.

    Unchanged where a = 1. a is found to 1e-6, from below, by false position (Illinois variant) on
    log ESS, which falls as a grows. Zero weights stay zero: if fewer than a share ``min_ess`` is
    positive, a is 0 and these become equal.
    """
    array = check_weights(weights, over=over)
    if not 0 <= min_ess <= 1:
        raise ValueError(f"min_ess is a share of N, so it must be from 0 to 1, not {min_ess}")
    fraction, number = ess_fraction(array, over), over.number(array)
    if fraction >= min_ess:
        return array
    positive = array > 0
    with np.errstate(divide="ignore"):
        logs = np.log(array)
    logs -= over.largest(logs)
    work = np.empty_like(logs)

    def excess(power: float) -> float:
        np.exp(np.multiply(logs, power, out=work), out=work)
        total = over.total(work)
        np.square(work, out=work)
        return math.log(total * total / (number * over.total(work)) / min_ess)

    low, high = 0.0, 1.0
    reached = pull_low = math.log(over.total(positive.astype(np.float64)) / number / min_ess)
    pull_high = math.log(fraction / min_ess)
    side = 0
    while high - low > 1e-6 and reached > 1e-9:
        power = low + (high - low) * pull_low / (pull_low - pull_high)
        here = excess(power)
        if here >= 0:
            low, reached, pull_low = power, here, here
            pull_high /= 2 if side > 0 else 1  # the end that stays twice pulls half as hard
            side = 1
        else:
            high, pull_high = power, here
            pull_low /= 2 if side < 0 else 1
            side = -1
    if low == 0:
        return positive.astype(np.float64)
    return np.exp(np.multiply(logs, low, out=logs), out=logs)


def mix_floor(weights: npt.ArrayLike, share: float, over: Sums = WHOLE) -> Weights:
    """Return (1 - share) w / sum w + share / N: a ``share`` in [0, 1] of uniform draws."""
    if not 0 <= share <= 1:
        raise ValueError(f"the floor is a share, so it must be from 0 to 1, not {share}")
    array = _scaled(check_weights(weights, over=over), over)
    array *= (1 - share) / over.total(array)
    array += share / over.number(array)
    return array


def _scaled(weights: Weights, over: Sums) -> Weights:
    """Return a copy with the largest weight 1, so that sums and squares stay finite."""
    scaled: Weights = weights / over.largest(weights)
    return scaled


# ---------------------------------------------------------------- draws with random order


def multinomial(weights: npt.ArrayLike, n: int, rng: np.random.Generator) -> Positions:
    """Draw ``n`` positions independently, with replacement, each i with probability w_i / sum w.

    A block of weights at a time: the number of draws that fall into it is binomial, given those
    of earlier blocks; these draws come out sorted, without a sort, as partial sums of exponentials
    over their total (Devroye 1986, V.3.1), so that one walk along the block's cumulative weights
    inverts them all. Then all are shuffled. O(N + n); no limit of 2**24 categories.
    """
    _check_number(n)
    array = check_weights(weights)
    largest = array.max()
    starts = range(0, array.size, _BLOCK)
    masses = np.array([(array[start : start + _BLOCK] / largest).sum() for start in starts])
    remaining = np.cumsum(masses[::-1])[::-1]

    def found() -> Iterator[Positions]:
        left = n
        for start, mass, mass_left in zip(starts, masses.tolist(), remaining.tolist(), strict=True):
            if not left or not (count := int(rng.binomial(left, mass / mass_left))):
                continue
            left -= count
            cumulative = np.cumsum(array[start : start + _BLOCK] / largest)
            keys = np.cumsum(rng.standard_exponential(count + 1))
            keys *= cumulative[-1] / keys[-1]
            np.minimum(keys, np.nextafter(cumulative[-1], 0), out=keys)
            yield np.searchsorted(cumulative, keys[:-1], "right") + start

    return _shuffled(found(), n, rng)


def systematic(weights: npt.ArrayLike, n: int, rng: np.random.Generator) -> Positions:
    """Draw ``n`` positions, each i floor(n p_i) or ceil(n p_i) times, n p_i in expectation.

    :func:`systematic_counts` of one uniform number, spelled out and shuffled.
    """
    array = check_weights(weights)
    counts = _counts(array, n, rng.random())

    def repeated() -> Iterator[Positions]:  # np.repeat, but three times as fast
        for start, block in zip(range(0, array.size, _BLOCK), counts, strict=True):
            ends = np.cumsum(block)
            passed = np.bincount(ends, minlength=ends[-1] + 1)[:-1]
            yield np.cumsum(passed) + start

    return _shuffled(repeated(), n, rng)


def without_replacement(weights: npt.ArrayLike, n: int, rng: np.random.Generator) -> Positions:
    """Draw ``n`` different positions one after another, each in proportion to the weights left.

    The n smallest of the keys E_i / w_i, E_i exponential, in ascending order (Efraimidis &
    Spirakis 2006). Zero weights are never drawn: more draws than positive weights are refused.
    """
    array = check_weights(weights)
    _check_number(n)
    positive = np.flatnonzero(array)
    if n > positive.size:
        raise ValueError(
            f"{n} draws without replacement need as many positive weights; there are "
            f"{positive.size} among {array.size}"
        )
    keys = rng.standard_exponential(positive.size)
    with np.errstate(over="ignore"):
        keys /= array[positive] / array.max()
    if 0 < n < positive.size:
        least = np.flatnonzero(keys <= np.partition(keys, n - 1)[n - 1])
        keys, positive = keys[least], positive[least]
    return positive[np.argsort(keys, kind="stable")[:n]]  # stable: equal on every CPU


def uniform(number: int, n: int, rng: np.random.Generator) -> Positions:
    """Draw ``n`` of ``number`` positions: a random permutation, cut; as many as n needs."""
    _check_number(n)
    if number < 1:
        raise ValueError(f"there is nothing to draw from ({number} samples)")
    drawn = np.empty(n, dtype=np.int64)
    for first in range(0, n, number):
        starts = range(0, number, _BLOCK)
        pieces = (np.arange(start, min(start + _BLOCK, number)) for start in starts)
        drawn[first : first + number] = _shuffled(pieces, number, rng)[: n - first]
    return drawn


def _check_number(n: int) -> None:
    if not 0 <= n < 1 << 48:
        raise ValueError(f"the number of draws must be from 0 to 2**48 - 1, not {n}")


def _shuffled(pieces: Iterable[Positions], n: int, rng: np.random.Generator) -> Positions:
    """Join ``pieces``, n values together, in uniformly random order.

    Each value is dealt to a random bucket, and each bucket is shuffled (Rao 1961, Sandelius
    1962): the same distribution as one big shuffle, with a bucket at a time in the cache.
    """
    buckets = 1 << min(8, (n >> 19).bit_length())
    if buckets == 1:
        joined = np.concatenate([np.empty(0, dtype=np.int64), *pieces])
        rng.shuffle(joined)
        return joined
    deal = np.frombuffer(rng.bytes(n), dtype=np.uint8) & np.uint8(buckets - 1)
    sizes = np.zeros(buckets, dtype=np.int64)
    for first in range(0, n, _BLOCK):
        sizes += np.bincount(deal[first : first + _BLOCK], minlength=buckets)
    ends = np.cumsum(sizes)
    fill = (ends - sizes).tolist()
    joined = np.empty(n, dtype=np.int64)
    first = 0
    for piece in pieces:
        to = deal[first : first + piece.size]
        first += piece.size
        dealt = piece[np.argsort(to, kind="stable")]
        begin = 0
        for bucket, size in enumerate(np.bincount(to, minlength=buckets).tolist()):
            joined[fill[bucket] : fill[bucket] + size] = dealt[begin : begin + size]
            fill[bucket] += size
            begin += size
    for size, end in zip(sizes.tolist(), ends.tolist(), strict=True):
        rng.shuffle(joined[end - size : end])
    return joined


# ---------------------------------------------------------------- systematic counts


def systematic_counts(weights: npt.ArrayLike, n: int, u: float) -> Positions:
    """Return how often each of N weights is drawn, int64 [N], of ``n`` draws: within 1 of n p_i.

    The points (j + u) T / n, j = 0 … n-1, that fall into each weight's stretch of [0, T), where
    T = sum w (Madow 1949); ``u`` is uniform in [0, 1). Weights are quantized first.
    """
    return np.concatenate(list(_counts(check_weights(weights), n, u)))


def fixed_point_exponent(largest: float, number: int) -> int:
    """Return e such that ``number`` weights, none above ``largest``, times 2**e fit together.

    Their sum is then at most 2**60, and the largest is at least 2**58 / number.
    Ranks that hold slices pass the maximum and the number over all ranks.
    """
    if not (0 < largest < math.inf and number >= 1):
        raise ValueError(f"cannot scale {number} weights of at most {largest}")
    return _TOTAL_BITS - math.frexp(largest)[1] - (number - 1).bit_length()


def quantize(weights: npt.ArrayLike, exponent: int) -> Positions:
    """Return floor(w 2**exponent), int64 [N]: sums of these do not depend on their order.

    Weights under one unit become 0.
    """
    array = np.asarray(weights, dtype=np.float64)
    if abs(exponent) < 1000:  # the same bits as ldexp, several times as fast
        return (array * math.ldexp(1.0, exponent)).astype(np.int64)
    return np.ldexp(array, exponent).astype(np.int64)


def systematic_counts_local(
    quantized_local: Positions, offset: int, total: int, n: int, u: float
) -> Positions:
    """Return the systematic counts, int64 [N_local], of one slice of quantized weights [N_local].

    ``offset``: sum of the quantized weights before the slice; ``total``: sum of all, below 2**61;
    ``n`` draws in all; ``u`` the same on every rank. The counts of all slices, one after another,
    are those of a single process, however the weights are cut. Local: an exclusive scan of the
    slices' sums and their total is all that ranks exchange before.
    """
    starts = range(0, len(quantized_local), _BLOCK)
    blocks = (quantized_local[start : start + _BLOCK] for start in starts)
    return np.concatenate([np.empty(0, np.int64), *_count_points(blocks, offset, total, n, u)])


def _counts(weights: Weights, n: int, u: float) -> Iterator[Positions]:
    """Quantize and count, a block at a time, with nothing of size N kept."""
    exponent = fixed_point_exponent(float(weights.max()), weights.size)

    def blocks() -> Iterator[Positions]:
        for start in range(0, weights.size, _BLOCK):
            yield quantize(weights[start : start + _BLOCK], exponent)

    total = sum(int(block.sum()) for block in blocks())
    return _count_points(blocks(), 0, total, n, u)


def _count_points(
    blocks: Iterable[Positions], offset: int, total: int, n: int, u: float
) -> Iterator[Positions]:
    """Count the points (j·total + r)/n, r = floor(u·total), in the stretch of each weight.

    Exact, so that counts never depend on how the weights are cut: below an edge c lie
    K(c) = ceil((c·n - r) / total) points. c·n needs more than 64 bits, but float64 finds K to
    within one unit, and what then remains, c·n - r - K·total, is at most 2·total < 2**62 in size:
    arithmetic modulo 2**64 gives it exactly. K is right if that is above -total and at most 0.
    """
    _check_number(n)
    if not (0 < total < 1 << 61 and 0 <= offset <= total and 0 <= u < 1):
        raise ValueError(f"bad total {total}, offset {offset} or u {u} of systematic draws")
    r = min(int(u * total), total - 1)
    before = -((r - offset * n) // total)
    for block in blocks:
        edges = np.cumsum(block)
        edges += offset
        offset = int(edges[-1])
        guess = edges * (n / total)
        guess += 1 - r / total
        below = guess.astype(np.int64)
        edges *= n
        edges -= below * total
        edges -= r  # now what remains
        if edges.max() > 0 or edges.min() <= -total:
            below += edges > 0
            below -= edges <= -total
        yield np.diff(below, prepend=before)
        before = int(below[-1])
