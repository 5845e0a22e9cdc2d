"""Indexed WebDataset shards as a source: random reads by id, at the speed of the storage."""

from __future__ import annotations

import copy
import logging
import os
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils._pytree import tree_map

from distcl.config import DataConfig
from distcl.data.ids import checked_rows
from distcl.data.shards.decode import decode_sample
from distcl.data.shards.experiences import Fields
from distcl.data.shards.index import (
    changed_rows,
    indexed_members,
    labels_in,
    open_index,
    place_of,
)
from distcl.data.shards.manifest import MANIFEST, Shard, Texts, read_shards
from distcl.data.shards.tar import key_of, refused
from distcl.data.shards.texts import TokenStack, decode_tokens, info_of_texts
from distcl.data.sources.arrays import stratified
from distcl.data.sources.npy import Array
from distcl.data.transforms import Sample, Stack, Transforms, first_sound
from distcl.errors import DataError
from distcl.types import Batch, Ids, PyTree, SourceInfo

if TYPE_CHECKING:
    from distcl.data.shards.experiences import Groups

_MOST_OPEN = 64
_MOST_TOLD = 20

log = logging.getLogger("distcl")


class ShardSource:
    """A source over one split of a folder of indexed shards; ids are 0 … N-1 in shard order.

    Reads are sorted by shard and offset, one per different sample, and decoded in the process that
    calls ``read``. x is one tensor [B, ...] or, for samples of several arrays, a dict of them by
    ext (NAME for NAME.npy), with the types of :class:`data.sources.arrays.ArraySource`; y is int64
    [B]. An index costs 16 bytes a sample, memory-mapped.

    ``usable``: bool [N], False for samples known to be bad; None if all are sound. With
    ``data.on_bad_sample = "skip"``, a sample that turns out bad in ``read`` is replaced by the next
    sound one, and ``Batch.ids`` has that one's id. Otherwise DataError names shard,
    member and id. With ``texts`` batches are those of :class:`data.sources.tokens.TokenSource`.
    """

    def __init__(
        self,
        folder: Path,
        shards: Sequence[Shard],
        data: DataConfig,
        name: str = "shards",
        texts: Texts | None = None,
    ) -> None:
        self.name = name
        self.groups: Groups | None = None
        """The concept of each sample by row; None: no restriction."""
        self.group_names: list[str] = []
        """Names of the concepts; empty: they have none."""
        self.grouped = ""
        """The value of ``stream.experiences`` that the concepts are by."""
        self.class_names: list[str] = []
        """Names of the classes by label, from ``shards.json``; empty: not known."""
        self.shards = list(shards)
        self.live_seconds = 0.0
        """How long to wait for more shards at the end; 0: there will be no more."""
        self.replaces = data.on_bad_sample == "skip"
        """Whether ``read`` may put another sample in the place of a bad one."""
        self.problems: list[str] = []
        """What is known to be bad, in words; filled by opening, with ``on_bad_sample = "skip"``."""
        self._folder = folder
        self._data = data
        self._transforms = Transforms(data.transforms if texts is None else ())
        self._texts = texts
        self._stack = Stack(name) if texts is None else TokenStack(texts)
        self._archives = _Archives(folder)
        self._firsts = _firsts(shards)
        self._rows: Ids | None = None  # row of the split for each id; None: the same
        self._empty: tuple[PyTree, PyTree] | None = None
        self._indexes: list[Array | None] = [self._open(shard) for shard in shards]
        if len(self.problems) >= len(shards) and not any(i is not None for i in self._indexes):
            raise DataError(f"{name}: there are no samples; {self.problems[0]}")
        if self.problems:
            log.info("[bad samples] left out: %s", "; ".join(self.problems[:_MOST_TOLD]))

    def _open(self, shard: Shard) -> Array | None:
        """Return a shard's index, None if the shard cannot be used."""
        tar = self._folder / shard.name
        try:
            index = open_index(tar, shard.samples, shard.bytes)
            changed = changed_rows(tar, index, len(self.shards))
        except DataError as error:
            last = shard.first_id + max(shard.samples - 1, 0)
            fault = f"{error} (ids {shard.first_id}…{last})"
            if not self.replaces:
                raise DataError(fault) from None
            self.problems.append(fault)
            return None
        for row in sorted({*np.flatnonzero(labels_in(index) < 0).tolist(), *changed}):
            extent, word = self._archives.read(shard.name, index, row)
            try:
                indexed_members(extent, word, verify=row in changed)
            except DataError as error:
                where = place_of(shard.name, key_of(extent), shard.first_id + row)
                if not self.replaces:
                    raise DataError(f"{where}: {error}") from None
                self.problems.append(f"{where}: {error}")
        if changed:
            index = np.array(index)
            index[1, changed] |= -1 << 32
        return index

    def __len__(self) -> int:
        return int(self._firsts[-1]) if self._rows is None else len(self._rows)

    @property
    def usable(self) -> np.ndarray[Any, np.dtype[np.bool_]] | None:
        """Which samples can be used, bool [N]; None: all."""
        return self.column() >= 0 if self.problems else None

    @property
    def info(self) -> SourceInfo:
        """See :class:`distcl.types.SourceInfo`."""
        info = SourceInfo(
            self.name,
            labels=lambda: self.column().clip(0),
            class_names=self.class_names,
            usable=lambda: self.usable,
            groups=self.groups,
            group_names=self.group_names,
            grouped=self.grouped,
            columns=Fields(self),
            live_seconds=self.live_seconds,
            replaces=self.replaces,
            transformed=True,
        )
        return info if self._texts is None else info_of_texts(info, self._texts)

    def column(self) -> Ids:
        """Return what the index has as labels [N], -1 for samples that are not usable."""
        labels = np.full(int(self._firsts[-1]), -1)
        for begin, end, index in zip(self._firsts, self._firsts[1:], self._indexes, strict=False):
            if index is not None:
                labels[begin:end] = labels_in(index)
        return labels if self._rows is None else labels[self._rows]

    def shards_of(self, ids: Ids) -> tuple[Ids, int]:
        """Return the number of each one's shard [B] within the split, and how many there are."""
        rows = ids if self._rows is None else self._rows[ids]
        return np.searchsorted(self._firsts, rows, side="right") - 1, len(self.shards)

    def holdout(self, fraction: float) -> tuple[ShardSource, ShardSource]:
        """Split into (train, test), as :meth:`data.sources.arrays.ArraySource.holdout` does."""
        train, test = stratified(self.column() + 1, fraction, self.name)  # bad: a class of its own
        return self.part(train), self.part(test)

    def part(self, rows: Ids, info: SourceInfo | None = None) -> ShardSource:
        """Return a source of some of the samples, with the groups of ``info``, or its own."""
        part = copy.copy(self)
        part._rows = rows if self._rows is None else self._rows[rows]
        part.groups = None if self.groups is None else self.groups[rows]
        if info is not None:
            part.groups, part.grouped = info.groups, info.grouped
            part.group_names = list(info.group_names)
        return part

    def arrived(self) -> int:
        """Return how many samples ``shards.json`` has by now that this source has not. Local."""
        return int(_firsts(_listed(self._folder, self.shards))[-1] - self._firsts[-1])

    def grow(self, more: int) -> int:
        """Take in whole shards that have arrived, ``more`` samples of them; return len before.

        Local. New ids follow the old ones. Raises DataError if ``shards.json`` does not go on from
        where it was, or (when it lies on another machine's disk) does not show them in a minute.
        """
        before, known, total = len(self), len(self.shards), int(self._firsts[-1]) + more
        for _ in range(60):
            found = _listed(self._folder, self.shards)
            if _firsts(found)[-1] >= total:
                break
            time.sleep(1)
        while _firsts(found)[-1] > total:  # what came after others looked
            found.pop()
        if found[:known] != self.shards or _firsts(found)[-1] != total:
            raise DataError(f"{self.name}: {MANIFEST} does not go on from where it was")
        if self._rows is not None:
            self._rows = np.concatenate([self._rows, np.arange(total - more, total)])
        self._indexes = [*self._indexes, *map(self._open, found[known:])]
        self.shards = found
        self._firsts = _firsts(found)
        return before

    def read(self, ids: Ids) -> Batch:
        """Read samples by id, in the order asked. Local. Raises DataError naming a bad sample."""
        ids = checked_rows(ids, len(self), self.name)
        if len(ids) == 0:
            if self._empty is None and self._texts is not None:
                self._empty = self._stack([], ids)
            if self._empty is None:
                usable = self.usable
                first = np.zeros(1, np.int64) if usable is None else np.flatnonzero(usable)[:1]
                one = self.read(first)
                self._empty = tree_map(lambda t: t[:0], (one.x, one.y))
            return Batch(torch.from_numpy(ids), *self._empty)
        unique, back = np.unique(ids, return_inverse=True)
        places = {place[0]: place for place in self._places(unique)}

        def decoded(id_: int) -> Sample:
            return self._decoded(*(places.get(id_) or self._places(np.array([id_]))[0]))

        found = [first_sound(decoded, id_, len(self), self.replaces, self.name) for id_ in places]
        got = np.array([i for i, _ in found])
        x, y = self._stack([sample for _, sample in found], got)
        if len(unique) < len(ids) or (np.diff(ids) < 0).any():
            order = torch.from_numpy(back)
            x, y = tree_map(lambda t: t.index_select(0, order), (x, y))
            got = got[back]
        return Batch(torch.from_numpy(got), x, y, len(ids))

    def _places(self, ids: Ids) -> list[tuple[int, int, int]]:
        """Return each one's (id, number of its shard, row in it)."""
        rows = ids if self._rows is None else self._rows[ids]
        numbers = np.searchsorted(self._firsts, rows, side="right") - 1
        rows = rows - self._firsts[numbers]
        return list(zip(ids.tolist(), numbers.tolist(), rows.tolist(), strict=True))

    def _decoded(self, id_: int, number: int, row: int) -> Sample:
        """Return a sample's arrays by ext, and its label; DataError names shard, member and id."""
        shard = self.shards[number]
        extent, word = self._archives.read(shard.name, self._indexes[number], row)
        try:
            key, members = indexed_members(extent, word, self._data.verify)
            if self._texts is not None:
                return decode_tokens(members, word >> 32, self._texts)
            return decode_sample(members, word >> 32, self._transforms, key, id_)
        except DataError as error:
            where = place_of(shard.name, key_of(extent), shard.first_id + row)
            raise DataError(f"{where}: {error}") from error

    def extents(self, ids: Ids) -> Iterator[bytes]:
        """Yield the bytes of samples in their archives, in order of id. Local.

        Raises DataError naming a shard that cannot be read.
        """
        for _, number, row in self._places(np.unique(ids)):
            yield self._archives.read(self.shards[number].name, self._indexes[number], row)[0]


def _firsts(shards: Sequence[Shard]) -> Ids:
    """Return the first id of each shard, and the number of all samples."""
    return np.cumsum([0, *(shard.samples for shard in shards)])


def _listed(folder: Path, known: Sequence[Shard]) -> list[Shard]:
    """Return the shards that ``shards.json`` has by now of the split of those that are known."""
    return read_shards(folder).split(known[0].split)


class _Archives:
    """Open archives of a folder, the most recently used ones; good in forked processes too."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._open: OrderedDict[str, int] = OrderedDict()

    def read(self, name: str, index: Array | None, row: int) -> tuple[bytes, int]:
        """Return a sample's bytes and its word of the index. DataError names the archive."""
        if index is None:
            raise DataError(f"shard '{name}' cannot be used")
        (begin, end), (word, _) = index[:, row : row + 2].tolist()
        try:
            if name not in self._open:
                self._open[name] = os.open(self._folder / name, os.O_RDONLY | os.O_CLOEXEC)
                if len(self._open) > _MOST_OPEN:
                    os.close(self._open.popitem(last=False)[1])
            self._open.move_to_end(name)
            data = b""
            while len(data) < end - begin:
                more = os.pread(self._open[name], end - begin - len(data), begin + len(data))
                if not more:
                    raise DataError(f"shard '{name}' is truncated: it ends before byte {end}")
                data += more
        except OSError as error:
            raise refused(self._folder / name, error) from error
        return data, word

    def __reduce__(self) -> tuple[Any, ...]:
        return _Archives, (self._folder,)

    def __del__(self) -> None:
        for file in self._open.values():
            os.close(file)
