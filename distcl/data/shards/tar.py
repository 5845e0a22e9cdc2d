"""Tar archives of samples, in WebDataset's layout. Nothing is ever extracted.

A member's name is ``key.ext``, split at the first dot of its last part; neighbouring members of one
key are a sample. Names are only ever looked at, never used as paths. A sample's *extent* is its
bytes in the archive, headers included, so one read gets all of it.
"""

from __future__ import annotations

import functools
import io
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from distcl.errors import DataError

BLOCK = 512
END = bytes(2 * BLOCK)
"""What closes an archive."""

_REGULAR = (0x30, 0)  # type '0', or NUL in old archives
_DAMAGED = (tarfile.TarError, EOFError, ValueError, OverflowError, MemoryError)
_PICKLES = ("pickle", "pkl", "pyd", "pt", "pth", "joblib", "dill")


@dataclass(frozen=True, slots=True)
class Extent:
    """A sample in an archive: its key, first byte, the byte after its last, and its members.

    ``fault``: what is wrong with it, naming the member; '' if nothing.
    """

    key: str
    begin: int
    end: int
    members: dict[str, bytes]
    fault: str


@functools.lru_cache(1024)
def check_ext(ext: str) -> str:
    """Return an ext in lower case. Raises DataError if such a member would have to be unpickled."""
    if ext.lower().rpartition(".")[2] in _PICKLES:
        raise DataError(f"a member '.{ext}' is a pickle, which is refused: it could run any code")
    return ext.lower()


class UnusualHeaderError(ValueError):
    """A header that only some writers use: long names, sizes from 8 GiB, folders, links."""


def parse_header(header: bytes) -> tuple[str, int]:
    """Return (name, size) of a plain member's 512 bytes; else UnusualHeaderError."""
    if header[156] not in _REGULAR or header[124] & 0x80 or header[345]:
        raise UnusualHeaderError("not a plain file, or a long name")
    name = header[:100].partition(b"\0")[0].decode("utf-8", "replace")
    digits = header[124:136].strip(b"\0 ") or b"0"
    if not digits.isdigit() or b"8" in digits or b"9" in digits:
        raise DataError(f"member '{name}' has a damaged header")
    return name, int(digits, 8)


def split_name(name: str) -> tuple[str, str] | None:
    """Return (key, ext) of a member's name; None for files that are no part of a sample."""
    dot = name.find(".", name.rfind("/") + 1)
    if dot <= 0 or name[dot - 1] == "/" or dot + 1 == len(name):
        return None
    return name[:dot], name[dot + 1 :]


def read_members(extent: bytes) -> tuple[str, dict[str, bytes]]:
    """Return (key, ext → data) of a sample from the bytes of its extent. Local.

    Raises DataError naming the member if it is cut short, of another key, or a pickle.
    """
    key, members, at = "", dict[str, bytes](), 0
    try:
        while at + BLOCK <= len(extent):
            name, size = parse_header(extent[at : at + BLOCK])
            begin = at + BLOCK
            at = begin + -(-size // BLOCK) * BLOCK
            key = _collect(name, extent[begin : begin + size], size, key, members)
    except UnusualHeaderError:
        return _read_slowly(extent)
    return _complete(key, members)


def _read_slowly(extent: bytes) -> tuple[str, dict[str, bytes]]:
    """Do the same for what only some writers use: long names, sizes from 8 GiB, folders, links."""
    key, members = "", dict[str, bytes]()
    try:
        with tarfile.open(fileobj=io.BytesIO(extent + END), mode="r:") as archive:
            for info in _infos(archive, len(extent) + len(END)):
                if info.isreg():
                    data = extent[info.offset_data : info.offset_data + info.size]
                    key = _collect(info.name, data, info.size, key, members)
    except _DAMAGED as error:
        raise DataError(f"a header is damaged ({error})") from None
    return _complete(key, members)


def _infos(archive: tarfile.TarFile, size: int) -> Iterator[tarfile.TarInfo]:
    """Yield the headers of an archive of ``size`` bytes, in order; ReadError where one lies.

    The library itself follows sizes below 0 backwards, for ever, and those beyond the end.
    """
    while (info := archive.next()) is not None:
        archive.members.clear()  # type: ignore[attr-defined]  # it would keep all of them
        if not 0 <= info.size <= size - info.offset_data:
            raise tarfile.ReadError(f"member '{info.name}' has {info.size} bytes")
        yield info


def _collect(name: str, data: bytes, size: int, key: str, members: dict[str, bytes]) -> str:
    """Add a member to ``members``, unless it is no part of a sample; return the key."""
    if len(data) < size:
        raise DataError(f"member '{name}' is truncated: {len(data)} of {size} bytes are there")
    pieces = split_name(name)
    if pieces is None:
        return key
    if key and pieces[0] != key:
        raise DataError(f"member '{name}' is where '{key}' should be: the index is of another file")
    members[check_ext(pieces[1])] = data
    return pieces[0]


def _complete(key: str, members: dict[str, bytes]) -> tuple[str, dict[str, bytes]]:
    if not members:
        raise DataError("there is no member where the index has a sample")
    return key, members


def scan(path: Path) -> Iterator[Extent]:
    """Yield every sample of an archive, in order, reading it once from front to back. Local.

    Samples with a fault of their own (a pickle, a key or a member that occurs twice) say so.
    Raises DataError naming the shard when it is missing, not a tar, compressed, truncated, damaged
    or without samples; all but the last sample before that place have been yielded by then.
    """
    where = f"shard '{path.name}'"
    seen: set[str] = set()
    key, begin, fault, members = "", 0, "", dict[str, bytes]()
    try:
        with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as archive:
            for info in _infos(archive, path.stat().st_size):
                found = split_name(info.name) if info.isreg() else None
                if found is None:
                    continue
                if found[0] != key:
                    if key:
                        yield Extent(key, begin, info.offset, members, fault)
                    key, begin, fault, members = found[0], info.offset, "", {}
                    if key in seen:
                        fault = f"member '{info.name}': another sample has the key '{key}' too"
                    seen.add(key)
                ext = found[1].lower()
                if ext in members:
                    fault = fault or f"member '{info.name}' occurs twice"
                try:
                    check_ext(found[1])
                except DataError as error:
                    fault = fault or f"member '{info.name}': {error}"
                file.seek(info.offset_data)
                members[ext] = file.read(info.size)
            end = archive.offset
            file.seek(end)
            closing = file.read(BLOCK)
    except FileNotFoundError:
        raise DataError(f"{where} is missing from '{path.parent}'") from None
    except OSError as error:
        raise DataError(f"{where} cannot be read: {error.strerror or error}") from error
    except _DAMAGED as error:
        last = f" in or after sample '{key}'" if key else ""
        raise DataError(f"{where} is truncated, or no uncompressed tar{last} ({error})") from None
    if len(closing) < BLOCK:
        raise DataError(f"{where} is truncated in or after sample '{key}': the end mark is missing")
    if closing.strip(b"\0"):
        raise DataError(f"{where}: the header at byte {end}, after sample '{key}', is damaged")
    if not key:
        raise DataError(f"{where} is empty: there are no samples in it")
    yield Extent(key, begin, end, members, fault)


def member_bytes(name: str, data: bytes) -> bytes:
    """Return a member, header and padding included; equal input gives equal bytes.

    Raises DataError if ``name`` is longer than the 100 bytes that a plain header holds.
    """
    encoded = name.encode()
    if len(encoded) > 100:
        raise DataError(f"the member name '{name}' is longer than 100 bytes")
    info = tarfile.TarInfo(name)
    info.size = len(data)
    header = info.tobuf(tarfile.USTAR_FORMAT)  # mode 0644, owner and time 0
    return header + data + bytes(-len(data) % BLOCK)
