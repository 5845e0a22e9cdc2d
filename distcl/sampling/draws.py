"""Draws from weights: pure functions on numpy arrays in float64.

Every draw returns *positions* into the weights, [n], in random order: int64, or uint32 where that
is said and N is at most 2**32. A draw depends on nothing but its arguments and the state of
``rng``, so ranks that pass equal ones get equal draws (at equal numpy versions); all functions are
local. Wrong arguments raise ValueError.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from distcl.errors import UsageError
from distcl.priority.weighting import Positions, Weights, check_weights

Integers = npt.NDArray[np.int64]

_BLOCK = 1 << 15  # elements worked on at a time, so that temporaries stay in the cache
_FEW = 1 << 19  # of which a shuffle at once takes no longer than by buckets
_PLACE_BITS = 20  # of a key that is sorted; of 2**20 keys, two are alike in 3 % of all cases
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


# ---------------------------------------------------------------- draws with random order


def multinomial(weights: npt.ArrayLike, n: int, rng: np.random.Generator) -> Positions:
    """Draw ``n`` positions independently, with replacement, each i with probability w_i / sum w.

    A block of weights at a time: the number of draws that fall into it is binomial, given those
    of earlier blocks; these draws come out sorted, without a sort, as partial sums of exponentials
    over their total (Devroye 1986, V.3.1), so that one walk along the block's cumulative weights
    inverts them all. Then all are shuffled. O(N + n); no limit of 2**24 categories. May be uint32.
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

    return _shuffled(found(), n, rng, index_type(array.size))


def systematic(weights: npt.ArrayLike, n: int, rng: np.random.Generator) -> Positions:
    """Draw ``n`` positions, each i floor(n p_i) or ceil(n p_i) times, n p_i in expectation.

    :func:`systematic_counts` of one uniform number, spelled out and shuffled. May be uint32.
    """
    array = check_weights(weights)
    below = _points_below(*_quantized(array), n, rng.random())

    def repeated() -> Iterator[Positions]:  # np.repeat, but three times as fast
        for start, (before, ends) in zip(range(0, array.size, _BLOCK), below, strict=True):
            ends -= before
            passed = np.bincount(ends, minlength=ends[-1] + 1)[:-1]
            yield np.cumsum(passed) + start

    return _shuffled(repeated(), n, rng, index_type(array.size))


def without_replacement(weights: npt.ArrayLike, n: int, rng: np.random.Generator) -> Integers:
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


def credit(
    weights: npt.ArrayLike, n: int, rng: np.random.Generator, held: Weights | None = None
) -> Integers:
    """Draw ``n`` positions in proportion to the weights, nearly without replacement over draws.

    Each of N samples earns w_i / sum w of k draws, at most 1, and the k with most credit are drawn
    and pay 1 each (between 0.7 and 1.3, at random, so that no order repeats itself); k is at most
    N / 2. So a sample comes again when it has earned it, and equal weights make something close to
    one permutation after another. Weights above N / k means are drawn every time and no oftener,
    zero weights never; but small ones may have credit left from when they were larger. Of n > N
    draws the whole parts of n w_i / sum w are drawn first. ``held``: the credit of earlier draws,
    float64 [N], changed in place; None: random, in [0, 1).
    """
    _check_number(n)
    array = check_weights(weights)
    held = rng.random(array.size) if held is None else held
    positive = np.flatnonzero(array)
    share = array[positive] / array.max()
    share /= share.sum()
    mine, found = held[positive], [np.empty(0, np.int64)]
    if many := n > positive.size:
        earned = share * n
        whole = np.floor(earned).astype(np.int64)
        found, n = [np.repeat(np.arange(whole.size), whole)], n - int(whole.sum())
        share = (earned - whole) / max(n, 1)
    while n:
        k = min(n, max(1, positive.size // 2))
        mine += np.minimum(share * k, 1.0)
        least = np.partition(mine, mine.size - k)[mine.size - k]
        chosen = np.flatnonzero(mine >= least)[:k]
        mine[chosen] -= 0.7 + 0.6 * rng.random(k)
        rng.shuffle(chosen)
        found.append(chosen)
        n -= k
    held[positive] = mine
    drawn = np.concatenate(found)
    if many:
        rng.shuffle(drawn)
    return positive[drawn]


def uniform(number: int, n: int, rng: np.random.Generator) -> Positions:
    """Draw ``n`` of ``number`` positions: permutations, as many as n needs. May be uint32."""
    _check_number(n)
    if number < 1:
        raise ValueError(f"there is nothing to draw from ({number} samples)")

    def permuted() -> Positions:
        starts = range(0, number, _BLOCK)
        pieces = (np.arange(start, min(start + _BLOCK, number)) for start in starts)
        return _shuffled(pieces, number, rng, kind)

    kind = index_type(number)
    if n == number:
        return permuted()
    drawn = np.empty(n, dtype=kind)
    for first in range(0, n, number):
        drawn[first : first + number] = permuted()[: n - first]
    return drawn


class Permutations:
    """Permutations of N positions, one after another without end, read at any place.

    The k-th is a function of (seed, k and the counters), so any rank and a resumed run read the
    same. Holds one, 4 N bytes (8 N from 2**32 positions on).
    """

    def __init__(self, seed: int, stream: int) -> None:
        self._seed = seed
        self._stream = stream
        self._held: tuple[tuple[int, ...], Positions] | None = None

    def take(self, round_index: int, number: int, first: int, n: int, kind: int = 0) -> Positions:
        """Return draws ``first`` to ``first`` + n of ``number`` positions, [n]."""
        found = []
        while n:
            index, at = divmod(first, number)
            key = (self._stream, round_index, index, kind)
            if self._held is None or self._held[0] != (number, *key):
                drawn = uniform(number, number, generator(self._seed, *key))
                self._held = (number, *key), drawn
            found.append(self._held[1][at : at + n])
            first, n = first + len(found[-1]), n - len(found[-1])
        return np.concatenate(found)


def _check_number(n: int) -> None:
    if not 0 <= n < 1 << 48:
        raise ValueError(f"the number of draws must be from 0 to 2**48 - 1, not {n}")


def index_type(number: int) -> type[np.integer[Any]]:
    """Return the type of positions among ``number``: they are most of what draws hold."""
    return np.uint32 if number <= 1 << 32 else np.int64


def _shuffled(
    pieces: Iterable[Positions], n: int, rng: np.random.Generator, kind: type[np.integer[Any]]
) -> Positions:
    """Join ``pieces``, n values together, in uniformly random order, as ``kind``.

    Each value is dealt to a random bucket, and each bucket is shuffled (Rao 1961, Sandelius
    1962): the same distribution as one big shuffle, with a bucket at a time in the cache.
    """
    if n < _FEW:
        joined, end = np.empty(n, dtype=kind), 0
        for piece in pieces:
            begin, end = end, end + len(piece)
            joined[begin:end] = piece
        rng.shuffle(joined)
        return joined
    buckets = 1 << min(8, (n >> 17).bit_length())
    deal, low = np.frombuffer(rng.bytes(n), dtype=np.uint8), np.uint8(buckets - 1)
    sizes = np.zeros(buckets, dtype=np.int64)
    for first in range(0, n, _BLOCK):
        sizes += np.bincount(deal[first : first + _BLOCK] & low, minlength=buckets)
    ends = np.cumsum(sizes)
    fill = (ends - sizes).tolist()
    joined = np.empty(n, dtype=kind)
    first = 0
    for piece in pieces:
        to = deal[first : first + piece.size] & low
        first += piece.size
        dealt = piece[np.argsort(to, kind="stable")]
        begin = 0
        for bucket, size in enumerate(np.bincount(to, minlength=buckets).tolist()):
            joined[fill[bucket] : fill[bucket] + size] = dealt[begin : begin + size]
            fill[bucket] += size
            begin += size
    for size, end in zip(sizes.tolist(), ends.tolist(), strict=True):
        _shuffle(joined[end - size : end], rng)
    return joined


def _shuffle(values: Positions, rng: np.random.Generator) -> None:
    """Put values [n] into uniformly random order, in place, as random keys sort them.

    A key is 64 random bits, the lowest of which give way to the place, so that keys are sorted
    without an argsort; numpy sorts integers by vector instructions, in half the time of a shuffle.
    Where two keys differ in their place only, all are drawn again.
    """
    bits = len(values).bit_length()
    if bits > _PLACE_BITS:  # keys would be alike too often
        rng.shuffle(values)
        return
    work, low = np.empty(len(values), dtype=np.uint64), np.uint64((1 << bits) - 1)
    while True:
        keys = rng.integers(1 << 64, size=len(values), dtype=np.uint64)
        keys &= ~low
        keys |= np.arange(len(values), dtype=np.uint64)
        keys.sort()
        np.bitwise_xor(keys[1:], keys[:-1], out=work[1:])
        if work[1:].min(initial=1 << 63) > low:
            keys &= low
            values[:] = values[keys.view(np.int64)]
            return


# ---------------------------------------------------------------- systematic counts


def systematic_counts(weights: npt.ArrayLike, n: int, u: float) -> Integers:
    """Return how often each of N weights is drawn, int64 [N], of ``n`` draws: within 1 of n p_i.

    The points (j + u) T / n, j = 0 … n-1, that fall into each weight's stretch of [0, T), where
    T = sum w (Madow 1949); ``u`` is uniform in [0, 1). Weights are quantized first.
    """
    blocks, offset, total = _quantized(check_weights(weights))
    return np.concatenate(list(systematic_count_blocks(blocks, offset, total, n, u)))


def fixed_point_exponent(largest: float, number: int) -> int:
    """Return e such that ``number`` weights, none above ``largest``, times 2**e fit together.

    Their sum is then at most 2**60, and the largest is at least 2**58 / number.
    Ranks that hold slices pass the maximum and the number over all ranks.
    """
    if not (0 < largest < math.inf and number >= 1):
        raise ValueError(f"cannot scale {number} weights of at most {largest}")
    return _TOTAL_BITS - math.frexp(largest)[1] - (number - 1).bit_length()


def quantize(weights: npt.ArrayLike, exponent: int) -> Integers:
    """Return floor(w 2**exponent), int64 [N]: sums of these do not depend on their order.

    Weights under one unit become 0.
    """
    array = np.asarray(weights, dtype=np.float64)
    if abs(exponent) < 1000:  # the same bits as ldexp, several times as fast
        return (array * math.ldexp(1.0, exponent)).astype(np.int64)
    return np.ldexp(array, exponent).astype(np.int64)


def systematic_counts_local(
    quantized_local: Integers, offset: int, total: int, n: int, u: float
) -> Integers:
    """Return the systematic counts, int64 [N_local], of one slice of quantized weights [N_local].

    ``offset``: sum of the quantized weights before the slice; ``total``: sum of all, below 2**61;
    ``n`` draws in all; ``u`` the same on every rank. The counts of all slices, one after another,
    are those of a single process, however the weights are cut. Local: an exclusive scan of the
    slices' sums and their total is all that ranks exchange before.
    """
    starts = range(0, len(quantized_local), _BLOCK)
    blocks = (quantized_local[start : start + _BLOCK] for start in starts)
    return np.concatenate(
        [np.empty(0, np.int64), *systematic_count_blocks(blocks, offset, total, n, u)]
    )


def _quantized(weights: Weights) -> tuple[Iterable[Integers], int, int]:
    """Return weights [N] quantized, block by block, 0, and their sum; nothing of size N is kept."""
    exponent = fixed_point_exponent(float(weights.max()), weights.size)
    if weights.size <= _BLOCK:
        block = quantize(weights, exponent)
        return [block], 0, int(block.sum())

    def blocks() -> Iterator[Integers]:
        for start in range(0, weights.size, _BLOCK):
            yield quantize(weights[start : start + _BLOCK], exponent)

    return blocks(), 0, sum(int(block.sum()) for block in blocks())


def systematic_count_blocks(
    blocks: Iterable[Integers], offset: int, total: int, n: int, u: float
) -> Iterator[Integers]:
    """Yield :func:`systematic_counts_local` of one slice, given and returned block by block."""
    for before, below in _points_below(blocks, offset, total, n, u):
        yield np.diff(below, prepend=before)


def _points_below(
    blocks: Iterable[Integers], offset: int, total: int, n: int, u: float
) -> Iterator[tuple[int, Integers]]:
    """Yield, block by block, how many points lie below it, and below the end of each weight, [b].

    Counts the points (j·total + r)/n, r = floor(u·total), in the stretch of each weight. Exact, so
    that counts never depend on how the weights are cut: below an edge c lie
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
        last = int(below[-1])
        yield before, below
        before = last


def apportion(total: int, shares: Sequence[int]) -> list[int]:
    """Split ``total`` in proportion to ``shares``, at least 1 each; the largest takes the rest.

    Raises UsageError if there are more shares than ``total``.
    """
    if len(shares) > total:
        raise UsageError(f"a batch of {total} cannot hold samples of {len(shares)} groups")
    sizes = [max(1, total * share // sum(shares)) for share in shares]
    sizes[sizes.index(max(sizes))] += total - sum(sizes)
    return sizes
