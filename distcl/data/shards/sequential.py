"""Shards read from front to back: for storage that cannot be read at random, or has no index."""

from __future__ import annotations

import itertools
import os
import tarfile
from collections import OrderedDict
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import numpy as np

from distcl.config import DataConfig
from distcl.data.shards.index import label_of
from distcl.data.shards.indexed import ShardSource
from distcl.data.shards.manifest import MANIFEST, Shard
from distcl.data.shards.tar import BLOCK, UnusualHeaderError, check_ext, parse_header, split_name
from distcl.data.transforms import Sample
from distcl.errors import ConfigError, DataError
from distcl.types import Ids

_MOST_OPEN = 64

Members = dict[str, bytes]
Member = tuple[str, bytes]
"""(name, data)."""
Samples = Generator[tuple[str, Members], None, None]
"""(key, members) of one after another."""


class StreamedSource(ShardSource):
    """A source over one split of a folder of shards that are only ever read forwards.

    ``read`` is cheap for ids that ascend within a shard, or that lie at most
    ``data.shuffle_buffer`` samples back: that many raw samples of each open shard are kept. Going
    further back opens the shard again. Samples that are passed over are not decoded.

    ``url``: where a shard is, ``{name}`` being its name: anything that the webdataset library
    opens, such as ``pipe:curl -s https://host/{name}``; empty: a file of ``folder``.
    """

    sequential = True

    def __init__(
        self,
        folder: Path,
        shards: Sequence[Shard],
        data: DataConfig,
        label: str,
        url: str,
        name: str,
    ) -> None:
        super().__init__(folder, shards, data, name)
        self._label = label
        self._url = url or str(folder / "{name}")
        self._cursors: list[_Cursor] = []  # the last one used is last
        self._process = os.getpid()  # whose they are

    def _open(self, folder: Path, shard: Shard) -> None:
        """No shard is opened before it is read, and none has an index."""

    @property
    def labels(self) -> Any:
        """None: labels are known by reading only."""
        return None

    @property
    def classes(self) -> int:
        """One more than the largest label, if ``shards.json`` says so of every shard; else 0."""
        known = [shard.classes for shard in self.shards]
        return max(known) if all(known) else 0

    @property
    def usable(self) -> None:
        """None: faults are known by reading only."""
        return None

    def holdout(self, fraction: float) -> tuple[ShardSource, ShardSource]:
        """Refuse it: what to hold out cannot be chosen without an index."""
        raise DataError(
            f"{self.name}: there are no test shards, and data.access = 'stream' cannot hold out "
            "samples of others"
        )

    def extents(self, ids: Ids) -> Iterator[bytes]:
        """Refuse it: experiences by key or time need an index."""
        raise ConfigError("stream.options.experiences by key or time needs indexed access")

    def _places(self, ids: Ids) -> list[Any]:
        numbers = np.searchsorted(self._firsts, ids, side="right") - 1
        rows = ids - self._firsts[numbers]
        return list(zip(ids.tolist(), numbers.tolist(), rows.tolist(), strict=True))

    def _decoded(self, id_: int, number: int, row: int, *_: int) -> Sample:
        shard = self.shards[number]
        key, members = self._cursor(number, row).get(row)
        try:
            for ext in members:
                check_ext(ext)
            label = label_of(members, self._label)
            if 0 < shard.classes <= label:
                most = shard.classes - 1
                raise DataError(f"its label is {label}, but {MANIFEST} says at most {most}")
            return self._decode(key, id_, label, members)
        except DataError as error:
            where = f"shard '{shard.name}', sample '{key}', id {id_}"
            raise DataError(f"{where}: {error}") from error

    def _cursor(self, number: int, row: int) -> _Cursor:
        """Return a cursor of a shard that is at a row or before it; the nearest there is."""
        if self._process != os.getpid():  # a fork shares the places in files with its parent
            self._cursors, self._process = [], os.getpid()
        best: _Cursor | None = None
        for cursor in reversed(self._cursors):  # the last one used comes first
            if cursor.number == number and cursor.holds(row):
                best = cursor
                break
            behind = cursor.number == number and cursor.following <= row
            if behind and (best is None or cursor.following > best.following):
                best = cursor
        if best is None:
            shard = self.shards[number]
            url = self._url.format(name=shard.name)
            best = _Cursor(number, shard, url, self._data.shuffle_buffer)
            if len(self._cursors) >= _MOST_OPEN:
                self._cursors.pop(0).close()
        elif best is not self._cursors[-1]:
            self._cursors.remove(best)
        if not self._cursors or best is not self._cursors[-1]:
            self._cursors.append(best)
        return best

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_cursors": []}


class _Cursor:
    """A place in a shard that moves forwards, and the raw samples of the last ``keep`` rows."""

    def __init__(self, number: int, shard: Shard, url: str, keep: int) -> None:
        self.number = number
        self.following = 0
        """The row that is read next."""
        self._shard = shard
        self._keep = keep
        self._fault = ""  # why nothing can be read from ``following`` on
        self._kept: OrderedDict[int, tuple[str, Members]] = OrderedDict()
        self._samples = stream_samples(lambda: open_url(url), shard.name)

    def close(self) -> None:
        """Close the stream."""
        self._samples.close()

    def holds(self, row: int) -> bool:
        """Return whether a row's sample is kept, or known to be out of reach."""
        return row in self._kept or (bool(self._fault) and row >= self.following)

    def get(self, row: int) -> tuple[str, Members]:
        """Return (key, members) of a row that is kept or ahead. DataError names shard and id."""
        while self.following <= row:
            self._advance()
        return self._kept[row]

    def _advance(self) -> None:
        try:
            found = None if self._fault else next(self._samples, None)
        except DataError as error:
            found, self._fault = None, str(error)
        if found is None:
            self._fault = self._fault or (
                f"shard '{self._shard.name}' has {self.following} samples but shards.json says "
                f"{self._shard.samples}"
            )
            raise DataError(f"{self._fault} (id {self._shard.first_id + self.following})")
        self._kept[self.following] = found
        self.following += 1
        if len(self._kept) > self._keep + 1:
            self._kept.popitem(last=False)


def open_url(url: str) -> IO[bytes]:
    """Open what the webdataset library can: a file, ``pipe:``, http, …. Raises DataError."""
    try:
        import webdataset
    except ImportError:
        raise ConfigError(
            "data.access = 'stream' needs webdataset: pip install 'distcl[data]'"
        ) from None
    try:
        file: IO[bytes] = webdataset.gopen(url)
    except (OSError, ValueError) as error:
        raise DataError(f"'{url}' cannot be opened ({error})") from error
    return file


def stream_samples(
    open_: Callable[[], IO[bytes]], name: str
) -> Generator[tuple[str, Members], None, None]:
    """Yield (key, members) of an archive that can only be read forwards. Local.

    Raises DataError naming the shard if it is truncated or fails midway.
    """
    done = 0
    try:
        try:
            with _opened(open_) as file:
                for sample in _grouped(_plain_members(file)):
                    done += 1
                    yield sample
        except UnusualHeaderError:
            with _opened(open_) as file:
                for sample in itertools.islice(_grouped(_any_members(file)), done, None):
                    done += 1
                    yield sample
    except (OSError, EOFError, tarfile.TarError, DataError) as error:
        raise DataError(f"shard '{name}', after {done} samples: {error}") from error


@contextmanager
def _opened(open_: Callable[[], IO[bytes]]) -> Iterator[IO[bytes]]:
    """Close the stream at the end; how its command ended matters only if all of it was read."""
    file = open_()
    try:
        yield file
    except BaseException:
        with suppress(OSError):
            file.close()
        raise
    file.close()


def _plain_members(file: IO[bytes]) -> Iterator[Member]:
    """Yield (name, data) of members with the usual headers; UnusualHeaderError at another one."""
    for number in itertools.count():
        header = file.read(BLOCK)
        if number == 0 and header[257:262] != b"ustar":
            raise UnusualHeaderError("an old tar, or a compressed one")
        if len(header) == BLOCK and not header.strip(b"\0"):
            return
        if len(header) < BLOCK:
            raise EOFError("it is truncated: the end mark is missing")
        name, size = parse_header(header)
        data = file.read(-(-size // BLOCK) * BLOCK)
        if len(data) < size:
            raise EOFError(f"member '{name}' is truncated: {len(data)} of {size} bytes are there")
        yield name, data[:size]


def _any_members(file: IO[bytes]) -> Iterator[Member]:
    with tarfile.open(fileobj=file, mode="r|*") as archive:
        for info in archive:
            member = archive.extractfile(info) if info.isreg() else None
            if member is not None:
                yield info.name, member.read()


def _grouped(members: Iterator[Member]) -> Iterator[tuple[str, Members]]:
    """Yield (key, members) of neighbouring members of one key."""
    key, sample = "", Members()
    for name, data in members:
        pieces = split_name(name)
        if pieces is None:
            continue
        if pieces[0] != key:
            if key:
                yield key, sample
            key, sample = pieces[0], Members()
        sample[pieces[1].lower()] = data
    if key:
        yield key, sample
