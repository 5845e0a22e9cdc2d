"""Ids kept as runs of consecutive ones, where an id is among others, and what some rows have."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch

from distcl.errors import DataError
from distcl.types import Ids, SourceInfo, as_tensor, frozen

BLOCK = 1 << 16  # ids looked at together
_FEW = 16  # ids a run, on average, from which on a search of runs is the faster one


class IdRuns(np.lib.mixins.NDArrayOperatorsMixin):
    """Ids [N], all different, as R runs [begin, begin + size) after one another: 16 bytes a run.

    It stands in for an int64 array: an index gives ids as numpy's would (an array of as many as
    were asked for), and numpy's functions and operators make the whole array, 8 bytes an id.
    """

    dtype = np.dtype(np.int64)
    ndim = 1

    def __init__(self, begins: npt.ArrayLike, sizes: npt.ArrayLike) -> None:
        self.begins: Ids = np.asarray(begins, dtype=np.int64)
        self.sizes: Ids = np.asarray(sizes, dtype=np.int64)
        self._ends = np.cumsum(self.sizes)  # in positions
        self.less = self.begins - (self._ends - self.sizes)  # id minus position

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    @property
    def shape(self) -> tuple[int]:
        """(N,)."""
        return (len(self),)

    def __getitem__(self, key: Any) -> Any:
        n = len(self)
        if isinstance(key, slice):
            wanted = range(*key.indices(n))
            found = np.empty(len(wanted), dtype=np.int64)
            for start in range(0, len(wanted), BLOCK):  # what lies between costs as much again
                part = wanted[start : start + BLOCK]
                found[start : start + BLOCK] = self._at(np.arange(part.start, part.stop, part.step))
            return found
        at = np.asarray(key)
        if at.dtype == np.bool_:
            if at.shape != self.shape:
                raise IndexError(f"a mask of shape {at.shape} for {n} ids")
            at = np.flatnonzero(at)
        if at.size == 0:
            return np.empty(at.shape, dtype=np.int64)
        if at.min() < -n or at.max() >= n:
            raise IndexError(f"position {at.min()} or {at.max()} of {n} ids")
        return self._at(np.where(at < 0, at + n, at))

    def _at(self, positions: Ids) -> Ids:
        run = np.searchsorted(self._ends, positions, side="right")
        found: Ids = positions + self.less[run]
        return found

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> npt.NDArray[Any]:
        if copy is False:
            raise ValueError("ids in runs are no array yet")
        return np.asarray(self[:], dtype=dtype)

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **given: Any) -> Any:
        arrays = [np.asarray(i) if isinstance(i, IdRuns) else i for i in inputs]
        return getattr(ufunc, method)(*arrays, **given)

    def min(self) -> int:
        """Return the smallest id."""
        return int(self.begins.min())

    def max(self) -> int:
        """Return the largest id."""
        return int((self.begins + self.sizes).max()) - 1

    def tolist(self) -> list[int]:
        """Return the ids as Python's integers."""
        return self[:].tolist()  # type: ignore[no-any-return]


class IdIndex:
    """Where ids are among ids [M], all different: the one look-up by id.

    Ids that ascend are searched as they lie, others through a sorted order, 8 bytes an id; ids of
    few runs by these, and those of a single run without a search. They are not copied, and must
    stay as they are.
    """

    def __init__(self, ids: Ids) -> None:
        self.ids = ids
        self._order: Ids | None = None
        self._runs: tuple[Ids, Ids, Ids] | None = None  # ascending: begins, ends, id minus row
        if runs := _few_runs(ids):
            order = np.argsort(runs.begins)
            first, size, less = runs.begins[order], runs.sizes[order], runs.less[order]
            if (first[1:] >= (first + size)[:-1]).all():  # no id is there twice
                self._runs = first, first + size, less
        if self._runs is None and not (ids[1:] > ids[:-1]).all():
            self._order = np.argsort(ids, kind="stable")

    def locate(self, ids: Ids) -> tuple[Ids, npt.NDArray[np.bool_]]:
        """Return (row, whether it is there) of each of ``ids`` [N]: int64 [N], bool [N]. Local.

        The row of one that is not there is any number; of one that is there twice, its first.
        """
        if len(self.ids) == 0:
            return np.zeros(len(ids), dtype=np.int64), np.zeros(len(ids), dtype=np.bool_)
        if self._runs is None:
            rows = np.searchsorted(self.ids, ids, sorter=self._order)
            if self._order is not None:
                rows = self._order.take(rows, mode="clip")
        else:
            first, end, less = self._runs
            run = 0 if len(first) == 1 else np.searchsorted(first, ids, "right") - 1
            rows = ids - less[run]
            if isinstance(self.ids, IdRuns):
                return rows, (ids >= first[run]) & (ids < end[run])
        return rows, self.ids.take(rows, mode="clip") == ids


def _few_runs(ids: Ids) -> IdRuns | None:
    """Return ids as runs if these are few."""
    if isinstance(ids, IdRuns):
        return ids
    breaks = sum(np.count_nonzero(np.diff(some) != 1) for some in blocks(ids))
    runs = in_runs(blocks(ids)) if 0 < _FEW * (breaks + 1) <= len(ids) else None
    return runs if isinstance(runs, IdRuns) else None


def blocks(ids: Ids) -> Iterator[Ids]:
    """Yield ids in arrays of ``BLOCK``, in their order."""
    return (ids[start : start + BLOCK] for start in range(0, len(ids), BLOCK))


def in_runs(parts: Iterable[Ids]) -> Ids:
    """Return different ids, given in pieces, as an IdRuns, or as an array if that is smaller."""
    begins, sizes = [np.empty(0, dtype=np.int64)], [np.empty(0, dtype=np.int64)]
    for ids in parts:
        if len(ids) == 0:
            continue
        first = np.flatnonzero(np.diff(ids, prepend=ids[0] - 2) != 1)
        size = np.diff(first, append=len(ids))
        if len(begins[-1]) and begins[-1][-1] + sizes[-1][-1] == ids[0]:  # the run goes on
            sizes[-1][-1] += size[0]
            first, size = first[1:], size[1:]
        if len(first):
            begins.append(ids[first])
            sizes.append(size)
    runs = IdRuns(np.concatenate(begins), np.concatenate(sizes))
    return as_ids(runs) if 2 * len(runs.begins) < len(runs) else frozen(np.asarray(runs))


def joined_ids(parts: Sequence[Ids]) -> Ids:
    """Return ids after one another: in runs if some are, and all can be, else as an array."""
    if any(isinstance(part, IdRuns) for part in parts):
        parts = [p if isinstance(p, IdRuns) else in_runs(blocks(p)) for p in parts if len(p)]
    runs: list[Any] = [part for part in parts if isinstance(part, IdRuns)]
    if not runs or len(runs) < len(parts):
        return np.concatenate([np.asarray(part) for part in parts])
    columns = zip(*((run.begins, run.sizes) for run in runs), strict=True)
    return as_ids(IdRuns(*map(np.concatenate, columns)))


def among(ids: Ids, others: Ids) -> npt.NDArray[np.bool_]:
    """Return which of ``ids`` [N] are among ``others``, bool [N]."""
    if isinstance(others, IdRuns):
        return IdIndex(others).locate(ids)[1]
    return np.isin(ids, others)  # has a table where they are dense


def ids_tensor(ids: Ids | None) -> torch.Tensor | None:
    """Return ids for a checkpoint: int64 [N], or in runs, [2, R] of begins and sizes."""
    if isinstance(ids, IdRuns):
        return torch.from_numpy(np.stack([ids.begins, ids.sizes]))
    return as_tensor(ids)


def tensor_ids(tensor: torch.Tensor | None) -> Any:
    """Return what :func:`ids_tensor` was given."""
    if tensor is None:
        return None
    found = frozen(tensor.numpy())
    return found if found.ndim == 1 else as_ids(IdRuns(*found))


def as_ids(runs: IdRuns) -> Ids:
    """Return runs typed as the array that they stand in for."""
    return cast("Ids", runs)  # as good as one wherever it is indexed or given to numpy


GOLDEN = np.uint64(0x9E3779B97F4A7C15)
"""The step of SplitMix64's counter."""


def splitmix(z: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Return 64 bits mixed into 64 that look random: SplitMix64's finalizer."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def checked_rows(ids: Ids, number: int, name: str) -> Ids:
    """Return a copy of ids [B]; DataError naming the first that is not one of a source's rows."""
    ids = np.array(ids, dtype=np.int64)
    if len(ids) and ids.view(np.uint64).max() >= number:  # negative ids are huge, unsigned
        bad = ids[(ids < 0) | (ids >= number)][0]
        raise DataError(f"{name}: there is no sample {bad} (0…{number - 1})")
    return ids


def column_of(info: SourceInfo, name: str) -> Any:
    """Return the values [N] of one of a source's columns; KeyError if it is not there."""
    return _array_of(info.columns[name])


def _array_of(column: Any) -> npt.NDArray[Any]:
    found = column() if callable(column) else column
    if isinstance(found, list | tuple):  # each value as it is
        return np.array([*found, None], dtype=object)[:-1]
    return np.asarray(found)


def _rows_of(column: Any, rows: Ids) -> npt.NDArray[Any]:
    found: npt.NDArray[Any] = _array_of(column)[rows]
    return found


def info_part(info: SourceInfo, rows: Ids) -> SourceInfo:
    """Return what holds of some of a source's samples: those of ``rows``, by row."""
    labels, usable = info.known_labels(), info.known_usable()
    return replace(
        info,
        labels=None if labels is None else labels[rows],
        usable=None if usable is None else usable[rows],
        groups=None if info.groups is None else info.groups[rows],
        columns={
            name: partial(_rows_of, values, rows) if callable(values) else _rows_of(values, rows)
            for name, values in info.columns.items()
        },
    )


def part_of(size: int, rank: int, world_size: int) -> tuple[int, int]:
    """Return a rank's part [start, stop) of a global batch: sizes within one, larger ones first."""
    each, extra = divmod(size, world_size)
    start = rank * each + min(rank, extra)
    return start, start + each + (rank < extra)
