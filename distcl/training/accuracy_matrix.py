"""The accuracy matrix of a run, and the continual-learning metrics computed from it.

In every formula R[i][j] is the accuracy on experience j after round i, both from 0; T is the last
row; first(j) is the first row in which experience j counts as seen. Sums run over entries that
were evaluated; a metric of which nothing can be said is None, never NaN. Local: plain numbers.

Of a score of which less is better, R is that score: averages are its own, and what is said of
differences is said of -R, so that forgetting is above zero where it got worse, and transfer where
it got better.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

from distcl.errors import CheckpointError

Entry = float | None
"""An accuracy, or None where none was measured."""


def _mean(values: Iterable[float]) -> Entry:
    known = list(values)
    return fmean(known) if known else None


def _gain(pairs: Iterable[tuple[Entry, Entry]], sign: int) -> Entry:
    return _mean(sign * (a - b) for a, b in pairs if a is not None and b is not None)


class AccuracyMatrix:
    """One row per evaluation, one column per experience, in the order they were formed.

    Rows may differ in length, since experiences are formed as the run goes on; what is missing
    counts as not evaluated.
    """

    def __init__(self, higher_is_better: bool = True) -> None:
        self.higher_is_better = higher_is_better
        self._sign = 1 if higher_is_better else -1
        self._rows: list[list[Entry]] = []
        self._seen: list[int] = []

    def append(self, row: Sequence[Entry], seen: int) -> None:
        """Add the accuracies after a round, on each experience or None.

        seen: how many experiences, from the first, had been trained on by then. Raises ValueError
        if it exceeds the row, is less than before, or an entry is not finite.
        """
        if not (self._seen[-1] if self._seen else 0) <= seen <= len(row):
            raise ValueError(f"seen = {seen} does not follow {self._seen} in a row of {len(row)}")
        self._rows.append([_finite(value) for value in row])
        self._seen.append(seen)

    def fill_last(self, value: Entry) -> None:
        """Add a column to the last row: the accuracy on an experience formed since that row.

        Measured before the next round trains on it, it is what forward transfer needs. Without a
        row yet there is nothing to fill.
        """
        if self._rows:
            self._rows[-1].append(_finite(value))

    def rows(self) -> list[list[Entry]]:
        """Return all rows, filled up with None to equal length."""
        width = max(map(len, self._rows), default=0)
        return [row + [None] * (width - len(row)) for row in self._rows]

    def average_accuracy(self) -> Entry:
        """Mean over the seen j of R[T][j] (ACC; Lopez-Paz and Ranzato, NeurIPS 2017)."""
        return _mean(self._of_seen(-1)) if self._rows else None

    def worst_experience_accuracy(self) -> Entry:
        """Smallest R[T][j] over the seen j; largest, where less is better."""
        worst = min if self.higher_is_better else max
        return worst(self._of_seen(-1), default=None) if self._rows else None

    def average_anytime_accuracy(self) -> Entry:
        """Mean over i of the mean over j, seen by row i, of R[i][j] (Caccia et al., ICLR 2022)."""
        means = (_mean(self._of_seen(i)) for i in range(len(self._rows)))
        return _mean(m for m in means if m is not None)

    def average_forgetting(self) -> Entry:
        """Mean over j seen before row T of max over i < T of R[i][j], minus R[T][j].

        Chaudhry et al., "Riemannian walk for incremental learning", ECCV 2018. Negative where an
        experience is known better at the end than ever before.
        """
        return _mean(lost for lost in self.forgetting() if lost is not None)

    def forgetting(self) -> list[Entry]:
        """Return what :meth:`average_forgetting` averages, of each j seen before row T."""
        if len(self._rows) < 2:
            return []
        lost: list[Entry] = []
        for column in [*zip(*self.rows(), strict=True)][: self._seen[-2]]:
            earlier, last = [r for r in column[:-1] if r is not None], column[-1]
            best = (max if self.higher_is_better else min)(earlier, default=None)
            lost.append(None if best is None or last is None else self._sign * (best - last))
        return lost

    def backward_transfer(self) -> Entry:
        """Mean over j with first(j) < T of R[T][j] - R[first(j)][j].

        BWT of Lopez-Paz and Ranzato, "Gradient episodic memory", NeurIPS 2017, where first(j) = j.
        """
        rows, first = self.rows(), enumerate(self._first())
        pairs = [(rows[-1][j], rows[i][j]) for j, i in first if i < len(rows) - 1]
        return _gain(pairs, self._sign)

    def forward_transfer(self, baseline: Sequence[Entry]) -> Entry:
        """Mean over j with first(j) > 0 of R[first(j) - 1][j] - baseline[j].

        FWT of Lopez-Paz and Ranzato, NeurIPS 2017. baseline: accuracy on each experience of the
        model before any training, or None where unknown. Raises ValueError if it is shorter than
        the experiences seen.
        """
        first = self._first()
        if len(baseline) < len(first):
            raise ValueError(f"{len(baseline)} baselines for {len(first)} experiences")
        rows = self.rows()
        pairs = [(rows[i - 1][j], baseline[j]) for j, i in enumerate(first) if i > 0]
        return _gain(pairs, self._sign)

    def state_dict(self) -> dict[str, Any]:
        """Return the matrix as JSON-serializable values."""
        return {"rows": [list(row) for row in self._rows], "seen": list(self._seen)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        self._rows, self._seen = [], []
        for row, seen in zip(state["rows"], state["seen"], strict=True):
            self.append(row, seen)

    def _of_seen(self, i: int) -> list[float]:
        return [value for value in self._rows[i][: self._seen[i]] if value is not None]

    def _first(self) -> list[int]:
        """Return first(j) of every experience seen by the end."""
        count = self._seen[-1] if self._seen else 0
        return [next(i for i, seen in enumerate(self._seen) if seen > j) for j in range(count)]


class Matrices:
    """The matrix of each score of a run by its name, the leading one first.

    ``scores``: whether higher is better, by name.
    """

    def __init__(self, scores: Mapping[str, bool]) -> None:
        self.of = {name: AccuracyMatrix(higher) for name, higher in scores.items()}

    def append(self, rows: Mapping[str, Sequence[Entry]], seen: int) -> None:
        """Add a row to each; see :meth:`AccuracyMatrix.append`."""
        for name, matrix in self.of.items():
            matrix.append(rows[name], seen)

    def fill_last(self, values: Sequence[Entry]) -> None:
        """Add a column to the last row of each, in their order."""
        for matrix, value in zip(self.of.values(), values, strict=True):
            matrix.fill_last(value)

    def state_dict(self) -> dict[str, Any]:
        """Return the matrices as JSON-serializable values."""
        return {name: matrix.state_dict() for name, matrix in self.of.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned. Raises CheckpointError if it is of other scores."""
        if list(state) != list(self.of):
            raise CheckpointError(
                f"the checkpoint's run is judged by {', '.join(state)}, this one by "
                f"{', '.join(self.of)} (model.score): a run keeps its scores, so begin anew"
            )
        for name, matrix in self.of.items():
            matrix.load_state_dict(state[name])


def _finite(value: Entry) -> Entry:
    if value is None:
        return None
    if not math.isfinite(value):
        raise ValueError(f"an accuracy is {value}")
    return float(value)
