"""Statistics of runs in pairs: the same seeds under two variants. Plain numpy and scipy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

LEVEL = 0.95
"""Of the confidence intervals."""


@dataclass(frozen=True, slots=True)
class Paired:
    """Mean of the differences of n pairs, its confidence interval, and p; NaN where n is small.

    p: of Student's paired t-test, two-sided. The interval needs two pairs, as p does.
    """

    n: int
    mean: float
    low: float
    high: float
    p: float


def paired(theirs: Sequence[float], ours: Sequence[float]) -> Paired:
    """Compare ``theirs`` minus ``ours``, [n] each, pair by pair.

    Equal differences have no spread: the interval is a point, p is 1 if they are zero, else 0.
    """
    differences = np.asarray(theirs, dtype=float) - np.asarray(ours, dtype=float)
    n = len(differences)
    mean = float(differences.mean()) if n else math.nan
    if n < 2:
        return Paired(n, mean, math.nan, math.nan, math.nan)
    error = float(differences.std(ddof=1)) / math.sqrt(n)
    if error <= 1e-12 * max(1.0, abs(mean)):
        return Paired(n, mean, mean, mean, 1.0 if abs(mean) <= 1e-12 else 0.0)
    half = float(stats.t.ppf((1 + LEVEL) / 2, n - 1)) * error
    p = 2 * float(stats.t.sf(abs(mean) / error, n - 1))
    return Paired(n, mean, mean - half, mean + half, p)


def holm(p: Sequence[float]) -> list[float]:
    """Return p-values corrected for their number (Holm 1979), in the same order; NaN stays NaN.

    The k-th smallest of m is multiplied by m - k + 1; then none is smaller than one before it.
    """
    known = sorted((value, k) for k, value in enumerate(p) if not math.isnan(value))
    corrected, largest = list(p), 0.0
    for rank, (value, k) in enumerate(known):
        largest = max(largest, min(1.0, (len(known) - rank) * value))
        corrected[k] = largest
    return corrected
