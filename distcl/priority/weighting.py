"""Weights from scores: pure functions on numpy arrays in float64.

Wrong arguments raise ValueError. Local, but where ``over`` sums over slices: then collective.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from distcl.types import exact

Weights = npt.NDArray[np.float64]
Of = Callable[[Weights], Weights]
"""A function of values [b], one by one: [b]."""

_BLOCK = 1 << 16  # values handed to it together


class Sums(Protocol):
    """Sums over arrays of values [n], one a sample; all there are, or over slices of all ranks.

    Over slices every method is collective, and every rank gets the same.
    """

    def number(self, values: npt.NDArray[Any]) -> int:
        """Return how many values there are."""
        ...

    def total(self, values: Weights, of: Of | None = None) -> float:
        """Return their sum, or that of a function ``of`` them."""
        ...

    def largest(self, values: Weights) -> float:
        """Return the largest of them, -inf of none."""
        ...

    def smallest(self, values: Weights) -> float:
        """Return the smallest of them, inf of none."""
        ...

    def count(self, mask: npt.NDArray[np.bool_]) -> int:
        """Return how many of a mask [n] are true."""
        ...


class _Whole:
    """Sums over arrays that are whole. Local."""

    def number(self, values: npt.NDArray[Any]) -> int:
        return len(values)

    def total(self, values: Weights, of: Of | None = None) -> float:
        return float(summed(values, of))

    def largest(self, values: Weights) -> float:
        return float(values.max(initial=-math.inf))

    def smallest(self, values: Weights) -> float:
        return float(values.min(initial=math.inf))

    def count(self, mask: npt.NDArray[np.bool_]) -> int:
        return int(np.count_nonzero(mask))


def summed(values: npt.NDArray[Any], of: Of | None) -> Any:
    """Return the sum of values [n], or that of a function ``of`` them, with no array [n] made."""
    if of is None:
        return values.sum()
    starts = range(0, len(values), _BLOCK)
    return sum(of(values[start : start + _BLOCK]).sum() for start in starts)


WHOLE: Sums = _Whole()
"""Sums over arrays that are whole on every rank."""


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


def shape_weights(
    scores: npt.ArrayLike,
    alpha: float = 1.0,
    cap: float = 0.0,
    min_ess: float = 0.0,
    floor: float = 0.0,
    ids: npt.ArrayLike | None = None,
    min_score: float = 1e-8,
    over: Sums = WHOLE,
    overwrite: bool = False,
) -> Weights:
    """Return weights float64 [N] of scores [N]: alpha, then cap, then tempering, then floor.

    w = max(score, min_score)^alpha, handed to :func:`cap_weights`, :func:`temper` and
    :func:`mix_floor`, each left out where its parameter is 0; alpha = 0 gives all ones. Of scores
    that lie in slices on several ranks, ``over`` sums all of them; collective then. ``overwrite``:
    the scores need not stay as they are. Raises ValueError naming the first id (or position) whose
    score or weight is not finite.
    """
    weights = np.array(scores, dtype=np.float64, copy=None if overwrite else True)
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
        weights = temper(weights, min_ess, over, overwrite=True)
    return mix_floor(weights, floor, over) if floor else weights


def ess_fraction(weights: npt.ArrayLike, over: Sums = WHOLE) -> float:
    """Return the effective sample size as a share of N: (sum w)^2 / (N sum w^2), Kish (1965)."""
    return _ess_fraction(check_weights(weights, over=over), over)


def _ess_fraction(array: Weights, over: Sums) -> float:
    largest = over.largest(array)
    total = over.total(array, lambda w: w / largest)
    squares = over.total(array, lambda w: np.square(w / largest))
    return min(1.0, total * total / (over.number(array) * squares))


def top_share(weights: npt.ArrayLike, share: float = 0.01, over: Sums = WHOLE) -> float:
    """Return the part of sum w that the largest ``share`` of the N weights has (at least one).

    Where that part begins is found by bisection, to 2**-60 of the largest weight.
    """
    array = check_weights(weights, over=over)
    number, largest = over.number(array), over.largest(array)
    most = max(1, round(exact(share) * number))
    low, high = 0.0, 1.0  # of the largest: ``most`` weights or fewer exceed high, more exceed low
    for _ in range(60):
        middle = (low + high) / 2
        few = over.count(array > middle * largest) <= most
        low, high = (low, middle) if few else (middle, high)
    above = over.total(array, lambda w: np.where(w > high * largest, w / largest, 0.0))
    ties = (most - over.count(array > high * largest)) * high
    return (above + ties) / over.total(array, lambda w: w / largest)


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
    while (above := over.count(array > threshold)) > before:
        before, room = above, number - cap * above
        if room <= 0:
            break  # the threshold is the solution, but for rounding
        threshold = cap * over.total(np.where(array <= threshold, array, 0.0)) / room
        if threshold == 0:
            return (array > 0).astype(np.float64)
    return np.minimum(array, threshold, out=array)


def temper(
    weights: npt.ArrayLike, min_ess: float, over: Sums = WHOLE, overwrite: bool = False
) -> Weights:
    """Return w^a with the largest a in [0, 1] whose :func:`ess_fraction` is >= ``min_ess``.

    Unchanged where a = 1. a is found to 1e-6, from below, by false position (Illinois variant) on
    log ESS, which falls as a grows. Zero weights stay zero: if fewer than a share ``min_ess`` is
    positive, a is 0 and these become equal. ``overwrite``: the weights given need not stay.
    """
    array = check_weights(weights, over=over)
    if not 0 <= min_ess <= 1:
        raise ValueError(f"min_ess is a share of N, so it must be from 0 to 1, not {min_ess}")
    fraction, number = _ess_fraction(array, over), over.number(array)
    if fraction >= min_ess:
        return array
    positive = array > 0
    with np.errstate(divide="ignore"):
        logs = np.log(array, out=array if overwrite else None)
    logs -= over.largest(logs)
    work = np.empty_like(logs)

    def excess(power: float) -> float:
        np.exp(np.multiply(logs, power, out=work), out=work)
        total = over.total(work)
        np.square(work, out=work)
        return math.log(total * total / (number * over.total(work)) / min_ess)

    low, high = 0.0, 1.0
    reached = pull_low = math.log(over.count(positive) / number / min_ess)
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


Positions = npt.NDArray[np.integer[Any]]
