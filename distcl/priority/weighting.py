"""Weights from scores: a vector of weights, and what is done to it, on numpy arrays in float64.

Wrong arguments raise ValueError.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from distcl.data.ids import IdIndex
from distcl.types import Ids, exact

Weights = npt.NDArray[np.float64]
Positions = npt.NDArray[np.integer[Any]]
Array = npt.NDArray[Any]
Of = Callable[[Weights], Weights]
"""A function of values [b], one by one: [b]."""
Reduce = Callable[[Array, str], Array]
"""(values, sum or max) -> the same over all ranks. Collective."""

_BLOCK = 1 << 16  # values worked on together


@dataclass(frozen=True, eq=False)
class Slices:
    """The samples of some ids that this rank holds, and how many of them each rank's runs have.

    A run is what one experience has in one lane; runs are numbered over all ranks, lane by lane,
    and each lies on one rank: sums that are made run by run do not depend on the number of ranks.
    """

    ids: Ids
    """This rank's, int64 [n], in order of run, then of id."""
    sizes: Ids
    """How many of ``ids`` are in each run, int64 [R]; 0 for other ranks' runs."""
    everyones: Ids
    """The same over all ranks, int64 [R]."""
    lanes: Ids
    """The lane of each run, int64 [R]."""
    reduce: Reduce

    @property
    def number(self) -> int:
        """How many samples all ranks hold."""
        return int(self.everyones.sum())

    def runs(self) -> Iterator[tuple[int, slice]]:
        """Yield (number of the run, its place in ``ids``) of this rank's runs. Local."""
        end = 0
        for run in np.flatnonzero(self.sizes).tolist():
            begin, end = end, end + int(self.sizes[run])
            yield run, slice(begin, end)

    def pieces(self, size: int) -> list[Ids]:
        """Return ``ids`` lane by lane in chunks of ``size``, a lane's last one smaller. Local."""
        found, end = [], 0
        for lane in np.unique(self.lanes).tolist():
            begin, end = end, end + int(self.sizes[self.lanes == lane].sum())
            found += [self.ids[at : min(at + size, end)] for at in range(begin, end, size)]
        return found

    def joined(self, other: Slices) -> Slices:
        """Return both, these first. Local."""
        return Slices(
            np.concatenate([self.ids, other.ids]),
            np.concatenate([self.sizes, other.sizes]),
            np.concatenate([self.everyones, other.everyones]),
            np.concatenate([self.lanes, other.lanes]),
            self.reduce,
        )

    def pick(self, ids: Ids, values: Array) -> Array:
        """Return the values [n] of mine from values [M] of ``ids`` [M], which have them all."""
        picked: Array = values[IdIndex(ids).locate(self.ids)[0]]
        return picked


@dataclass(frozen=True, eq=False)
class WeightVector:
    """Weights [n] of samples, and sums over all samples there are.

    ``values`` float64 [n] belong to ``ids`` int64 [n]; None: all alike. Every rank has them all,
    or, with ``slices``, those of its own samples only: then what sums, counts or compares is
    collective, and every rank gets the same.
    """

    ids: Ids
    values: Weights | None
    slices: Slices | None = None

    @property
    def number(self) -> int:
        """How many samples there are, over all ranks."""
        return len(self.ids) if self.slices is None else self.slices.number

    @property
    def held(self) -> Weights:
        """The values, which there must be."""
        assert self.values is not None
        return self.values

    # ------------------------------------------------------------ sums

    def sum(self, values: Array | None = None, of: Of | None = None) -> float:
        """Return the sum of the weights, or of other ``values`` [n], or of a function ``of`` them.

        Run by run over slices. No array [n] is made.
        """
        values = self.held if values is None else values
        if self.slices is None:
            return float(_summed(values, of))
        sums = np.zeros(len(self.slices.sizes))
        for run, place in self.slices.runs():
            sums[run] = _summed(values[place], of)
        return float(self.slices.reduce(sums, "sum").sum())

    def max(self, values: Array | None = None) -> float:
        """Return the largest weight, or the largest of ``values`` [n]; -inf of none."""
        return float(self._over((self.held if values is None else values).max(initial=-math.inf)))

    def min(self) -> float:
        """Return the smallest weight, inf of none."""
        return -float(self._over(-self.held.min(initial=math.inf)))

    def count(self, mask: npt.NDArray[np.bool_]) -> int:
        """Return how many of a mask [n] are true."""
        return int(self._over(np.count_nonzero(mask), "sum"))

    def _over(self, mine: Any, op: str = "max") -> Any:
        return mine if self.slices is None else self.slices.reduce(np.array([mine]), op)[0]

    def ess(self) -> float:
        """Return the effective sample size as a share of N, (sum w)^2 / (N sum w^2) (Kish 1965)."""
        largest = self.max()
        total = self.sum(of=lambda w: w / largest)
        squares = self.sum(of=lambda w: np.square(w / largest))
        return min(1.0, total * total / (self.number * squares))

    def top_share(self, share: float = 0.01) -> float:
        """Return the part of sum w that the largest ``share`` of the N weights has (at least one).

        Where that part begins is found by bisection, to 2**-60 of the largest weight.
        """
        array, largest = self.held, self.max()
        most = max(1, round(exact(share) * self.number))
        low, high = (
            0.0,
            1.0,
        )  # of the largest: at most ``most`` exceed high, more exceed low
        for _ in range(60):
            middle = (low + high) / 2
            few = self.count(array > middle * largest) <= most
            low, high = (low, middle) if few else (middle, high)
        above = self.sum(of=lambda w: np.where(w > high * largest, w / largest, 0.0))
        ties = (most - self.count(array > high * largest)) * high
        return (above + ties) / self.sum(of=lambda w: w / largest)

    def check(self) -> None:
        """Raise ValueError naming the first bad id if these cannot be drawn from."""
        low, high = self.held.min(initial=0), self.held.max(initial=0)
        # NaN fails every comparison; that others have positive weights is asked only of sound ones
        if not (low >= 0 and high < math.inf and self.max() > 0):
            _refuse(self.held, self.ids, self.number)

    # ------------------------------------------------------------ from scores to weights

    def shaped(
        self,
        alpha: float = 1.0,
        cap: float = 0.0,
        min_ess: float = 0.0,
        floor: float = 0.0,
        min_score: float = 1e-8,
        overwrite: bool = False,
    ) -> Self:
        """Return the weights that these scores make: alpha, then cap, then tempering, then floor.

        w = max(score, min_score)^alpha, handed to :meth:`cap`, :meth:`temper` and :meth:`floor`,
        each left out where its parameter is 0; alpha = 0 gives all ones. ``overwrite``: the scores
        need not stay as they are. Raises ValueError naming the first id whose score or weight is
        not finite.
        """
        weights = np.array(self.held, dtype=np.float64, copy=None if overwrite else True)
        finite = np.isfinite(weights)
        if not finite.all():
            check_weights(np.where(finite, 1.0, weights), self.ids)
        if not 0 <= alpha < math.inf:
            raise ValueError(f"alpha must be finite and not negative, not {alpha}")
        np.maximum(weights, min_score, out=weights)
        if alpha != 1:
            with np.errstate(over="ignore"):
                np.power(weights, alpha, out=weights)
        shaped = replace(self, values=weights)
        shaped.check()
        shaped = shaped.cap(cap) if cap else shaped
        shaped = shaped.temper(min_ess, overwrite=True) if min_ess else shaped
        return shaped.floor(floor) if floor else shaped

    def cap(self, cap: float) -> Self:
        """Return min(w, t), t the largest threshold that leaves no weight above ``cap`` means.

        The mean is that of the result: no sample is drawn more than ``cap`` (>= 1) times as often
        as samples are on average. t solves t = cap/N sum_i min(w_i, t), by Newton's method, exact
        after finitely many steps since the right side is concave and piecewise linear. With fewer
        than N/cap positive weights there is no such t; then these become equal.
        """
        if not 1 <= cap < math.inf:
            raise ValueError(f"the cap is in means, so it must be at least 1, not {cap}")
        array = self.held / self.max()  # so that sums stay finite
        before, threshold = 0, cap * self.sum(array) / self.number
        while (above := self.count(array > threshold)) > before:
            before, room = above, self.number - cap * above
            if room <= 0:
                break  # the threshold is the solution, but for rounding
            threshold = cap * self.sum(np.where(array <= threshold, array, 0.0)) / room
            if threshold == 0:
                return replace(self, values=(array > 0).astype(np.float64))
        return replace(self, values=np.minimum(array, threshold, out=array))

    def temper(self, min_ess: float, overwrite: bool = False) -> Self:
        """Return w^a with the largest a in [0, 1] whose :meth:`ess` is at least ``min_ess``.

        Unchanged where a = 1. a is found to 1e-6, from below, by false position (Illinois variant)
        on log ESS, which falls as a grows. Zero weights stay zero: if fewer than a share
        ``min_ess`` is positive, a is 0 and these become equal. ``overwrite``: these need not stay.
        """
        if not 0 <= min_ess <= 1:
            raise ValueError(f"min_ess is a share of N, so it must be from 0 to 1, not {min_ess}")
        array, fraction, number = self.held, self.ess(), self.number
        if fraction >= min_ess:
            return self
        positive = array > 0
        with np.errstate(divide="ignore"):
            logs = np.log(array, out=array if overwrite else None)
        logs -= self.max(logs)
        work = np.empty_like(logs)

        def excess(power: float) -> float:
            np.exp(np.multiply(logs, power, out=work), out=work)
            total = self.sum(work)
            np.square(work, out=work)
            return math.log(total * total / (number * self.sum(work)) / min_ess)

        low, high = 0.0, 1.0
        reached = pull_low = math.log(self.count(positive) / number / min_ess)
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
            return replace(self, values=positive.astype(np.float64))
        return replace(self, values=np.exp(np.multiply(logs, low, out=logs), out=logs))

    def floor(self, share: float) -> Self:
        """Return (1 - share) w / sum w + share / N: a ``share`` in [0, 1] of uniform draws."""
        if not 0 <= share <= 1:
            raise ValueError(f"the floor is a share, so it must be from 0 to 1, not {share}")
        array = self.held / self.max()
        array *= (1 - share) / self.sum(array)
        array += share / self.number
        return replace(self, values=array)

    # ------------------------------------------------------------ by id

    def lookup(self, wanted: Ids) -> Weights:
        """Return the values of ids [M], sorted and all different; NaN where not held. Local.

        Looks through all there are, a block at a time, with no array [n].
        """
        index, found = IdIndex(wanted), np.full(len(wanted), np.nan)
        for start in range(0, len(self.ids), _BLOCK) if len(wanted) else ():
            at, there = index.locate(self.ids[start : start + _BLOCK])
            found[at[there]] = self.held[start + np.flatnonzero(there)]
        return found


def joined(first: WeightVector, second: WeightVector) -> WeightVector:
    """Return both together, in that order; both have slices, or none has. Local."""
    slices = None
    if first.slices is not None and second.slices is not None:
        slices = first.slices.joined(second.slices)
    ids, values = (first.ids, second.ids), (first.held, second.held)
    return WeightVector(np.concatenate(ids), np.concatenate(values), slices)


def check_weights(weights: npt.ArrayLike, ids: npt.ArrayLike | None = None) -> Weights:
    """Return ``weights`` [N] as float64 (no copy if they are) if they can be drawn from. Local.

    Raises ValueError when they are empty or all zero, or for NaN, infinite and negative ones; it
    names the first bad id, or its position where ``ids`` [N] is not given.
    """
    array = np.asarray(weights, dtype=np.float64)
    if array.ndim != 1 or array.size == 0:
        raise ValueError(f"weights must be one row of at least one number, not {array.shape}")
    if not (array.min() >= 0 and 0 < array.max() < math.inf):  # NaN fails every comparison
        _refuse(array, ids, len(array))
    return array


def _refuse(array: Weights, ids: npt.ArrayLike | None, number: int) -> None:
    """Say what is wrong with weights [n], of ``number`` over all ranks."""
    bad = np.flatnonzero(~(np.isfinite(array) & (array >= 0)))
    first = int(bad[0]) if len(bad) else 0
    who = f"position {first}" if ids is None or not array.size else f"id {np.asarray(ids)[first]}"
    if len(bad):
        raise ValueError(
            f"the weight of {who} is {array[first]}; weights must be finite and not negative "
            f"({len(bad)} of {array.size} are bad)"
        )
    raise ValueError(f"all {number} weights are zero, from {who} on")


def _summed(values: Array, of: Of | None) -> Any:
    """Return the sum of values [n], or that of a function ``of`` them, with no array [n] made."""
    if of is None:
        return values.sum()
    starts = range(0, len(values), _BLOCK)
    return sum(of(values[start : start + _BLOCK]).sum() for start in starts)
