"""Where each sample of a shard lies, its label and its checksum: the index; and the manifest.

Beside ``NAME.tar`` lies ``NAME.index.npy``, int64 [2, n + 1], memory-mapped when read:

- row 0: the first byte of each sample's extent; last, the byte after the final one;
- row 1: label · 2**32 + CRC-32 of the extent (label -1: not to be used); last, the size of the
  archive.

Its own time is the archive's: where they differ, the archive was changed or copied since.

``shards.json`` in the same folder lists the shards with samples, bytes, SHA-256, first id, classes.
"""

from __future__ import annotations

import io
import json
import logging
import os
import re
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO

import numpy as np

from distcl.config.files import file_digest, write_atomically
from distcl.data.shards.decode import decode
from distcl.data.shards.manifest import (
    _HOW,
    MANIFEST,
    Manifest,
    Shard,
    known_names,
    numbered,
    read_shards,
    write_manifest,
)
from distcl.data.shards.tar import BLOCK, key_of, open_archive, read_members, scan
from distcl.data.sources.arrays import MAX_CLASSES
from distcl.data.sources.npy import Array, open_npy
from distcl.data.transforms import arrays_of
from distcl.errors import DataError
from distcl.types import Ids

CRC_MASK = (1 << 32) - 1
CHANGED = "its bytes have changed since the index was made"
_BLOCK = 1 << 16
_CHECKED = 1 << 30
_ARCHIVE = re.compile(r"\.(tar(\.\w+)?|t(gz|bz2?|xz|zst|lz4?))", re.IGNORECASE)
_NUMBER = re.compile(rb"\s*(\d+|-[1-9]\d*)\s*")

log = logging.getLogger("distcl")


def is_archive(path: Path) -> bool:
    """Tell by its name whether a file is a tar, compressed or not."""
    return any(map(_ARCHIVE.fullmatch, (path.suffix, "".join(path.suffixes[-2:]))))


def archives(folder: Path) -> tuple[list[Path], list[str]]:
    """Return the archives of a folder by name, and what is wrong with others. Local.

    ``.tar`` counts in capitals too; compressed archives are wrong. A warning tells of those that
    are hidden or in folders. Raises DataError if the folder cannot be read, or has no archive.
    """
    try:
        found = sorted(folder.iterdir())
        below = [sub for sub in found if sub.is_dir() and any(sub.glob("[!.]*.tar"))]
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"the folder of shards '{folder}' cannot be read: {reason}") from None
    tars, wrong = list[Path](), list[str]()
    left = [f"{sub.name}/" for sub in below]
    for path in found:
        if path.suffix.lower() == ".tar":
            if path.name.startswith("."):
                left.append(path.name)
            else:
                tars.append(path)
        elif is_archive(path):
            wrong.append(f"'{path}' is compressed; unpack it to a .tar, or put it elsewhere")
    if not tars:
        raise DataError(wrong[0] if wrong else f"there are no .tar files in '{folder}'")
    if left:
        log.warning("archives in '%s' that are not read: %s", folder, ", ".join(left))
    return tars, wrong


def index_path(tar: Path) -> Path:
    """Return where the index of an archive lies."""
    return tar.with_name(tar.name.removesuffix(".tar") + ".index.npy")


class IndexBuilder:
    """Collects the samples of one archive, one after another, and writes its index."""

    def __init__(self) -> None:
        self._begins: list[int] = []
        self._words: list[int] = []
        self._end = 0

    def __len__(self) -> int:
        return len(self._begins)

    @property
    def classes(self) -> int:
        """One more than the largest label."""
        return 1 + (max(self._words, default=-1) >> 32)

    def add(self, begin: int, extent: bytes, label: int) -> None:
        """Add a sample that lies from byte ``begin`` on."""
        self._begins.append(begin)
        self._words.append((label << 32) | zlib.crc32(extent))
        self._end = begin + len(extent)

    def write(self, tar: Path, stat: os.stat_result) -> None:
        """Write the index of an archive that had this size and time, whole or not at all."""
        rows = [[*self._begins, self._end], [*self._words, stat.st_size]]
        out = io.BytesIO()
        np.save(out, np.array(rows, dtype="<i8"), allow_pickle=False)
        write_atomically(index_path(tar), out.getvalue(), sync=True)
        _stamp(tar, stat)


def _stamp(tar: Path, stat: os.stat_result) -> None:
    with suppress(OSError):  # then the archive is looked at
        os.utime(index_path(tar), ns=(stat.st_atime_ns, stat.st_mtime_ns))


def changed_rows(tar: Path, index: Array, share: int = 1) -> list[int]:
    """Return the rows of samples whose bytes are not those that were indexed. Local.

    Of an archive of the time it was indexed at, the first and the last sample are read. Of another,
    a copy perhaps, samples of up to 1 GiB / ``share``, evenly spread: all of them, if it is not
    larger. Raises DataError if the archive does not end where the index does.
    """
    samples, size = index.shape[1] - 1, int(index[1, -1])
    rows = sorted({0, samples - 1})
    if tar.stat().st_mtime_ns != index_path(tar).stat().st_mtime_ns:
        step = min(-(-size // max(1, _CHECKED // share)), max(1, samples // 2))
        rows = sorted({*range(0, samples, step), samples - 1})
        log.info(
            "[data] '%s' has another time than when it was indexed: %d of its %d samples are "
            "compared",
            *(tar.name, len(rows), samples),
        )
    with open_archive(tar) as file:
        file.seek(int(index[0, -1]))
        if file.read(BLOCK).strip(b"\0"):
            raise DataError(f"shard '{tar.name}' has more than its index: {CHANGED}")
        return [row for row in rows if not _same(file, index, row)[1]]


def _same(file: IO[bytes], index: Array, row: int) -> tuple[bytes, bool]:
    """Return a sample's extent, and whether it has the checksum of the index."""
    begin, end = int(index[0, row]), int(index[0, row + 1])
    file.seek(begin)
    extent = file.read(end - begin)
    return extent, zlib.crc32(extent) == index[1, row] & CRC_MASK


def label_of(members: dict[str, bytes], label: str) -> int:
    """Return the label of a sample. ``label``: the member that has it, cls or json:FIELD.

    Raises DataError if there is none, or if it is not an integer in [0, MAX_CLASSES).
    """
    ext, _, field = label.partition(":")
    if ext not in members:
        raise DataError(f"it has no label: there is no member '{ext}' beside {_list(members)}")
    data = members[ext]
    try:
        value = json.loads(data)[field] if field else _digits(data)
    except (ValueError, TypeError, KeyError, RecursionError):
        what = f"a field '{field}'" if field else f"digits, but {data[:20]!r}"
        raise DataError(f"it has no label: member '{ext}' does not hold {what}") from None
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < MAX_CLASSES:
        raise DataError(f"its label, {value!r}, is not a whole number from 0 to {MAX_CLASSES - 1}")
    return value


def _digits(data: bytes) -> int:
    if not _NUMBER.fullmatch(data):  # int() would take 1_0, +1 and more
        raise ValueError("not digits")
    return int(data)


def _list(members: dict[str, bytes]) -> str:
    return ", ".join(f"'{ext}'" for ext in members)


def open_index(tar: Path, samples: int, size: int) -> Array:
    """Return the index of an archive of so many samples and bytes, memory-mapped. Local.

    Raises DataError naming the shard if the archive or its index is absent, or if archive, index
    and manifest do not agree.
    """
    where = f"shard '{tar.name}'"
    try:
        found = tar.stat().st_size
    except FileNotFoundError:
        raise DataError(f"{where} is missing from '{tar.parent}'") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{where} in '{tar.parent}' cannot be read: {reason}") from None
    if found != size:
        raise DataError(f"{where} has {found} bytes but {MANIFEST} says {size}")
    path = index_path(tar)
    if not path.exists():
        raise DataError(f"{where} has no index; {_HOW} {tar.parent}")
    index = open_npy(path)
    if index.dtype != np.dtype("<i8") or index.shape != (2, samples + 1):
        raise DataError(f"{where}: its index is of another number of samples; {_HOW} {tar.parent}")
    if index[1, -1] != size or samples == 0:
        raise DataError(
            f"{where}: {'it is empty' if samples == 0 else 'its index is of another archive'}"
        )
    if index[0, 0] < 0 or index[0, -1] > size or not _sound(index):
        raise DataError(f"{where}: its index is damaged; {_HOW} {tar.parent}")
    return index


def _sound(index: Array) -> bool:
    """Tell whether samples follow one another and have labels; a block at a time: it is mapped."""
    for start in range(0, index.shape[1], _BLOCK):
        begins, words = index[:, start : start + _BLOCK + 1]
        if (begins[1:] <= begins[:-1]).any() or (words[:-1] >= MAX_CLASSES << 32).any():
            return False
    return True


def labels_in(index: Array) -> Ids:
    """Return the labels [n] in an index; -1: none."""
    return index[1, :-1] >> 32


def split_of(name: str) -> str:
    """Return the split of a shard that someone else wrote: test if its name says so."""
    words = name.lower().replace(".", "-").replace("_", "-").split("-")
    return "test" if {"test", "val", "valid", "validation", "eval"} & set(words) else "train"


def index_folder(
    folder: Path,
    label: str = "cls",
    skip: bool = False,
    tell: Callable[[str, int], None] | None = None,
) -> tuple[Manifest, list[str]]:
    """Write index and manifest for the archives of a folder, in order of their names. Local.

    Raises DataError naming shard, member and id as :func:`data.shards.tar.scan` tells faults, for
    samples without a label, and for archives that are compressed. With ``skip`` bad samples are
    marked as not to be used (what follows a damaged place is not reached). The second result says
    what was left out. ``tell(shard, samples)`` is called after each shard.
    """
    tars, problems = archives(folder)
    if problems and not skip:
        raise DataError(problems[0])
    following = {"train": 0, "test": 0}
    shards = []
    for tar in tars:
        split, others = split_of(tar.name), list[str]()
        with open_archive(tar) as file:
            stat = os.fstat(file.fileno())
        builder, found = _index(tar, label, following[split], others)
        if found and not skip:
            raise DataError(found[0])
        problems += found
        if others:
            said = "shard '%s' has %d members that are no part of a sample, such as '%s'"
            log.warning(said, tar.name, len(others), others[0])
        if len(builder):
            builder.write(tar, stat)
            following[split] += len(builder)
            classes, digest = builder.classes, file_digest(tar)
            shards.append(Shard(tar.name, split, len(builder), stat.st_size, digest, 0, classes))
        if tell is not None:
            tell(tar.name, len(builder))
    manifest = numbered(label, shards, known_names(folder))
    write_manifest(folder, manifest)
    return manifest, problems


def _index(
    tar: Path, label: str, first_id: int, others: list[str]
) -> tuple[IndexBuilder, list[str]]:
    """Return the index of an archive, and what is wrong with it."""
    builder, problems = IndexBuilder(), list[str]()
    try:
        with open_archive(tar) as file:
            for extent in scan(tar, others=others):
                fault, value = extent.fault, -1
                try:
                    value = value if fault else label_of(extent.members, label)
                except DataError as error:
                    fault = str(error)
                if fault:
                    where = f"shard '{tar.name}', sample '{extent.key}'"
                    problems.append(f"{where}, id {first_id + len(builder)}: {fault}")
                file.seek(extent.begin)
                builder.add(extent.begin, file.read(extent.end - extent.begin), value)
    except DataError as error:
        problems.append(str(error))
    return builder, problems


def verify_folder(
    folder: Path, tell: Callable[[str, int], None] | None = None
) -> tuple[Manifest, list[str]]:
    """Read and decode everything; return manifest and faults, naming shard, sample and id. Local.

    Archives must have the bytes and SHA-256 of the manifest and be such as indexing takes, samples
    the place and checksum of the index, and every member must decode; all archives of the folder
    must be listed. An archive that is sound is believed from then on, whatever its time.
    ``tell(shard, samples)`` is called after each shard.
    """
    manifest = read_shards(folder)
    tars, problems = archives(folder)
    listed = {shard.name for shard in manifest.shards}
    problems += [f"'{t.name}' is not in {MANIFEST}; {_HOW}" for t in tars if t.name not in listed]
    for shard in manifest.shards:
        tar = folder / shard.name
        try:
            index = open_index(tar, shard.samples, shard.bytes)
            stat = tar.stat()
            found = _faults(tar, index, shard)
            if 0 < shard.classes <= labels_in(index).max():
                most = f"{labels_in(index).max()} but {MANIFEST} says {shard.classes - 1}"
                found.append(f"shard '{tar.name}': its largest label is {most}")
            if not found and file_digest(tar) != shard.sha256:
                found = [f"shard '{tar.name}' has another SHA-256 than {MANIFEST} says"]
            problems += found
            if not found:
                _stamp(tar, stat)
        except DataError as error:
            problems.append(str(error))
        if tell is not None:
            tell(shard.name, shard.samples)
    return manifest, problems


def _faults(tar: Path, index: Array, shard: Shard) -> list[str]:
    """Return what is wrong with the samples of an archive."""
    problems = []
    with open_archive(tar) as file:
        for row in range(shard.samples):
            extent, same = _same(file, index, row)
            try:
                if not same:
                    raise DataError(CHANGED)
                if index[1, row] < 0:
                    raise DataError(marked(extent))
                members = read_members(extent)[1].items()
                arrays_of({ext: decode(ext, data) for ext, data in members} | {"cls": 0})
            except DataError as error:
                problems.append(f"{sample_place(shard, extent, row)}: {error}")
    if problems:
        return problems
    row = -1
    for row, found in enumerate(scan(tar, data=False)):
        where = f"shard '{tar.name}', sample '{found.key}', id {shard.first_id + row}"
        if found.fault:
            problems.append(f"{where}: {found.fault}")
        if row >= shard.samples or found.begin != index[0, row]:
            return [*problems, f"{where} is not where the index has it"]
    if row + 1 != shard.samples:
        problems.append(f"shard '{tar.name}' has {row + 1} samples, the index {shard.samples}")
    return problems


def marked(extent: bytes) -> str:
    """Say why the index has a sample as not to be used."""
    try:
        read_members(extent)
    except DataError as error:
        return f"it is marked as bad: {error}"
    return "it has no label, or is marked as bad"


def sample_place(shard: Shard, extent: bytes, row: int) -> str:
    """Say where a sample is, for messages."""
    return f"shard '{shard.name}', sample '{key_of(extent)}', id {shard.first_id + row}"
