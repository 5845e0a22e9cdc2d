"""Indexed WebDataset shards as a source: random reads by id, at the speed of the storage."""

from __future__ import annotations

import copy
import logging
import os
import time
import zlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils._pytree import tree_map

from distcl.config import DataConfig
from distcl.data.ids import checked_rows
from distcl.data.shards.decode import Decoder
from distcl.data.shards.experiences import Groups
from distcl.data.shards.index import (
    CHANGED,
    CRC_MASK,
    changed_rows,
    labels_in,
    marked,
    open_index,
    sample_place,
)
from distcl.data.shards.manifest import MANIFEST, Shard, read_shards
from distcl.data.shards.tar import read_members
from distcl.data.sources.arrays import stratified
from distcl.data.sources.npy import Array
from distcl.data.transforms import Sample, Stack, Transforms
from distcl.errors import DataError
from distcl.types import Batch, Ids, PyTree, SourceInfo

_MOST_OPEN = 64
_MOST_TOLD = 20

log = logging.getLogger("distcl")


_Place = tuple[int, int, int, int, int, int]
"""(id, number of the shard, row in it, first byte, end, word of the index)."""


class ShardSource:
    """A source over one split of a folder of indexed shards; ids are 0 … N-1 in shard order.

    Reads are sorted by shard and offset, one per different sample, and decoded in the process that
    calls ``read``. x is one tensor [B, ...] or, for samples of several arrays, a dict of them by
    ext (NAME for NAME.npy), with the types of :class:`data.sources.arrays.ArraySource`; y is int64
    [B]. An index costs 16 bytes a sample, memory-mapped.

    ``usable``: bool [N], False for samples known to be bad; None if all are sound. With
    ``data.on_bad_sample = "skip"``, a sample that turns out bad in ``read`` is replaced by the next
    sound one, and ``Batch.ids`` has that one's id. Otherwise DataError names shard,
    member and id.
    """

    sequential = False
    """Whether reading far from where one is costs much more than reading on."""

    def __init__(
        self, folder: Path, shards: Sequence[Shard], data: DataConfig, name: str = "shards"
    ) -> None:
        self.name = name
        self.groups: Groups | None = None
        """The concept of each sample by row; None: no restriction."""
        self.class_names: list[str] = []
        """Names of the classes by label, from ``shards.json``; empty: not known."""
        self.shards = list(shards)
        self.live_seconds = 0.0
        """How long to wait for more shards at the end; 0: there will be no more."""
        self._folder = folder
        self._data = data
        self._decode = Decoder(Transforms(data.transforms))
        self._stack = Stack(name)
        self._files = _Files(folder)
        self._firsts = np.array([s.first_id for s in shards] + [sum(s.samples for s in shards)])
        self._rows: Ids | None = None  # row of the split for each id; None: the same
        self._empty: tuple[PyTree, PyTree] | None = None
        self.problems: list[str] = []
        """What is known to be bad, in words; filled by opening, with ``on_bad_sample = "skip"``."""
        self._share = len(shards)
        self._indexes: list[Array | None] = [self._open(folder, shard) for shard in shards]
        if len(self.problems) >= len(shards) and not any(i is not None for i in self._indexes):
            raise DataError(f"{name}: there are no samples; {self.problems[0]}")
        if self.problems:
            log.info("[bad samples] left out: %s", "; ".join(self.problems[:_MOST_TOLD]))

    def _open(self, folder: Path, shard: Shard) -> Array | None:
        """Return a shard's index, None if the shard cannot be used."""
        try:
            index = open_index(folder / shard.name, shard.samples, shard.bytes)
            changed = changed_rows(folder / shard.name, index, self._share)
        except DataError as error:
            last = shard.first_id + max(shard.samples - 1, 0)
            fault = f"{error} (ids {shard.first_id}…{last})"
            if self._data.on_bad_sample == "error":
                raise DataError(fault) from None
            self.problems.append(fault)
            return None
        bad = np.flatnonzero(labels_in(index) < 0).tolist()
        for row in sorted({*bad, *changed}):
            extent = self._files.read(shard.name, int(index[0, row]), int(index[0, row + 1]))
            fault = CHANGED if row in changed else marked(extent)
            fault = f"{sample_place(shard, extent, row)}: {fault}"
            if self._data.on_bad_sample == "error":
                raise DataError(fault)
            self.problems.append(fault)
        if changed:
            index = np.array(index)
            index[1, changed] |= -1 << 32
        return index

    def __len__(self) -> int:
        return self._total if self._rows is None else len(self._rows)

    @property
    def labels(self) -> Ids:
        """Labels, int64 [N]; 0 for samples that are not usable."""
        column = self._column()
        return np.maximum(column, 0, out=column)

    @property
    def classes(self) -> int:
        """0: labels tell."""
        return 0

    @property
    def usable(self) -> np.ndarray[Any, np.dtype[np.bool_]] | None:
        """Which samples can be used, bool [N]; None: all."""
        return self._column() >= 0 if self.problems else None

    def shards_of(self, ids: Ids) -> tuple[Ids, int]:
        """Return the number of each one's shard [B] within the split, and how many there are."""
        rows = ids if self._rows is None else self._rows[ids]
        return np.searchsorted(self._firsts, rows, side="right") - 1, len(self.shards)

    @property
    def replaces(self) -> bool:
        """Whether ``read`` may put another sample in the place of a bad one."""
        return self._data.on_bad_sample == "skip"

    @property
    def info(self) -> SourceInfo:
        """See :class:`distcl.types.SourceInfo`."""
        return SourceInfo(
            self.name,
            lambda: self.labels,
            self.classes,
            self.class_names,
            lambda: self.usable,
            self.groups,
            self.sequential,
            self.live_seconds,
            self.replaces,
            transformed=True,
        )

    def _column(self) -> Ids:
        labels = np.full(self._total, -1)
        for begin, end, index in zip(self._firsts, self._firsts[1:], self._indexes, strict=False):
            if index is not None:
                labels[begin:end] = labels_in(index)
        return labels if self._rows is None else labels[self._rows]

    def holdout(self, fraction: float) -> tuple[ShardSource, ShardSource]:
        """Split into (train, test), as :meth:`data.sources.arrays.ArraySource.holdout` does."""
        labels = self._column() + 1  # bad ones are a class of their own
        train, test = stratified(labels, fraction, self.name)
        return self._restrict(train), self._restrict(test)

    def _restrict(self, ids: Ids) -> ShardSource:
        part = copy.copy(self)
        part._rows = ids if self._rows is None else self._rows[ids]
        part.groups = None if self.groups is None else self.groups[ids]
        return part

    def arrived(self) -> int:
        """Return how many samples ``shards.json`` has by now that this source has not. Local."""
        split = self.shards[0].split
        return sum(s.samples for s in read_shards(self._folder).split(split)) - self._total

    def grow(self, more: int) -> int:
        """Take in whole shards that have arrived, ``more`` samples of them; return len before.

        Local. New ids follow the old ones. Raises DataError if ``shards.json`` does not go on from
        where it was, or (when it lies on another machine's disk) does not show them in a minute.
        """
        before, total, known = len(self), self._total + more, len(self.shards)
        found = read_shards(self._folder).split(self.shards[0].split)
        for _ in range(60):
            if sum(s.samples for s in found) >= total:
                break
            time.sleep(1)
            found = read_shards(self._folder).split(self.shards[0].split)
        while sum(s.samples for s in found) > total:  # what came after others looked
            found.pop()
        if found[:known] != self.shards or sum(s.samples for s in found) != total:
            raise DataError(f"{self.name}: {MANIFEST} does not go on from where it was")
        if self._rows is not None:
            self._rows = np.concatenate([self._rows, np.arange(total - more, total)])
        self._indexes = [*self._indexes, *(self._open(self._folder, s) for s in found[known:])]
        self.shards = found
        self._firsts = np.array([s.first_id for s in found] + [total])
        return before

    @property
    def _total(self) -> int:
        return int(self._firsts[-1])

    def read(self, ids: Ids) -> Batch:
        """Read samples by id, in the order asked. Local. Raises DataError naming a bad sample."""
        ids = checked_rows(ids, len(self), self.name)
        if len(ids) == 0:
            if self._empty is None:
                one = self.read(self._first_usable())
                self._empty = tree_map(lambda t: t[:0], (one.x, one.y))
            return Batch(torch.from_numpy(ids), *self._empty)
        unique, back = np.unique(ids, return_inverse=True)
        found = [self._sample(*place) for place in self._places(unique)]
        got = np.array([i for i, _ in found])
        x, y = self._stack([sample for _, sample in found], got)
        if len(unique) < len(ids) or (np.diff(ids) < 0).any():
            order = torch.from_numpy(back)
            x, y = tree_map(lambda t: t.index_select(0, order), (x, y))
            got = got[back]
        return Batch(torch.from_numpy(got), x, y, len(ids))

    def _first_usable(self) -> Ids:
        usable = self.usable
        return np.zeros(1, np.int64) if usable is None else np.flatnonzero(usable)[:1]

    def _places(self, ids: Ids) -> list[_Place]:
        """Return where the samples lie."""
        rows = ids if self._rows is None else self._rows[ids]
        numbers = np.searchsorted(self._firsts, rows, side="right") - 1
        rows = rows - self._firsts[numbers]
        places: list[_Place] = []
        for number in np.unique(numbers).tolist():
            here = numbers == number
            found, index = rows[here], self._indexes[number]
            if index is None:
                bounds = np.zeros((3, len(found)), dtype=np.int64)
            else:
                bounds = np.stack([index[0, found], index[0, found + 1], index[1, found]])
            columns = (ids[here].tolist(), found.tolist(), *bounds.tolist())
            places += [(i, number, *rest) for i, *rest in zip(*columns, strict=True)]
        return places

    def _sample(self, id_: int, *place: int) -> tuple[int, Sample]:
        """Return (id, decoded sample): of another id where the one asked is bad and may be."""
        try:
            return id_, self._decoded(id_, *place)
        except DataError:
            if self._data.on_bad_sample == "error":
                raise
        for step in range(1, len(self)):
            other = (id_ + step) % len(self)
            try:
                return other, self._decoded(*self._places(np.array([other]))[0])
            except DataError:
                continue
        raise DataError(f"{self.name}: not one sample can be read")

    def _decoded(self, id_: int, number: int, row: int, begin: int, end: int, word: int) -> Sample:
        """Return a sample's arrays by ext, and its label; DataError names shard, member and id."""
        extent = self._extent(id_, number, begin, end)
        try:
            if self._data.verify and zlib.crc32(extent) != word & CRC_MASK:
                raise DataError(CHANGED)
            key, members = read_members(extent)
            if word < 0:
                raise DataError(marked(extent))
            return self._decode(key, id_, word >> 32, members)
        except DataError as error:
            raise DataError(f"{sample_place(self.shards[number], extent, row)}: {error}") from error

    def _extent(self, id_: int, number: int, begin: int, end: int) -> bytes:
        name = self.shards[number].name
        if self._indexes[number] is None:
            raise DataError(f"shard '{name}', id {id_}: the shard cannot be used")
        return self._files.read(name, begin, end)

    def extents(self, ids: Ids) -> Iterator[bytes]:
        """Yield the bytes of samples in their archives, in order of id. Local.

        Raises DataError naming a shard that cannot be read.
        """
        for id_, number, _, begin, end, _ in self._places(np.unique(ids)):
            yield self._extent(id_, number, begin, end)


class _Files:
    """Open archives of a folder, the most recently used ones; good in forked processes too."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._open: OrderedDict[str, int] = OrderedDict()

    def read(self, name: str, begin: int, end: int) -> bytes:
        """Return bytes begin … end of an archive. Raises DataError naming it if it is cut short."""
        file = self._open.get(name)
        if file is None:
            file = self._add(name)
        else:
            self._open.move_to_end(name)
        data = os.pread(file, end - begin, begin)
        while len(data) < end - begin:
            more = os.pread(file, end - begin - len(data), begin + len(data))
            if not more:
                raise DataError(f"shard '{name}' is truncated: it ends before byte {end}")
            data += more
        return data

    def _add(self, name: str) -> int:
        try:
            file = os.open(self._folder / name, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            raise DataError(f"shard '{name}' is missing from '{self._folder}'") from None
        except OSError as error:
            raise DataError(f"shard '{name}' cannot be read: {error.strerror}") from error
        self._open[name] = file
        if len(self._open) > _MOST_OPEN:
            os.close(self._open.popitem(last=False)[1])
        return file

    def __getstate__(self) -> Path:
        return self._folder

    def __setstate__(self, folder: Path) -> None:
        self.__init__(folder)  # type: ignore[misc]

    def __del__(self) -> None:
        for file in self._open.values():
            os.close(file)
