"""Opens .npy and .npz files without pickle: an .npy is mapped, arrays of an .npz are read whole.

Memory stays bounded by the data that a file really holds, whatever its header claims. What is read
from an .npz is checked against its CRC; mapped data are not checked, but for
the digests that a user gives of files (``stream.sha256``).
"""

from __future__ import annotations

import functools
import hashlib
import io
import math
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
import numpy.typing as npt
from numpy.lib import format as npy

from distcl.config import StreamConfig
from distcl.config.paths import reachable
from distcl.errors import DataError

Array = npt.NDArray[Any]

_MOST_DIMENSIONS = 16
_DAMAGED = (
    *(zipfile.BadZipFile, zlib.error, struct.error, EOFError, OSError),
    *(NotImplementedError, OverflowError, ValueError),  # what zipfile raises on odd directories
)


@dataclass(frozen=True, slots=True)
class _Header:
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    order: Literal["C", "F"]
    length: int
    """Bytes before the data: magic, version, and the header itself."""

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def array(self, data: bytes, where: str, start: int = 0) -> Array:
        _require(len(data) - start, self.nbytes, where)
        return np.ndarray(self.shape, self.dtype, data, start, order=self.order)


def open_npy(path: Path) -> Array:
    """Return the array of an .npy file, memory-mapped, read-only. Local.

    Raises DataError naming the file if it is absent, truncated, not an .npy, or not numeric.
    """
    where = f"'{path}'"
    with open_file(path) as file:
        header = _read_header(file, where)
    _require(path.stat().st_size - header.length, header.nbytes, where)
    return np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))


def open_npz(path: Path, required: tuple[str, ...], optional: tuple[str, ...]) -> dict[str, Array]:
    """Return the named arrays of an .npz file, read into memory. Local.

    Raises DataError naming the file, and the key where one is at fault, if the file is absent,
    truncated or not an .npz, if a required key is missing, or if an array is not numeric.
    """
    with _archive(path) as (archive, members):
        for key in required:
            if key not in members:
                has = ", ".join(f"'{name}'" for name in list(members)[:8]) or "nothing"
                raise DataError(f"'{path}' has no array '{key}'; it has {has}")
        wanted = [key for key in (*required, *optional) if key in members]
        return {key: _member(archive, members[key], f"'{path}', '{key}'") for key in wanted}


def npz_keys(path: Path) -> list[str]:
    """Return the names of the arrays in an .npz file. Raises DataError as :func:`open_npz`."""
    with _archive(path) as (_, members):
        return list(members)


def parse_npy(data: bytes) -> Array:
    """Return the array that the bytes of an .npy file hold, read-only, without copying. Local.

    Raises DataError if they are truncated, not an .npy, or not numeric.
    """
    width = 2 if data[6:7] == b"\x01" else 4  # version 1 counts the header in 2 bytes
    header = _header_of(data[: 8 + width + int.from_bytes(data[8 : 8 + width], "little")])
    return header.array(data, "it", header.length)


@functools.lru_cache(64)
def _header_of(head: bytes) -> _Header:
    return _read_header(io.BytesIO(head), "it")


@contextmanager
def _archive(path: Path) -> Iterator[tuple[zipfile.ZipFile, dict[str, zipfile.ZipInfo]]]:
    with open_file(path) as file:
        if not file.read(4).startswith(b"PK"):
            raise DataError(f"'{path}' is not an .npz file")
        try:
            archive = zipfile.ZipFile(file)
        except _DAMAGED as error:
            raise DataError(f"'{path}' is truncated or damaged ({error})") from error
        yield archive, {info.filename.removesuffix(".npy"): info for info in archive.infolist()}


def _member(archive: zipfile.ZipFile, info: zipfile.ZipInfo, where: str) -> Array:
    if info.flag_bits & 1:
        raise DataError(f"{where} is encrypted")
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise DataError(f"{where} is compressed in a way that numpy does not write")
    try:
        with archive.open(info) as member:
            header = _read_header(member, where)
            return header.array(member.read(header.nbytes), where)
    except _DAMAGED as error:
        raise DataError(f"{where} is truncated or damaged ({error})") from error


def _require(found: int, needed: int, where: str) -> None:
    if found < needed:
        raise DataError(
            f"{where} is truncated: {max(found, 0)} of {needed} bytes of data are there"
        )


def _read_header(file: IO[bytes], where: str) -> _Header:
    """Read and check what stands before the data, by numpy's own parser."""
    try:
        version = npy.read_magic(file)
    except ValueError:
        raise DataError(f"{where} is not an .npy file") from None
    read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    try:
        shape, fortran, dtype = read(file)
    except Exception as error:  # whatever its parser of literals meets
        raise DataError(f"{where} has a damaged .npy header ({error})") from None
    if len(shape) > _MOST_DIMENSIONS or not all(0 <= n < 1 << 60 for n in shape):
        raise DataError(f"{where} has a damaged .npy header (shape {shape})")
    if dtype.hasobject and not dtype.names:
        raise DataError(
            f"{where} has object dtype; it would have to be unpickled, which is refused"
        )
    if dtype.kind not in "biuf" or dtype.itemsize > 8:
        kind = "structured" if dtype.names else dtype.str
        raise DataError(f"{where} has type '{kind}'; numbers are needed")
    if 0 in shape:
        raise DataError(f"{where} has shape {shape}, no data")
    return _Header(dtype, shape, "F" if fortran else "C", file.tell())


def open_file(path: Path) -> BufferedReader:
    """Open a file for reading bytes; raises DataError naming it if it is absent or unreadable."""
    try:
        if path.is_dir():
            raise DataError(f"'{path}' is a folder, not a file")
        return path.open("rb")
    except FileNotFoundError:
        raise DataError(f"file '{path}' does not exist") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"file '{path}' cannot be read: {reason}") from error


# SHA-256 of data files, where the user says what it must be.


def check_files(config: StreamConfig) -> None:
    """Check every file that ``stream.sha256`` names. Local; reads each file once.

    Names are relative to ``stream.path``, or to its folder if it is a file; without a path, to the
    working folder. Raises DataError naming a file that is absent or has another digest.
    """
    base = reachable(config.path or ".")
    base = base.parent if base.is_file() else base
    for name, expected in config.sha256.items():
        path = base / name
        with open_file(path) as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != expected.lower():
            raise DataError(
                f"'{path}' has SHA-256 {found}, but stream.sha256 says {expected.lower()}: it is "
                "damaged, or another file"
            )
