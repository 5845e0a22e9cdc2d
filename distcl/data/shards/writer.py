"""Writes shards: from any table of samples, by several processes, the same bytes every time.

The samples of a split are cut into ranges of ``per_shard``; each range is written on its own, as
one shard, or as several where ``max_bytes`` cuts it. So shards do not depend on the number of
processes, and a killed job goes on with the ranges it had not finished.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from distcl.data.shards.index import IndexBuilder, file_digest, label_of, labels_in, open_index
from distcl.data.shards.manifest import (
    MANIFEST,
    Manifest,
    Shard,
    numbered,
    read_manifest,
    replace_file,
    write_manifest,
)
from distcl.data.shards.tar import END, member_bytes
from distcl.errors import DataError, DistclError, UsageError

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


@dataclass(frozen=True, slots=True)
class _Range:
    split: str
    number: int
    begin: int
    end: int


def write_shards(
    samples: Samples,
    folder: Path,
    per_shard: int = 10_000,
    max_bytes: int = 0,
    workers: int = 0,
    tell: Callable[[str, int], None] | None = None,
) -> Manifest:
    """Write shards, indexes and ``shards.json``, and return the manifest.

    ``per_shard``: samples of a shard; ``max_bytes``: a shard is closed before it grows beyond (a
    single larger sample aside), 0 for no limit; ``workers``: processes, 0 for this one;
    ``tell(shard, samples)`` is called after each range. Files appear whole, the manifest last.

    If the folder has the unfinished work of the same job, it goes on there; UsageError if it has
    anything else. Raises DataError naming a bad sample.
    """
    plan = {
        "samples": samples.describe(),
        "sizes": samples.sizes,
        "per_shard": per_shard,
        "max_bytes": max_bytes,
    }
    _claim(folder, plan)
    ranges = [
        _Range(split, number, begin, min(begin + per_shard, size))
        for split, size in samples.sizes.items()
        for number, begin in enumerate(range(0, size, per_shard))
    ]
    done: dict[int, list[Shard]] = {}
    for k, part in enumerate(ranges):
        found = _finished(folder, part)
        if found:
            done[k] = found
            if tell is not None:
                tell(found[0].name, part.end - part.begin)
    todo = [k for k in range(len(ranges)) if k not in done]

    def finish(k: int, shards: list[Shard]) -> None:
        done[k] = shards
        if tell is not None:
            tell(shards[0].name, ranges[k].end - ranges[k].begin)

    if workers == 0 or len(todo) < 2:
        for k in todo:
            finish(k, _write_range(samples, folder, ranges[k], max_bytes))
    else:
        _write_all(samples, folder, ranges, todo, max_bytes, min(workers, len(todo)), finish)
    shards = [shard for k in range(len(ranges)) for shard in done[k]]
    manifest = numbered(samples.label, shards, getattr(samples, "class_names", ()))
    write_manifest(folder, manifest)
    (folder / _PLAN).unlink()
    return manifest


def append_shards(
    samples: Samples,
    folder: Path,
    per_shard: int = 10_000,
    max_bytes: int = 0,
    tell: Callable[[str, int], None] | None = None,
) -> Manifest:
    """Add shards to a folder of shards; those who watch it see each one when it is whole.

    Arguments and errors as of :func:`write_shards`. After a kill the shards listed in
    ``shards.json`` are whole, and what was not listed is written over by the next addition.
    """
    manifest = read_manifest(folder)
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
            found = _write_range(samples, folder, part, max_bytes)
            manifest = numbered(manifest.label, [*manifest.shards, *found], old)
            write_manifest(folder, manifest)
            if tell is not None:
                tell(found[0].name, part.end - part.begin)
    return manifest


_job: tuple[Samples, Path, list[_Range], int] | None = None  # of this worker process


def _write_all(
    samples: Samples,
    folder: Path,
    ranges: list[_Range],
    todo: list[int],
    max_bytes: int,
    workers: int,
    finish: Callable[[int, list[Shard]], None],
) -> None:
    """Write the ranges ``todo`` in several processes."""
    pool = ProcessPoolExecutor(
        workers,
        multiprocessing.get_context("fork"),  # workers inherit the samples, whatever they are
        _set_job,
        (samples, folder, ranges, max_bytes),
    )
    try:
        futures = {pool.submit(_write_number, k): k for k in todo}
        for future in as_completed(futures):
            finish(futures[future], future.result())
    except BrokenProcessPool:
        raise DataError(
            "a writing process was killed; the same command goes on from here"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _set_job(samples: Samples, folder: Path, ranges: list[_Range], max_bytes: int) -> None:
    global _job
    _job = samples, folder, ranges, max_bytes


def _write_number(k: int) -> list[Shard]:
    assert _job is not None
    samples, folder, ranges, max_bytes = _job
    return _write_range(samples, folder, ranges[k], max_bytes)


def _claim(folder: Path, plan: dict[str, Any]) -> None:
    """Make the folder ours, or find that it was: it holds our plan and no manifest."""
    text = json.dumps(plan, indent=1, sort_keys=True) + "\n"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / MANIFEST).exists():
            raise UsageError(f"'{folder}' has {MANIFEST}: it is complete; choose another folder")
        if (folder / _PLAN).exists():
            if (folder / _PLAN).read_text(encoding="utf-8") != text:
                raise UsageError(
                    f"'{folder}' has unfinished shards of another input or other options "
                    f"({_PLAN}); delete it or choose another folder"
                )
            for part in folder.glob(".*.[0-9]*"):
                part.unlink()
        elif any(folder.iterdir()):
            raise UsageError(f"'{folder}' is not empty; choose another folder")
        else:
            replace_file(folder / _PLAN, text.encode())
    except OSError as error:
        raise UsageError(f"'{folder}' is not writable: {error.strerror or error}") from error


def _finished(folder: Path, part: _Range) -> list[Shard]:
    """Return the shards of a range if all are there, sound by size, else none."""
    shards = []
    for path in sorted(folder.glob(f"{part.split}-{part.number:06d}*.index.npy")):
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


def _write_range(samples: Samples, folder: Path, part: _Range, max_bytes: int) -> list[Shard]:
    """Write one range of samples as one shard, or as many as ``max_bytes`` asks for."""
    stem = f"{part.split}-{part.number:06d}"
    shards: list[Shard] = []
    writer: _ShardWriter | None = None
    members = samples.read(part.split, part.begin, part.end)
    try:
        for row in range(part.begin, part.end):
            try:
                extent, label = _extent(f"{row:09d}", next(members), samples.label)
            except StopIteration:
                raise DataError("the input ended before it") from None
            except DistclError as error:
                raise DataError(f"sample {row} of {part.split}: {error}") from error
            if writer is not None and 0 < max_bytes < writer.size + len(extent) + len(END):
                shards.append(writer.close())
                writer = None
            if writer is None:
                name = f"{stem}-{len(shards):03d}.tar" if max_bytes else f"{stem}.tar"
                writer = _ShardWriter(folder / name, part.split)
            writer.add(extent, label)
        if writer is not None:
            shards.append(writer.close())
            writer = None
    finally:
        if writer is not None:
            writer.discard()
    return shards


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
        self._index.write(self._tar, self.size)
        name, digest, index = self._tar.name, self._digest.hexdigest(), self._index
        return Shard(name, self._split, len(index), self.size, digest, 0, index.classes)

    def discard(self) -> None:
        """Remove what is not complete."""
        self._file.close()
        self._part.unlink(missing_ok=True)
