"""Writes shards: from any table of samples, by several processes, the same bytes every time.

The samples of a split are cut into ranges of ``per_shard``; each range is written on its own, as
one shard, or as several where ``max_bytes`` cuts it. So shards do not depend on the number of
processes, and a killed job goes on with the ranges it had not finished; so does one whose input was
repaired meanwhile, with those that lie in changed files too.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import multiprocessing
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from distcl.config.files import file_digest, write_atomically
from distcl.data.shards.decode import label_of
from distcl.data.shards.index import IndexBuilder, Tell, labels_in, open_index
from distcl.data.shards.manifest import (
    MANIFEST,
    Manifest,
    Shard,
    Texts,
    numbered,
    read_shards,
    write_manifest,
)
from distcl.data.shards.tar import END, member_bytes
from distcl.data.shards.texts import joined_texts
from distcl.data.sources.npy import open_npy
from distcl.errors import DataError, UsageError

Members = dict[str, bytes]

_PLAN = "shards.plan.json"


class Samples(ABC):
    """What can be written as shards: splits of numbered samples, each some members by ext.

    ``origin``: what tells this from another input, as JSON; ``label``: the member that holds
    labels, cls or json:FIELD.
    """

    def __init__(self, origin: dict[str, Any], label: str = "cls") -> None:
        self.origin = origin
        self.label = label
        self.sizes: dict[str, int] = {}
        """The number of samples of each split, train before test."""
        self.class_names: list[str] = []
        """Names of the labels 0, 1, …; empty: not known."""
        self.texts: Texts | None = None
        """What tokens they are, if they are texts."""
        self.problems: list[str] = []
        """What of the input is damaged, and passed over."""
        self.skipped: list[str] = []
        """What the input has that is no sample."""

    @abstractmethod
    def read(self, split: str, begin: int, end: int) -> Iterator[Members]:
        """Yield the members of samples ``begin`` … ``end``. In any process; DataError if bad."""

    @abstractmethod
    def stamp(self, split: str, begin: int, end: int) -> Any:
        """Return what tells whether the files of samples ``begin`` … ``end`` change, as JSON."""


class _Range(NamedTuple):
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
    tell: Tell | None = None,
    problems: list[str] | None = None,
) -> Manifest:
    """Write shards, indexes and ``shards.json``, and return the manifest.

    ``per_shard``: samples of a shard; ``max_bytes``: a shard is closed before it grows beyond (a
    single larger sample aside), 0 for no limit; ``workers``: processes, 0 for this one; ``tell`` is
    called after each range; ``problems``: if given, bad samples are left out, and named there.
    Files appear whole, the manifest last.

    If the folder has the unfinished work of the same job, it goes on there; UsageError if it has
    anything else. Raises DataError naming a bad sample, or if no sample is sound.
    """
    parts = [
        _Range(split, number, begin, min(begin + per_shard, size))
        for split, size in samples.sizes.items()
        for number, begin in enumerate(range(0, size, per_shard))
    ]
    plan = {
        "samples": samples.origin,
        "per_shard": per_shard,
        "max_bytes": max_bytes,
        "ranges": {part.stem: _digest(samples, part) for part in parts},
    }
    _claim(folder, plan)
    done = {part: found for part in parts if (found := _finished(folder, part))}
    todo = [part for part in parts if part not in done]
    job = _Job(samples, folder, max_bytes, problems is not None)
    before = [(part, found, list[str]()) for part, found in done.items()]
    for part, found, bad in itertools.chain(before, job.in_processes(todo, workers)):
        done[part] = found
        if problems is not None:
            problems += bad
        if tell is not None:
            tell(part.stem, part.end - part.begin)
    whole = [shard for part in parts for shard in done[part]]
    manifest = _manifest(samples, whole, samples.class_names, problems)
    write_manifest(folder, manifest)
    (folder / _PLAN).unlink()
    return manifest


def _manifest(
    samples: Samples, shards: list[Shard], names: list[str], problems: list[str] | None
) -> Manifest:
    if not shards and problems:
        raise DataError(f"not one sample is sound; {problems[0]}")
    return numbered(samples.label, shards, names, samples.texts)


def append_shards(
    samples: Samples,
    folder: Path,
    per_shard: int = 10_000,
    max_bytes: int = 0,
    tell: Tell | None = None,
    problems: list[str] | None = None,
) -> Manifest:
    """Add shards to a folder of shards; those who watch it see each one when it is whole.

    Arguments and errors as of :func:`write_shards`. After a kill the shards listed in
    ``shards.json`` are whole, and what was not listed is written over by the next addition.
    """
    manifest = read_shards(folder)
    if manifest.label != samples.label:
        raise DataError(f"'{folder}' has labels in '{manifest.label}', not '{samples.label}'")
    old, new = manifest.class_names, samples.class_names
    if old and new and old != new:
        raise DataError(
            f"'{folder}' has the classes {', '.join(old)}, but what is to be added has "
            f"{', '.join(new)}: labels would mean other classes"
        )
    samples.texts = joined_texts(folder, manifest.texts, samples.texts)
    job = _Job(samples, folder, max_bytes, problems is not None)
    for split, size in samples.sizes.items():
        for begin in range(0, size, per_shard):
            number = len(manifest.split(split))
            while any(s.name.startswith(f"{split}-{number:06d}") for s in manifest.shards):
                number += 1
            part = _Range(split, number, begin, min(begin + per_shard, size))
            found, bad = job.write(part)
            if problems is not None:
                problems += bad
            manifest = _manifest(samples, [*manifest.shards, *found], old, problems)
            write_manifest(folder, manifest)
            if tell is not None:
                tell(part.stem, part.end - part.begin)
    return manifest


@dataclass(frozen=True, slots=True)
class _Job:
    """What is written where. ``skip``: whether bad samples are left out."""

    samples: Samples
    folder: Path
    max_bytes: int
    skip: bool

    def in_processes(
        self, todo: list[_Range], workers: int
    ) -> Iterator[tuple[_Range, list[Shard], list[str]]]:
        """Write the ranges ``todo``; yield each with its shards and its bad samples."""
        if workers == 0 or len(todo) < 2:
            yield from ((part, *self.write(part)) for part in todo)
            return
        pool = ProcessPoolExecutor(
            min(workers, len(todo)),
            multiprocessing.get_context("fork"),  # workers inherit the samples, whatever they are
            _set_job,
            (self,),
        )
        try:
            futures = {pool.submit(_write, part): part for part in todo}
            for future in as_completed(futures):
                yield (futures[future], *future.result())
        except BrokenProcessPool:
            raise DataError(
                "a writing process was killed; the same command goes on from here"
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)

    def write(self, part: _Range) -> tuple[list[Shard], list[str]]:
        """Write a range as one shard, or as many as ``max_bytes`` asks for; and what was bad."""
        shards, problems, number, size = list[Shard](), list[str](), 0, len(END)

        def number_of(sample: tuple[bytes, int]) -> int:
            nonlocal number, size
            size += len(sample[0])
            if self.max_bytes and size > self.max_bytes and size > len(sample[0]) + len(END):
                number, size = number + 1, len(sample[0]) + len(END)
            return number

        try:
            for k, found in itertools.groupby(self._extents(part, problems), number_of):
                more = f"-{k:03d}" if self.max_bytes else ""
                tar = self.folder / f"{part.stem}{more}.tar"
                shards.append(_write_shard(tar, part.split, found))
        except OSError as error:
            raise DataError(
                f"'{error.filename or self.folder}': {error.strerror or error}"
            ) from error
        return shards, problems

    def _extents(self, part: _Range, problems: list[str]) -> Iterator[tuple[bytes, int]]:
        """Yield of each row its bytes in the archive and its label.

        Who reads in batches fails before the bad sample: it is found by reading one at a time.
        """
        row, single = part.begin, False
        while row < part.end:
            end = row + 1 if single else part.end
            try:
                for found in self.samples.read(part.split, row, end):
                    members = (
                        member_bytes(f"{row:09d}.{ext}", found[ext]) for ext in sorted(found)
                    )
                    yield b"".join(members), label_of(found, self.samples.label)
                    row += 1
                if row < end:
                    raise DataError("the input ended before it")
            except DataError as error:
                fault = f"sample {row} of {part.split}: {error}"
                if not self.skip:
                    raise DataError(fault) from error
                if single:
                    problems.append(fault)
                    row += 1
                single = not single


_job: _Job | None = None  # of this worker process


def _set_job(job: _Job) -> None:
    global _job
    _job = job


def _write(part: _Range) -> tuple[list[Shard], list[str]]:
    assert _job is not None
    return _job.write(part)


def _write_shard(tar: Path, split: str, samples: Iterable[tuple[bytes, int]]) -> Shard:
    """Write a shard, which has its name only when it is complete, and its index after it."""
    index, digest, size = IndexBuilder(), hashlib.sha256(), 0

    def write(path: Path) -> None:
        nonlocal size
        with path.open("wb") as file:
            for extent, label in samples:
                index.add(size, extent, label)
                size += file.write(extent)
                digest.update(extent)
            size += file.write(END)
            digest.update(END)

    write_atomically(tar, write, sync=True)
    index.write(tar, tar.stat())
    return Shard(tar.name, split, len(index), size, digest.hexdigest(), 0, index.classes)


# -- what was written before ----------------------------------------------------------------------


def _digest(samples: Samples, part: _Range) -> str:
    stamp = json.dumps(samples.stamp(part.split, part.begin, part.end))
    return hashlib.sha256(stamp.encode()).hexdigest()


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
            samples, size = open_npy(path).shape[-1] - 1, tar.stat().st_size
            classes = 1 + int(labels_in(open_index(tar, samples, size)).max())
        except (DataError, OSError):
            return []
        digest = file_digest(tar)
        shards.append(Shard(tar.name, part.split, samples, size, digest, 0, classes))
    return shards if sum(s.samples for s in shards) == part.end - part.begin else []
