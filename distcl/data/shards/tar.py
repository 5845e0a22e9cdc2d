"""Tar archives of samples, in WebDataset's layout. Nothing is ever extracted.

A member's name is ``key.ext``, split at the first dot of its last part; neighbouring members of one
key are a sample. Names are only ever looked at, never used as paths. A sample's *extent* is its
bytes in the archive, headers included, so one read gets all of it.

Archives are walked by the standard library; headers of plain files, where all others were checked
before or speed counts, are read here.
"""

from __future__ import annotations

import functools
import io
import itertools
import lzma
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from distcl.errors import DataError

BLOCK = 512
END = bytes(2 * BLOCK)
"""What closes an archive."""
NO_END = "it is truncated: the end mark is missing"

Member = tuple[str, int, bytes, str]
"""(name, first byte, data, what is wrong with it); the last has no name: there the archive ends."""

_REGULAR = (0x30, 0)  # type '0', or NUL in old archives
_PIECE = 1 << 18
_DAMAGED = (
    *(tarfile.TarError, EOFError, ValueError, OverflowError, MemoryError, LookupError),
    *(RecursionError, zlib.error, lzma.LZMAError),
)
_PICKLES = ("pickle", "pkl", "pyd", "pt", "pth", "joblib", "dill")
_SPARSE = ("GNU.sparse.", "SCHILY.realsize")  # extended headers of what is stored without its holes
_LABEL = b"V"  # a volume's name


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

    def __init__(self, header: bytes) -> None:
        super().__init__("not a plain file, or a long name")
        self.header = header
        self.number = 0
        """How many members came before it."""


def parse_header(header: bytes) -> tuple[str, int]:
    """Return (name, size) of a plain member's 512 bytes; else UnusualHeaderError."""
    if header[156] not in _REGULAR or header[124] & 0x80 or header[345]:
        raise UnusualHeaderError(header)
    name = _shown(header[:100].partition(b"\0")[0].decode("utf-8", "surrogateescape"))
    digits = header[124:136].strip(b"\0 ") or b"0"
    if not digits.isdigit() or b"8" in digits or b"9" in digits:
        raise DataError(f"member '{name}' has a damaged header")
    return name, int(digits, 8)


def _shown(name: str) -> str:
    """Return a name that can be printed, whatever its bytes are; equal for equal bytes only."""
    return name if name.isascii() else name.encode("utf-8", "backslashreplace").decode()


def split_name(name: str) -> tuple[str, str] | None:
    """Return (key, ext) of a member's name; None for files that are no part of a sample."""
    dot = name.find(".", name.rfind("/") + 1)
    if dot <= 0 or name[dot - 1] == "/" or dot + 1 == len(name):
        return None
    return name[:dot], name[dot + 1 :]


def unfit(info: tarfile.TarInfo) -> str:
    """Say why a member cannot be a part of a sample; '' if it can, or is a folder."""
    sparse = info.type == tarfile.GNUTYPE_SPARSE or info.issparse()
    if sparse or any(key.startswith(_SPARSE) for key in info.pax_headers):
        return "it is sparse, its holes are not in the archive; archive it without --sparse (-S)"
    if info.islnk():
        return f"it is a hard link to '{_shown(info.linkname)}'; archive with --hard-dereference"
    if info.issym():
        return f"it is a symbolic link to '{_shown(info.linkname)}'; archive with --dereference"
    if not (info.isreg() or info.isdir()):
        return f"it is no file, but of type '{info.type.decode('latin-1')}'"
    return ""


def cut_short(name: str, found: int, size: int) -> str:
    """Say that a member is truncated."""
    return f"member '{name}' is truncated: {found} of {size} bytes are there"


# -- a sample, from its extent --------------------------------------------------------------------


def read_members(extent: bytes) -> tuple[str, dict[str, bytes]]:
    """Return (key, ext → data) of a sample from the bytes of its extent. Local.

    Raises DataError naming the member if it is cut short, of another key, twice there, a pickle, a
    link or sparse.
    """
    key, members, at = "", dict[str, bytes](), 0
    try:
        while at + BLOCK <= len(extent):
            name, size = parse_header(extent[at : at + BLOCK])
            begin = at + BLOCK
            at = begin + -(-size // BLOCK) * BLOCK
            data = extent[begin : begin + size]
            if len(data) < size:
                raise DataError(cut_short(name, len(data), size))
            key = _collect(name, data, "", key, members)
    except UnusualHeaderError:
        key, members = "", {}
        try:
            for name, _, data, fault in walk(io.BytesIO(extent + END)):
                key = _collect(name, data, fault, key, members)
        except _DAMAGED as error:
            raise DataError(f"a header is damaged ({error})") from None
    if not members:
        raise DataError("there is no member where the index has a sample")
    return key, members


def _collect(name: str, data: bytes, fault: str, key: str, members: dict[str, bytes]) -> str:
    """Add a member to ``members``, unless it is no part of a sample; return the key."""
    pieces = split_name(name)
    if pieces is None:
        return key
    if key and pieces[0] != key:
        raise DataError(f"member '{name}' is where '{key}' should be: the index is of another file")
    if fault:
        raise DataError(f"member '{name}': {fault}")
    if pieces[1].lower() in members:
        raise DataError(f"member '{name}': it occurs twice")
    members[check_ext(pieces[1])] = data
    return pieces[0]


def key_of(extent: bytes) -> str:
    """Return the key of an extent's first member, for messages; '?' if it cannot be read."""
    raw = _shown(extent[:100].partition(b"\0")[0].decode("utf-8", "surrogateescape"))
    try:
        names = [name for name, *_ in itertools.islice(walk(io.BytesIO(extent + END)), 2)]
    except _DAMAGED:
        names = []
    for name in (*names, raw):
        if pieces := split_name(name):
            return pieces[0]
    return "?"


# -- an archive, from front to back ---------------------------------------------------------------


class _Forwards:
    """What the library needs of a file, of one that is only read forwards, and in pieces."""

    def __init__(self, file: IO[bytes], skips: bool) -> None:
        self._file = file
        self._skips = skips
        self._at = 0
        self.last = b""
        """What was read last."""

    def tell(self) -> int:
        return self._at

    def seek(self, at: int) -> None:
        if at < self._at:
            raise tarfile.ReadError("a header leads backwards")
        if self._skips:
            self._file.seek(at - self._at, 1)
            self._at = at
        while self._at < at and self.read(min(at - self._at, _PIECE)):
            pass

    def read(self, size: int) -> bytes:
        self.last = take(self._file, size)
        self._at += len(self.last)
        return self.last


def take(file: IO[bytes], size: int) -> bytes:
    """Read ``size`` bytes, fewer at the end; no more memory is used than there are bytes."""
    if size <= _PIECE:
        return file.read(size)
    pieces = []
    while size and (piece := file.read(min(size, _PIECE))):
        pieces.append(piece)
        size -= len(piece)
    return b"".join(pieces)


def walk(file: IO[bytes], skips: bool = True, data: bool = True) -> Iterator[Member]:
    """Yield every member of an archive but folders, in order; without ``data``, with none.

    ``skips``: whether the file can be read from elsewhere; if not, it is read through. Raises
    DataError if there is no end mark, or more after it, an error of ``_DAMAGED`` for other damage.
    """
    reader, begin = _Forwards(file, skips), 0
    with tarfile.open(fileobj=reader, mode="r:", encoding="utf-8") as archive:  # type: ignore[call-overload]
        while (info := archive.next()) is not None:
            archive.members.clear()  # it would keep all of them
            name, fault = _shown(info.name), unfit(info)
            if archive.offset <= begin or info.size < 0:  # the library would follow it, for ever
                raise tarfile.ReadError(f"member '{name}' has {info.size} bytes")
            begin = archive.offset
            if info.isdir() or info.type == _LABEL:
                continue
            content = b""
            if data and not fault:
                reader.seek(info.offset_data)
                content = reader.read(info.size)
                if len(content) < info.size:
                    raise DataError(cut_short(name, len(content), info.size))
            yield name, info.offset, content, fault
        if len(reader.last) < BLOCK:
            raise DataError(NO_END)
        if reader.last.strip(b"\0"):
            raise DataError(f"the header at byte {archive.offset} is damaged")
    check_end(file, reader.tell())
    yield "", archive.offset, b"", ""


def check_end(file: IO[bytes], at: int) -> None:
    """Read what follows the end mark, from byte ``at`` on: zeros, or it raises DataError."""
    while block := file.read(_PIECE):
        if block.count(0) != len(block):
            raise DataError(
                f"there is more after the end mark before byte {at}; archives are joined with "
                "tar --concatenate, not with cat"
            )
        at += len(block)


class TarStream:
    """Groups the members of one archive into samples, and says what is wrong with each.

    Keys are remembered by 64-bit hashes, so that one that comes again, however late, is found.
    """

    def __init__(self, where: str) -> None:
        self._where = where
        self._seen: set[int] = set()
        self._key = ""
        self.others: list[str] = []
        """Names of members that are no part of a sample."""

    def __call__(self, members: Iterator[Member]) -> Iterator[Extent]:
        """Yield the samples, in order.

        Raises DataError naming the shard when it is damaged or empty; all samples but the last
        before that place have been yielded by then.
        """
        try:
            yield from self._grouped(members)
        except DataError as error:
            raise DataError(f"{self._where}{self._after()}: {error}") from error
        except _DAMAGED as error:
            raise DataError(
                f"{self._where} is truncated, or no uncompressed tar{self._after()} ({error})"
            ) from None
        except OSError as error:
            reason = error.strerror or error
            raise DataError(f"{self._where} cannot be read{self._after()}: {reason}") from error

    def _after(self) -> str:
        return f", in or after sample '{self._key}'" if self._key else ""

    def _grouped(self, members: Iterator[Member]) -> Iterator[Extent]:
        begin, fault, found = 0, "", dict[str, bytes]()
        for name, at, data, wrong in members:
            pieces = split_name(name)
            if pieces is None and name:
                self.others.append(name)
                continue
            key, ext = pieces or ("", "")
            if key != self._key or not name:
                if self._key:
                    yield Extent(self._key, begin, at, found, fault)
                if not name:
                    continue  # to the end of ``members``: there a command may yet fail
                self._key, begin, fault, found = key, at, "", {}
                digest = hash(key)
                if digest in self._seen:
                    fault = f"member '{name}': another sample has the key '{key}' too"
                self._seen.add(digest)
            try:
                ext = check_ext(ext)
            except DataError as error:
                wrong = wrong or str(error)
            if ext in found:
                wrong = "it occurs twice"
            if wrong and not fault:
                fault = f"member '{name}': {wrong}"
            found[ext] = data
        if not self._key:
            raise DataError("it is empty: there are no samples in it")


def scan(path: Path, data: bool = True, others: list[str] | None = None) -> Iterator[Extent]:
    """Yield every sample of an archive, in order, reading it once from front to back. Local.

    Samples with a fault of their own (a pickle, a link, a sparse file, a key or a member that
    occurs twice) say so. ``data``: whether members have their bytes; ``others`` gets the names of
    members that are no part of a sample.
    Raises DataError naming the shard when it is missing, not a tar, compressed, truncated, damaged,
    goes on after its end mark, or has no samples; all but the last sample before that place have
    been yielded by then.
    """
    samples = TarStream(f"shard '{path.name}'")
    with open_archive(path) as file:
        yield from samples(walk(file, data=data))
    if others is not None:
        others += samples.others


def open_archive(path: Path) -> IO[bytes]:
    """Open an archive, as a local file whatever its name. Raises DataError naming the shard."""
    where = f"shard '{path.name}'"
    try:
        return path.open("rb")
    except FileNotFoundError:
        raise DataError(f"{where} is missing from '{path.parent}'") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{where} in '{path.parent}' cannot be read: {reason}") from error


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
