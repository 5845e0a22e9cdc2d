"""Opens .npy and .npz files without pickle, memory-mapped wherever the data lie uncompressed.

numpy's own ``mmap_mode`` does not reach into an .npz. Here a stored (uncompressed) member is mapped
at its offset in the archive; a deflated one is read into memory. Headers are matched against the
plain numeric form only, nothing in a file is evaluated, and memory stays bounded by the data that
the file really holds. Mapped data are not checked against the archive's CRC.
"""

from __future__ import annotations

import functools
import io
import math
import re
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

from distcl.errors import DataError

Array = npt.NDArray[Any]

_MAGIC = b"\x93NUMPY"
_LONGEST_HEADER = 1 << 16
_MOST_DIMENSIONS = 16
_NUMERIC = re.compile(r"[<>|=]?(b1|[iu][1248]|f[248])")
_DESCR = re.compile(rb"['\"]descr['\"]\s*:\s*(?:['\"]([^'\"]*)['\"]|\[)")
_ORDER = re.compile(rb"['\"]fortran_order['\"]\s*:\s*(True|False)")
_SHAPE = re.compile(rb"['\"]shape['\"]\s*:\s*\(\s*((?:\d{1,18}\s*,\s*)*(?:\d{1,18}\s*)?)\)")
_LOCAL_HEADER = struct.Struct("<4s22xHH")  # of a zip member: signature, lengths of name and extra
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


def open_npy(path: Path) -> Array:
    """Return the array of an .npy file, memory-mapped, read-only. Local.

    Raises DataError naming the file if it is absent, truncated, not an .npy, or not numeric.
    """
    where = f"'{path}'"
    with open_file(path) as file:
        header = _read_header(file, where)
    return _map(path, header, 0, path.stat().st_size, where)


def open_npz(path: Path, required: tuple[str, ...], optional: tuple[str, ...]) -> dict[str, Array]:
    """Return the named arrays of an .npz file: mapped if stored, in memory if deflated. Local.

    Raises DataError naming the file, and the key where one is at fault, if the file is absent,
    truncated or not an .npz, if a required key is missing, or if an array is not numeric.
    """
    with _archive(path) as (archive, members):
        for key in required:
            if key not in members:
                has = ", ".join(f"'{name}'" for name in list(members)[:8]) or "nothing"
                raise DataError(f"'{path}' has no array '{key}'; it has {has}")
        wanted = [key for key in (*required, *optional) if key in members]
        return {key: _member(path, archive, members[key], f"'{path}', '{key}'") for key in wanted}


def npz_keys(path: Path) -> list[str]:
    """Return the names of the arrays in an .npz file. Raises DataError as :func:`open_npz`."""
    with _archive(path) as (_, members):
        return list(members)


def parse_npy(data: bytes) -> Array:
    """Return the array that the bytes of an .npy file hold, read-only, without copying. Local.

    Raises DataError if they are truncated, not an .npy, or not numeric.
    """
    width = 2 if data[6:7] == b"\x01" else 4
    header = _header_of(data[: 8 + width + int.from_bytes(data[8 : 8 + width], "little")])
    _require(len(data) - header.length, header.nbytes, "it")
    return np.ndarray(header.shape, header.dtype, data, header.length, order=header.order)


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


def _member(path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo, where: str) -> Array:
    if info.flag_bits & 1:
        raise DataError(f"{where} is encrypted")
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise DataError(f"{where} is compressed in a way that numpy does not write")
    try:
        with archive.open(info) as member:
            header = _read_header(member, where)
            if info.compress_type == zipfile.ZIP_DEFLATED:
                data = member.read(header.nbytes)
                _require(len(data), header.nbytes, where)
                return np.ndarray(header.shape, header.dtype, data, order=header.order)
    except _DAMAGED as error:
        raise DataError(f"{where} is truncated or damaged ({error})") from error
    with open_file(path) as file:
        file.seek(info.header_offset)
        _, name, extra = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
    start = info.header_offset + _LOCAL_HEADER.size + name + extra
    size = min(info.file_size, path.stat().st_size - start)
    return _map(path, header, start, size, where)


def _map(path: Path, header: _Header, start: int, size: int, where: str) -> Array:
    """Map an array whose .npy form takes ``size`` bytes of the file from ``start``."""
    _require(size - header.length, header.nbytes, where)
    return np.asarray(
        np.memmap(path, header.dtype, "r", start + header.length, header.shape, header.order)
    )


def _require(found: int, needed: int, where: str) -> None:
    if found < needed:
        raise DataError(
            f"{where} is truncated: {max(found, 0)} of {needed} bytes of data are there"
        )


def _read_header(file: IO[bytes], where: str) -> _Header:
    start = file.read(8)
    if not start.startswith(_MAGIC):
        raise DataError(f"{where} is not an .npy file")
    width = 2 if start[6:7] == b"\x01" else 4  # version 1 counts the header in 2 bytes
    text_length = int.from_bytes(file.read(width), "little")
    text = file.read(min(text_length, _LONGEST_HEADER))
    if len(text) < text_length:
        raise DataError(f"{where} is truncated: its header is incomplete")
    descr, order, shape = (p.search(text) for p in (_DESCR, _ORDER, _SHAPE))
    sizes = tuple(int(n) for n in shape[1].split(b",") if n.strip()) if shape else ()
    if descr is None or order is None or shape is None or len(sizes) > _MOST_DIMENSIONS:
        raise DataError(f"{where} has a damaged .npy header")
    kind = (descr[1] or b"structured").decode("latin-1")
    if "O" in kind:
        raise DataError(
            f"{where} has object dtype; it would have to be unpickled, which is refused"
        )
    if not _NUMERIC.fullmatch(kind):
        raise DataError(f"{where} has type '{kind}'; numbers are needed")
    if 0 in sizes:
        raise DataError(f"{where} has shape {sizes}, no data")
    return _Header(
        np.dtype(kind), sizes, "F" if order[1] == b"True" else "C", 8 + width + text_length
    )


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
