"""Writes shards: from any table of samples, by several processes, the same bytes every time.

The samples of a split are cut into ranges of ``per_shard``; each range is written on its own, as
one shard, or as several where ``max_bytes`` cuts it. So shards do not depend on the number of
processes, and a killed job goes on with the ranges it had not finished; so does one whose input was
repaired meanwhile, with those that lie in changed files too.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from distcl.config.files import file_digest, write_atomically
from distcl.data.shards.index import IndexBuilder, label_of, labels_in, open_index
from distcl.data.shards.manifest import (
    MANIFEST,
    Manifest,
    Shard,
    numbered,
    read_shards,
    write_manifest,
)
from distcl.data.shards.tar import END, member_bytes
from distcl.errors import DataError, UsageError

Members = dict[str, bytes]

_PLAN = "shards.plan.json"


class Samples(Protocol):
    """What can be written as shards: splits of numbered samples, each some members by ext."""

    label: str
    """The member that holds labels: cls or json:FIELD."""
    sizes: dict[str, int]
    """The number of samples of each split, train before test.

    It may have ``class_names``, the names of the labels 0, 1, …, and ``skipped``, a list of what it
    has that is no sample.
    """

    def read(self, split: str, begin: int, end: int) -> Iterator[Members]:
        """Yield the members of samples ``begin`` … ``end``. In any process; DataError if bad."""
        ...

    def describe(self) -> dict[str, Any]:
        """Return what tells this from another input, as JSON."""
        ...

    def stamp(self, split: str, begin: int, end: int) -> Any:
        """Return what tells whether the files of samples ``begin`` … ``end`` change, as JSON."""
        ...


@dataclass(frozen=True, slots=True)
class _Range:
    split: str
    number: int
    begin: int
    end: int

    @property
    def stem(self) -> str:
        """How the names of its shards begin."""
        return f"{self.split}-{self.number:06d}"


def write_shards(
    samples: Samples,
    folder: Path,
    per_shard: int = 10_000,
    max_bytes: int = 0,
    workers: int = 0,
    tell: Callable[[str, int], None] | None = None,
    problems: list[str] | None = None,
) -> Manifest:
    """Write shards, indexes and ``shards.json``, and return the manifest.

    ``per_shard``: samples of a shard; ``max_bytes``: a shard is closed before it grows beyond (a
    single larger sample aside), 0 for no limit; ``workers``: processes, 0 for this one;
    ``tell(shard, samples)`` is called after each range; ``problems``: if given, bad samples are
    left out, and named there. Files appear whole, the manifest last.

    If the folder has the unfinished work of the same job, it goes on there; UsageError if it has
    anything else. Raises DataError naming a bad sample, or if no sample is sound.
    """
    ranges = [
        _Range(split, number, begin, min(begin + per_shard, size))
        for split, size in samples.sizes.items()
        for number, begin in enumerate(range(0, size, per_shard))
    ]
    plan = {
        "samples": samples.describe(),
        "per_shard": per_shard,
        "max_bytes": max_bytes,
        "ranges": {part.stem: _digest(samples, part) for part in ranges},
    }
    _claim(folder, plan)
    done: dict[int, list[Shard]] = {}

    def finish(k: int, shards: list[Shard]) -> None:
        done[k] = shards
        if tell is not None:
            tell(ranges[k].stem, ranges[k].end - ranges[k].begin)

    for k, part in enumerate(ranges):
        if found := _finished(folder, part):
            finish(k, found)
    todo = [k for k in range(len(ranges)) if k not in done]
    job = _Job(samples, folder, ranges, max_bytes, problems is not None)
    for k, shards, found_bad in job.in_processes(todo, workers):
        finish(k, shards)
        if problems is not None:
            problems += found_bad
    whole = [shard for k in range(len(ranges)) for shard in done[k]]
    names = getattr(samples, "class_names", ())
    manifest = _manifest(samples.label, whole, names, problems)
    write_manifest(folder, manifest)
    (folder / _PLAN).unlink()
    return manifest


def _manifest(
    label: str, shards: list[Shard], names: Sequence[str], problems: list[str] | None
) -> Manifest:
    if not shards and problems:
        raise DataError(f"not one sample is sound; {problems[0]}")
    return numbered(label, shards, names)


def append_shards(
    samples: Samples,
    folder: Path,
    per_shard: int = 10_000,
    max_bytes: int = 0,
    tell: Callable[[str, int], None] | None = None,
    problems: list[str] | None = None,
) -> Manifest:
    """Add shards to a folder of shards; those who watch it see each one when it is whole.

    Arguments and errors as of :func:`write_shards`. After a kill the shards listed in
    ``shards.json`` are whole, and what was not listed is written over by the next addition.
    """
    manifest = read_shards(folder)
    if manifest.label != samples.label:
        raise DataError(f"'{folder}' has labels in '{manifest.label}', not '{samples.label}'")
    old, new = manifest.class_names, list(getattr(samples, "class_names", ()))
    if old and new and old != new:
        raise DataError(
            f"'{folder}' has the classes {', '.join(old)}, but what is to be added has "
            f"{', '.join(new)}: labels would mean other classes"
        )
    for split, size in samples.sizes.items():
        for begin in range(0, size, per_shard):
            number = len(manifest.split(split))
            while any(s.name.startswith(f"{split}-{number:06d}") for s in manifest.shards):
                number += 1
            part = _Range(split, number, begin, min(begin + per_shard, size))
            found, bad = _Job(samples, folder, [part], max_bytes, problems is not None).write(0)
            if problems is not None:
                problems += bad
            manifest = _manifest(manifest.label, [*manifest.shards, *found], old, problems)
            write_manifest(folder, manifest)
            if tell is not None:
                tell(part.stem, part.end - part.begin)
    return manifest


@dataclass(frozen=True, slots=True)
class _Job:
    """What is written where. ``skip``: whether bad samples are left out."""

    samples: Samples
    folder: Path
    ranges: list[_Range]
    max_bytes: int
    skip: bool

    def in_processes(
        self, todo: list[int], workers: int
    ) -> Iterator[tuple[int, list[Shard], list[str]]]:
        """Write the ranges ``todo``; yield (number, its shards, its bad samples) of each."""
        if workers == 0 or len(todo) < 2:
            yield from ((k, *self.write(k)) for k in todo)
            return
        pool = ProcessPoolExecutor(
            min(workers, len(todo)),
            multiprocessing.get_context("fork"),  # workers inherit the samples, whatever they are
            _set_job,
            (self,),
        )
        try:
            futures = {pool.submit(_write_number, k): k for k in todo}
            for future in as_completed(futures):
                yield (futures[future], *future.result())
        except BrokenProcessPool:
            raise DataError(
                "a writing process was killed; the same command goes on from here"
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)

    def write(self, k: int) -> tuple[list[Shard], list[str]]:
        """Write a range as one shard, or as many as ``max_bytes`` asks for; and what was bad."""
        part, shards, problems = self.ranges[k], list[Shard](), list[str]()
        writer: _ShardWriter | None = None
        try:
            for found in self._extents(part):
                if isinstance(found, DataError):
                    if not self.skip:
                        raise found
                    problems.append(str(found))
                    continue
                extent, label = found
                full = writer is not None and writer.size + len(extent) + len(END) > self.max_bytes
                if writer is not None and full and self.max_bytes:
                    shards.append(writer.close())
                    writer = None
                if writer is None:
                    more = f"-{len(shards):03d}" if self.max_bytes else ""
                    writer = _ShardWriter(self.folder / f"{part.stem}{more}.tar", part.split)
                writer.add(extent, label)
            if writer is not None:
                shards.append(writer.close())
                writer = None
        except OSError as error:
            raise DataError(
                f"'{error.filename or self.folder}': {error.strerror or error}"
            ) from error
        finally:
            if writer is not None:
                writer.discard()
        return shards, problems

    def _extents(self, part: _Range) -> Iterator[tuple[bytes, int] | DataError]:
        """Yield of each row its bytes in the archive and its label, or what is wrong.

        Who reads in batches fails before the bad sample: it is found by reading one at a time.
        """
        row, single = part.begin, False
        while row < part.end:
            end = row + 1 if single else part.end
            try:
                for found in self.samples.read(part.split, row, end):
                    try:
                        yield _extent(f"{row:09d}", found, self.samples.label)
                    except DataError as error:
                        yield _located(part, row, error)
                    row += 1
                if row < end:
                    raise DataError("the input ended before it")
            except DataError as error:
                if single or not self.skip:
                    yield _located(part, row, error)
                    row, single = row + 1, False
                else:
                    single = True


def _located(part: _Range, row: int, error: DataError) -> DataError:
    return DataError(f"sample {row} of {part.split}: {error}")


def _digest(samples: Samples, part: _Range) -> str:
    stamp = json.dumps(samples.stamp(part.split, part.begin, part.end))
    return hashlib.sha256(stamp.encode()).hexdigest()


_job: _Job | None = None  # of this worker process


def _set_job(job: _Job) -> None:
    global _job
    _job = job


def _write_number(k: int) -> tuple[list[Shard], list[str]]:
    assert _job is not None
    return _job.write(k)


def _claim(folder: Path, plan: dict[str, Any]) -> None:
    """Make the folder ours, or find that it was: it holds our plan and no manifest.

    What was written of files that have changed since goes.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / MANIFEST).exists():
            raise UsageError(f"'{folder}' has {MANIFEST}: it is complete; choose another folder")
        if (folder / _PLAN).exists():
            before = json.loads((folder / _PLAN).read_text(encoding="utf-8"))
            known = before.pop("ranges")
            if before != json.loads(json.dumps({k: v for k, v in plan.items() if k != "ranges"})):
                raise UsageError(
                    f"'{folder}' has unfinished shards of another input or other options "
                    f"({_PLAN}); delete it or choose another folder"
                )
            for part in folder.glob(".*.[0-9]*"):
                part.unlink()
            for stem in known:
                if known[stem] != plan["ranges"].get(stem):
                    for path in folder.glob(f"{stem}*"):
                        path.unlink()
        elif any(folder.iterdir()):
            raise UsageError(f"'{folder}' is not empty; choose another folder")
        text = json.dumps(plan, indent=1, sort_keys=True) + "\n"
        write_atomically(folder / _PLAN, text, sync=True)
    except OSError as error:
        raise UsageError(f"'{folder}' is not writable: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"'{folder / _PLAN}' is damaged ({error}); delete '{folder}'") from error


def _finished(folder: Path, part: _Range) -> list[Shard]:
    """Return the shards of a range if all are there, sound by size, else none."""
    shards = []
    for path in sorted(folder.glob(f"{part.stem}*.index.npy")):
        tar = path.with_name(path.name.removesuffix(".index.npy") + ".tar")
        try:
            samples = int(np.load(path, allow_pickle=False).shape[1]) - 1
            size = tar.stat().st_size
            classes = 1 + int(labels_in(open_index(tar, samples, size)).max())
        except (DataError, OSError, ValueError):
            return []
        digest = file_digest(tar)
        shards.append(Shard(tar.name, part.split, samples, size, digest, 0, classes))
    return shards if sum(s.samples for s in shards) == part.end - part.begin else []


def _extent(key: str, members: Members, label: str) -> tuple[bytes, int]:
    """Return a sample's bytes in its archive, and its label."""
    extent = b"".join(member_bytes(f"{key}.{ext}", members[ext]) for ext in sorted(members))
    return extent, label_of(members, label)


class _ShardWriter:
    """One shard in the making; it has its name only when it is complete."""

    def __init__(self, tar: Path, split: str) -> None:
        self._tar = tar
        self._split = split
        self._part = tar.with_name(f".{tar.name}.{os.getpid()}")
        self._file = self._part.open("wb")
        self._digest = hashlib.sha256()
        self._index = IndexBuilder()
        self.size = 0

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._digest.update(data)
        self.size += len(data)

    def add(self, extent: bytes, label: int) -> None:
        """Append a sample."""
        self._index.add(self.size, extent, label)
        self._write(extent)

    def close(self) -> Shard:
        """Finish the archive, give it its name, and write its index after it."""
        self._write(END)
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._part.replace(self._tar)
        self._index.write(self._tar, self._tar.stat())
        name, digest, index = self._tar.name, self._digest.hexdigest(), self._index
        return Shard(name, self._split, len(index), self.size, digest, 0, index.classes)

    def discard(self) -> None:
        """Remove what is not complete."""
        self._file.close()
        self._part.unlink(missing_ok=True)
