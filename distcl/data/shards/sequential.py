"""Shards read from front to back: for storage that cannot be read at random, or has no index."""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import shlex
from collections import OrderedDict
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import numpy as np

from distcl.config import DataConfig
from distcl.data.shards.decode import decode_sample, label_of
from distcl.data.shards.index import index_path, labels_in, place_of
from distcl.data.shards.indexed import ShardSource
from distcl.data.shards.manifest import MANIFEST, Shard, Texts
from distcl.data.shards.tar import BLOCK, Extent, Forwards, Member, grouped, open_archive, walk
from distcl.data.shards.texts import decode_tokens
from distcl.data.sources.npy import open_npy
from distcl.data.transforms import Sample
from distcl.errors import ConfigError, DataError
from distcl.types import Ids, SourceInfo

_MOST_OPEN = 64
_PACKED: dict[bytes, Callable[[Any], Any]] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ": lzma.open,
}


class StreamedSource(ShardSource):
    """A source over one split of a folder of shards that are only ever read forwards.

    ``read`` is cheap for ids that ascend within a shard, or that lie at most
    ``data.shuffle_buffer`` samples back: that many raw samples of each open shard are kept. Going
    further back opens the shard again. Samples that are passed over are not decoded.

    ``url``: where a shard is, see :func:`open_url`; empty: a file of ``folder``.
    """

    def __init__(
        self,
        folder: Path,
        shards: Sequence[Shard],
        data: DataConfig,
        label: str,
        url: str,
        name: str,
        texts: Texts | None = None,
    ) -> None:
        self._label = label
        self._url = url
        super().__init__(folder, shards, data, name, texts)
        self._cursors: list[_Cursor] = []  # the last one used is last
        self._process = os.getpid()  # whose they are

    def _open(self, shard: Shard) -> None:
        """Look at a local shard if it was indexed, where what is wrong with it ends the run."""
        tar = self._folder / shard.name
        there = not self._url and index_path(tar).exists() and tar.exists()
        if there and not self.replaces and not is_compressed(tar):
            super()._open(shard)

    @property
    def info(self) -> SourceInfo:
        """Labels and faults are known by reading only; classes, if ``shards.json`` has them all."""
        info, known = super().info, [shard.classes for shard in self.shards]
        classes = info.classes or (max(known) if all(known) else 0)
        return replace(info, labels=None, usable=None, classes=classes, sequential=True)

    def column(self) -> Ids:
        """See ShardSource: there must be indexes all the same. Raises ConfigError, DataError."""
        found = []
        for shard in self.shards:
            path = index_path(self._folder / shard.name)
            if not path.exists():
                raise ConfigError(
                    f"{self.name}: domains are known by the index, and there is no '{path}'; "
                    "stream.options.experiences = 'shards' does without"
                )
            index = open_npy(path)
            if index.dtype != np.dtype("<i8") or index.shape != (2, shard.samples + 1):
                raise DataError(f"'{path}' is damaged, or of another number of samples")
            found.append(labels_in(index))
        return np.concatenate(found)

    def holdout(self, fraction: float) -> tuple[ShardSource, ShardSource]:
        """Refuse it: what to hold out cannot be chosen without an index."""
        raise DataError(
            f"{self.name}: there are no test shards, and data.access = 'stream' cannot hold out "
            "samples of others"
        )

    def extents(self, ids: Ids) -> Iterator[bytes]:
        """Refuse it: experiences by key or time need an index."""
        raise ConfigError(
            "stream.experiences (or stream.options.experiences) by key or time needs indexed "
            "access (data.access)"
        )

    def _decoded(self, id_: int, number: int, row: int) -> Sample:
        shard = self.shards[number]
        extent = self._cursor(number, row).get(row)
        try:
            if extent.fault:
                raise DataError(extent.fault)
            label = label_of(extent.members, self._label)
            if 0 < shard.classes <= label:
                most = shard.classes - 1
                raise DataError(f"its label is {label}, but {MANIFEST} says at most {most}")
            if self._texts is not None:
                return decode_tokens(extent.members, label, self._texts)
            return decode_sample(extent.members, label, self._transforms, extent.key, id_)
        except DataError as error:
            raise DataError(f"{place_of(shard.name, extent.key, id_)}: {error}") from error

    def _cursor(self, number: int, row: int) -> _Cursor:
        """Return the cursor of a shard that reaches a row soonest; it becomes the last one used."""
        if self._process != os.getpid():  # a fork shares the places in files with its parent
            self._cursors, self._process = [], os.getpid()
        best = min(
            (c for c in reversed(self._cursors) if c.number == number and c.reaches(row)),
            key=lambda cursor: max(row - cursor.following, -1),
            default=None,
        )
        if best is None:
            best = _Cursor(number, self.shards[number], self._opened, self._data.shuffle_buffer)
            if len(self._cursors) >= _MOST_OPEN:
                self._cursors.pop(0).close()
        elif best is self._cursors[-1]:
            return best
        else:
            self._cursors.remove(best)
        self._cursors.append(best)
        return best

    def _opened(self, name: str) -> IO[bytes]:
        return open_url(self._url, name) if self._url else open_archive(self._folder / name)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_cursors": []}


class _Cursor:
    """A place in a shard that moves forwards, and the raw samples of the last ``keep`` rows."""

    def __init__(
        self, number: int, shard: Shard, open_: Callable[[str], IO[bytes]], keep: int
    ) -> None:
        self.number = number
        self.following = 0
        """The row that is read next."""
        self._shard = shard
        self._keep = keep
        self._fault = ""  # why nothing can be read from ``following`` on
        self._kept: OrderedDict[int, Extent] = OrderedDict()
        self._samples = stream_samples(lambda: open_(shard.name), shard.name)

    def close(self) -> None:
        """Close the stream."""
        self._samples.close()

    def reaches(self, row: int) -> bool:
        """Return whether a row's sample is kept, or ahead."""
        return row in self._kept or row >= self.following

    def get(self, row: int) -> Extent:
        """Return the sample of a row that is kept or ahead. DataError names shard and id."""
        while self.following <= row:
            self._advance()
        return self._kept[row]

    def _advance(self) -> None:
        name, samples = self._shard.name, self._shard.samples
        try:
            found = None if self._fault else next(self._samples, None)
            if self.following + 1 == samples and next(self._samples, None) is not None:
                found, self._fault = None, f"shard '{name}' has more samples than {MANIFEST} says"
        except DataError as error:
            found, self._fault = None, str(error)
        if found is None:
            self._fault = self._fault or (
                f"shard '{name}' has {self.following} samples but {MANIFEST} says {samples}"
            )
            raise DataError(f"{self._fault} (id {self._shard.first_id + self.following})")
        self._kept[self.following] = found
        self.following += 1
        if len(self._kept) > self._keep + 1:
            self._kept.popitem(last=False)


def is_compressed(tar: Path) -> bool:
    """Tell whether a local archive is compressed in a way that can be streamed."""
    with open_archive(tar) as file:
        return file.read(8).startswith(tuple(_PACKED))


def open_url(url: str, name: str) -> IO[bytes]:
    """Open the shard ``name`` at ``url``, in which ``{name}`` stands for it. Local.

    What exists as a local file is that file. Else it is what the webdataset library opens, which
    runs commands for it: that of ``pipe:COMMAND``, by a shell; curl or gsutil for http, gs and the
    like. Raises DataError naming it, ConfigError if the library is not installed.
    """
    where = os.path.expanduser(url).replace("{name}", name)
    if os.path.lexists(where) or ":" not in where:
        return open_archive(Path(where))
    if shlex.quote(name) != name or name.startswith("-"):
        raise DataError(f"the name of shard '{name}' is refused in a URL: a shell would read it")
    try:
        import webdataset
    except ImportError:
        raise ConfigError(
            "stream.options.url needs webdataset: pip install 'distcl[data]'"
        ) from None
    try:
        file: IO[bytes] = webdataset.gopen(where)
    except (OSError, ValueError) as error:
        raise DataError(f"'{where}' cannot be opened ({error})") from error
    return file


def stream_samples(open_: Callable[[], IO[bytes]], name: str) -> Generator[Extent, None, None]:
    """Yield the samples of an archive that can only be read forwards. Local.

    It may be compressed by gzip, bzip2 or xz. Raises DataError naming the shard if it is truncated,
    fails midway or goes on after its end mark.
    """
    yield from grouped(_members(open_), f"shard '{name}'")


def _members(open_: Callable[[], IO[bytes]]) -> Iterator[Member]:
    file, ended = open_(), False
    try:
        head, archive = file.read(BLOCK), file
        for magic, opener in _PACKED.items():
            if head.startswith(magic):
                archive, head = opener(Forwards(file, head)), b""
        yield from walk(archive, head=head)
        ended = True
    except Exception:
        ended = not file.read(1)
        raise
    finally:  # if all of it was read, how its command ended is why
        with suppress(*() if ended else (OSError,)):
            file.close()
