"""Where each sample of a shard lies, its label and its checksum: the index; and the manifest.

Beside ``NAME.tar`` lies ``NAME.index.npy``, int64 [2, n + 1], memory-mapped when read:

- row 0: the first byte of each sample's extent; last, the byte after the final one;
- row 1: label · 2**32 + CRC-32 of the extent (label -1: not to be used); last, the size of the
  archive.

Its own time is the archive's: where they differ, the archive was changed or copied since.

``shards.json`` in the same folder lists the shards with samples, bytes, SHA-256, first id, classes.
"""

from __future__ import annotations

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
from distcl.data.shards.decode import decode, label_of, npy_bytes
from distcl.data.shards.manifest import (
    INDEX_ONLY,
    MANIFEST,
    Manifest,
    Shard,
    known_manifest,
    numbered,
    read_shards,
    write_manifest,
)
from distcl.data.shards.tar import BLOCK, key_of, open_archive, read_members, refused, scan
from distcl.data.sources.arrays import MAX_CLASSES
from distcl.data.sources.npy import Array, open_npy
from distcl.data.transforms import arrays_of
from distcl.errors import DataError
from distcl.types import Ids

_CHECKED = 1 << 30
_ARCHIVE = re.compile(r"\.(tar(\.\w+)?|t(gz|bz2?|xz|zst|lz4?))", re.IGNORECASE)

log = logging.getLogger("distcl")

Tell = Callable[[str, int], None]
"""Called with a shard's name and its number of samples when it is done."""


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
        left = [f"{sub.name}/" for sub in found if sub.is_dir() and any(sub.glob("[!.]*.tar"))]
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"the folder of shards '{folder}' cannot be read: {reason}") from None
    tars = [path for path in found if path.suffix.lower() == ".tar"]
    wrong = [
        f"'{path}' is compressed; unpack it to a .tar, or put it elsewhere"
        for path in found
        if is_archive(path) and path not in tars
    ]
    left += [path.name for path in tars if path.name.startswith(".")]
    tars = [path for path in tars if not path.name.startswith(".")]
    if not tars:
        raise DataError(wrong[0] if wrong else f"there are no .tar files in '{folder}'")
    if left:
        log.warning("archives in '%s' that are not read: %s", folder, ", ".join(left))
    return tars, wrong


def split_of(name: str) -> str:
    """Return the split of a shard that someone else wrote: test if its name says so."""
    words = re.split(r"[-._]", name.lower())
    return "test" if {"test", "val", "valid", "validation", "eval"} & set(words) else "train"


# -- the index of an archive ----------------------------------------------------------------------


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
        write_atomically(index_path(tar), npy_bytes(np.array(rows, dtype="<i8")), sync=True)
        _stamp(tar, stat)


def _stamp(tar: Path, stat: os.stat_result) -> None:
    with suppress(OSError):  # then the archive is looked at
        os.utime(index_path(tar), ns=(stat.st_atime_ns, stat.st_mtime_ns))


def open_index(tar: Path, samples: int, size: int) -> Array:
    """Return the index of an archive of so many samples and bytes, memory-mapped. Local.

    Raises DataError naming the shard if the archive or its index is absent, or if archive, index
    and manifest do not agree.
    """
    where, again = f"shard '{tar.name}'", f"{INDEX_ONLY} {tar.parent}"
    try:
        found = tar.stat().st_size
    except (OSError, ValueError) as error:
        raise refused(tar, error) from None
    if found != size:
        raise DataError(f"{where} has {found} bytes but {MANIFEST} says {size}")
    path = index_path(tar)
    if not path.exists():
        raise DataError(f"{where} has no index; {again}")
    index = open_npy(path)
    if index.dtype != np.dtype("<i8") or index.shape != (2, samples + 1):
        raise DataError(f"{where}: its index is of another number of samples; {again}")
    if samples == 0:
        raise DataError(f"{where}: it is empty")
    begins, words = index
    if words[-1] != size:
        raise DataError(f"{where}: its index is of another archive")
    outside = begins[0] < 0 or begins[-1] > size or (begins[1:] <= begins[:-1]).any()
    if outside or (words[:-1] >= MAX_CLASSES << 32).any():
        raise DataError(f"{where}: its index is damaged; {again}")
    return index


def labels_in(index: Array) -> Ids:
    """Return the labels [n] in an index; -1: none."""
    return index[1, :-1] >> 32


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
            raise DataError(f"shard '{tar.name}' has more than its index: {_CHANGED}")
        return [row for row in rows if _differs(_extent(file, index, row), int(index[1, row]))]


def _extent(file: IO[bytes], index: Array, row: int) -> bytes:
    begin, end = index[0, row : row + 2].tolist()
    file.seek(begin)
    return file.read(end - begin)


_CHANGED = "its bytes have changed since the index was made"


def _differs(extent: bytes, word: int) -> bool:
    return zlib.crc32(extent) != word & 0xFFFF_FFFF


def indexed_members(extent: bytes, word: int, verify: bool) -> tuple[str, dict[str, bytes]]:
    """Return (key, ext → data) of a sample that the index has with this word. Local.

    Raises DataError if it is not sound, marked as not to be used, or, with ``verify``, if its bytes
    have changed since the index was made.
    """
    if verify and _differs(extent, word):
        raise DataError(_CHANGED)
    try:
        found = read_members(extent)
    except DataError as error:
        raise DataError(f"it is marked as bad: {error}" if word < 0 else str(error)) from None
    if word < 0:
        raise DataError("it has no label, or is marked as bad")
    return found


def place_of(shard: str, key: str, id_: int) -> str:
    """Say where a sample is, for messages."""
    return f"shard '{shard}', sample '{key}', id {id_}"


# -- a folder of archives -------------------------------------------------------------------------


def index_folder(
    folder: Path, label: str = "cls", skip: bool = False, tell: Tell | None = None
) -> tuple[Manifest, list[str]]:
    """Write index and manifest for the archives of a folder, in order of their names. Local.

    Raises DataError naming shard, member and id as :func:`data.shards.tar.grouped` tells faults,
    for samples without a label, and for archives that are compressed. With ``skip`` bad samples are
    marked as not to be used (what follows a damaged place is not reached). The second result says
    what was left out.
    """
    tars, problems = archives(folder)
    if problems and not skip:
        raise DataError(problems[0])
    known = known_manifest(folder, label)
    label = known.label if known.texts else label
    following = {"train": 0, "test": 0}
    shards = []
    for tar in tars:
        split, builder = split_of(tar.name), IndexBuilder()
        with open_archive(tar) as file:
            stat = os.fstat(file.fileno())
            found = _index(file, tar, label, following[split], builder)
        if found and not skip:
            raise DataError(found[0])
        problems += found
        if len(builder):
            builder.write(tar, stat)
            following[split] += len(builder)
            digest = file_digest(tar)
            shards.append(
                Shard(tar.name, split, len(builder), stat.st_size, digest, 0, builder.classes)
            )
        if tell is not None:
            tell(tar.name, len(builder))
    manifest = numbered(label, shards, known.class_names, known.texts)
    write_manifest(folder, manifest)
    return manifest, problems


def _index(
    file: IO[bytes], tar: Path, label: str, first_id: int, builder: IndexBuilder
) -> list[str]:
    """Add the samples of an archive to its index; return what is wrong with it."""
    problems, others = list[str](), list[str]()
    try:
        for extent in scan(tar, others=others):
            fault, value = extent.fault, -1
            try:
                value = value if fault else label_of(extent.members, label)
            except DataError as error:
                fault = str(error)
            if fault:
                where = place_of(tar.name, extent.key, first_id + len(builder))
                problems.append(f"{where}: {fault}")
            file.seek(extent.begin)
            builder.add(extent.begin, file.read(extent.end - extent.begin), value)
    except DataError as error:
        problems.append(str(error))
    if others:
        said = "shard '%s' has %d members that are no part of a sample, such as '%s'"
        log.warning(said, tar.name, len(others), others[0])
    return problems


def verify_folder(folder: Path, tell: Tell | None = None) -> tuple[Manifest, list[str]]:
    """Read and decode everything; return manifest and faults, naming shard, sample and id. Local.

    Archives must have the bytes and SHA-256 of the manifest and be such as indexing takes, samples
    the place and checksum of the index, and every member must decode; all archives of the folder
    must be listed. An archive that is sound is believed from then on, whatever its time.
    """
    manifest = read_shards(folder)
    tars, problems = archives(folder)
    listed = {shard.name for shard in manifest.shards}
    problems += [
        f"'{tar.name}' is not in {MANIFEST}; {INDEX_ONLY}" for tar in tars if tar.name not in listed
    ]
    for shard in manifest.shards:
        tar = folder / shard.name
        try:
            index = open_index(tar, shard.samples, shard.bytes)
            stat = tar.stat()
            found = _sample_faults(tar, index, shard) or _order_faults(tar, index, shard)
            most = labels_in(index).max()
            if 0 < shard.classes <= most:
                told = f"{most} but {MANIFEST} says {shard.classes - 1}"
                found.append(f"shard '{tar.name}': its largest label is {told}")
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


def _sample_faults(tar: Path, index: Array, shard: Shard) -> list[str]:
    """Return what is wrong with the samples that the index has."""
    problems = []
    with open_archive(tar) as file:
        for row in range(shard.samples):
            extent = _extent(file, index, row)
            try:
                members = indexed_members(extent, int(index[1, row]), verify=True)[1].items()
                arrays_of({ext: decode(ext, data) for ext, data in members} | {"cls": 0})
            except DataError as error:
                where = place_of(shard.name, key_of(extent), shard.first_id + row)
                problems.append(f"{where}: {error}")
    return problems


def _order_faults(tar: Path, index: Array, shard: Shard) -> list[str]:
    """Return where the samples of an archive are not those of the index, one after another."""
    problems, row = [], -1
    for row, found in enumerate(scan(tar, data=False)):
        where = place_of(tar.name, found.key, shard.first_id + row)
        if found.fault:
            problems.append(f"{where}: {found.fault}")
        if row >= shard.samples or found.begin != index[0, row]:
            return [*problems, f"{where} is not where the index has it"]
    if row + 1 != shard.samples:
        problems.append(f"shard '{tar.name}' has {row + 1} samples, the index {shard.samples}")
    return problems
