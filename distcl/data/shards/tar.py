"""Tar archives of samples, in WebDataset's layout. Nothing is ever extracted.

A member's name is ``key.ext``, split at the first dot of its last part; neighbouring members of one
key are a sample. Names are only ever looked at, never used as paths. A sample's *extent* is its
bytes in the archive, headers included, so one read gets all of it.

Headers of plain files are read here, five times as fast as by the standard library; from any other
header on, and whenever one is in doubt, the library reads.
"""

from __future__ import annotations

import functools
import io
import lzma
import struct
import tarfile
import zlib
from collections.abc import Generator, Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO, NamedTuple

from distcl.errors import DataError

BLOCK = 512
END = bytes(2 * BLOCK)
"""What closes an archive."""

Member = tuple[str, int, bytes, str]
"""(name, first byte, data, what is wrong with it); the last has no name: there the archive ends."""

_PIECE = 1 << 18
_DAMAGED = (
    *(tarfile.TarError, EOFError, ValueError, OverflowError, MemoryError, LookupError),
    *(RecursionError, zlib.error, lzma.LZMAError),
)
_PICKLES = ("pickle", "pkl", "pyd", "pt", "pth", "joblib", "dill")
_SPARSE = ("GNU.sparse.", "SCHILY.realsize")  # extended headers of what is stored without its holes
_LABEL = b"V"  # a volume's name
_HEADER = struct.Struct("100s24x11s13x8sc100x5s83xB166x").unpack
"""Name, size, checksum, type, magic, and the first byte of the name's prefix."""


class Extent(NamedTuple):
    """A sample in an archive: its key, first byte, the byte after its last, and its members.

    ``fault``: what is wrong with it, naming the member; '' if nothing.
    """

    key: str
    begin: int
    end: int
    members: dict[str, bytes]
    fault: str


# -- members --------------------------------------------------------------------------------------


def split_name(name: str) -> tuple[str, str] | None:
    """Return (key, ext) of a member's name; None for files that are no part of a sample."""
    dot = name.find(".", name.rfind("/") + 1)
    if dot <= 0 or name[dot - 1] == "/" or dot + 1 == len(name):
        return None
    return name[:dot], name[dot + 1 :]


@functools.lru_cache(1024)
def check_ext(ext: str) -> str:
    """Return an ext in lower case. Raises DataError if such a member would have to be unpickled."""
    if ext.lower().rpartition(".")[2] in _PICKLES:
        raise DataError(f"a member '.{ext}' is a pickle, which is refused: it could run any code")
    return ext.lower()


def _plain(header: bytes) -> tuple[str, int] | None:
    """Return (name, size) of a plain file's sound header; None for the library to judge."""
    if len(header) < BLOCK:
        return None
    name, size, checksum, kind, magic, prefix = _HEADER(header)
    if kind != b"0" or magic != b"ustar" or prefix or not size.isdigit():
        return None
    try:  # a checksum is the sum of all bytes, its own being blanks; Adler-32 has that sum plus 1
        total = int(checksum[:6], 8) - 8 * 32 + sum(checksum)
        if zlib.adler32(header) & 0xFFFF != total + 1:
            return None
        return _name_of(name), int(size, 8)
    except ValueError:
        return None


def _name_of(field: bytes) -> str:
    """Return a name that can be printed, whatever its bytes are."""
    return field.partition(b"\0")[0].decode("utf-8", "backslashreplace")


def _unfit(info: tarfile.TarInfo) -> str:
    """Say why a member cannot be a part of a sample; '' if it can, or is a folder."""
    sparse = info.type == tarfile.GNUTYPE_SPARSE or info.issparse()
    if sparse or any(key.startswith(_SPARSE) for key in info.pax_headers):
        return "it is sparse, its holes are not in the archive; archive it without --sparse (-S)"
    if info.islnk():
        return f"it is a hard link to '{info.linkname}'; archive with --hard-dereference"
    if info.issym():
        return f"it is a symbolic link to '{info.linkname}'; archive with --dereference"
    if not (info.isreg() or info.isdir()):
        return f"it is no file, but of type '{info.type.decode('latin-1')}'"
    return ""


def member_bytes(name: str, data: bytes) -> bytes:
    """Return a member, header and padding included; equal input gives equal bytes.

    Raises DataError if ``name`` is longer than the 100 bytes that a plain header holds.
    """
    if len(name.encode()) > 100:
        raise DataError(f"the member name '{name}' is longer than 100 bytes")
    info = tarfile.TarInfo(name)
    info.size = len(data)
    header = info.tobuf(tarfile.USTAR_FORMAT)  # mode 0644, owner and time 0
    return header + data + bytes(-len(data) % BLOCK)


# -- an archive, from front to back ---------------------------------------------------------------


class Forwards:
    """A file that is only read forwards, in pieces, and of which ``last`` was read before."""

    def __init__(self, file: IO[bytes], last: bytes, at: int = 0, skips: bool = False) -> None:
        self._file = file
        self._again = last
        self._at = at
        self._skips = skips
        self.last = last
        """What was read last."""

    def tell(self) -> int:
        """Return the place, where ``last`` was at ``at``."""
        return self._at

    def seek(self, at: int) -> None:
        """Skip what comes before ``at``; where the file cannot, it is read."""
        if at < self._at:
            raise tarfile.ReadError("a header leads backwards")
        if self._skips:
            self._file.seek(at - self._at, 1)
            self._at = at
        while self._at < at and self.read(min(at - self._at, _PIECE)):
            pass

    def read(self, size: int) -> bytes:
        """Read on."""
        first, self._again = self._again[:size], self._again[size:]
        self.last = first + take(self._file, size - len(first))
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


def walk(
    file: IO[bytes], data: bool = True, head: bytes = b"", whole: bool = True
) -> Iterator[Member]:
    """Yield every member of an archive but folders, in order; without ``data``, with none.

    The file is read through, or without ``data`` skipped through. ``head``: a first block that was
    read before; ``whole``: whether there is an end mark. Raises DataError if it is missing, or if
    there is more after it, an error of ``_DAMAGED`` for other damage.
    """
    at, header = 0, head or file.read(BLOCK)
    while plain := _plain(header):
        name, size = plain
        padded, content = -(-size // BLOCK) * BLOCK, b""
        if data:
            content = take(file, padded)
            if len(content) < size:
                raise DataError(_cut_short(name, len(content), size))
        else:
            file.seek(padded, 1)
        yield name, at, content[:size], ""
        at += BLOCK + padded
        header = file.read(BLOCK)
    if header.strip(b"\0"):
        reader = Forwards(file, header, at, skips=not data)
        at = yield from _by_library(reader, data)
        header = reader.last
    if len(header) < BLOCK and whole:
        raise DataError("it is truncated: the end mark is missing")
    if header.strip(b"\0"):
        raise DataError(f"the header at byte {at} is damaged")
    after = at + len(header)
    while block := file.read(_PIECE):
        if block.count(0) != len(block):
            raise DataError(
                f"there is more after the end mark before byte {after}; archives are joined with "
                "tar --concatenate, not with cat"
            )
        after += len(block)
    yield "", at, b"", ""


def _by_library(reader: Forwards, data: bool) -> Generator[Member, None, int]:
    """Yield the members from a header on; return where the last header that was read begins."""
    begin = -1
    with tarfile.open(  # type: ignore[call-overload]
        fileobj=reader, mode="r:", encoding="utf-8", errors="backslashreplace"
    ) as archive:
        for info in archive:
            archive.members.clear()  # it would keep all of them
            fault = _unfit(info)
            if archive.offset <= begin or info.size < 0:  # the library would follow it, for ever
                raise tarfile.ReadError(f"member '{info.name}' has {info.size} bytes")
            begin = archive.offset
            if info.isdir() or info.type == _LABEL:
                continue
            content = b""
            if data and not fault:
                reader.seek(info.offset_data)
                content = reader.read(info.size)
                if len(content) < info.size:
                    raise DataError(_cut_short(info.name, len(content), info.size))
            yield info.name, info.offset, content, fault
        return int(archive.offset)


def _cut_short(name: str, found: int, size: int) -> str:
    return f"member '{name}' is truncated: {found} of {size} bytes are there"


# -- samples --------------------------------------------------------------------------------------


def grouped(
    members: Iterator[Member], where: str = "", others: list[str] | None = None
) -> Iterator[Extent]:
    """Yield the samples that members make, in order, with what is wrong with each.

    A sample has a fault if it has a pickle, a link, a sparse file, a member twice, or a key that
    came before; keys are remembered by 64-bit hashes. ``others`` gets the names of members that are
    no part of a sample. Raises DataError, naming ``where`` if given, when the archive is damaged or
    has no samples; all samples but the last before that place have been yielded by then.
    """
    key, begin, fault, found, seen = "", 0, "", dict[str, bytes](), set[int]()
    try:
        for name, at, data, wrong in members:
            pieces = split_name(name)
            if pieces is None and name:
                if others is not None:
                    others.append(name)
                continue
            following, ext = pieces or ("", "")
            if following != key or not name:
                if key:
                    yield Extent(key, begin, at, found, fault)
                if not name:
                    continue  # to the end of ``members``: there a command may yet fail
                key, begin, fault, found = following, at, "", {}
                digest = hash(key)
                if digest in seen:
                    fault = f"member '{name}': another sample has the key '{key}' too"
                seen.add(digest)
            try:
                ext = check_ext(ext)
            except DataError as error:
                wrong = wrong or str(error)
            if ext in found:
                wrong = "it occurs twice"
            if wrong and not fault:
                fault = f"member '{name}': {wrong}"
            found[ext] = data
        if not key:
            raise DataError("it is empty: there are no samples in it")
    except (DataError, OSError, *_DAMAGED) as error:
        raise _broken(error, where, key) from error


def _broken(error: Exception, where: str, key: str) -> DataError:
    """Say what an archive's damage is, and, where that is of use, in or after which sample."""
    place = f"{where}, in or after sample '{key}'" if where and key else where
    if isinstance(error, DataError):
        return DataError(f"{place}: {error}" if place else str(error))
    if isinstance(error, OSError):
        return DataError(f"{place} cannot be read: {error.strerror or error}")
    return DataError(f"{place or 'it'} is truncated, or no uncompressed tar ({error})")


def scan(path: Path, data: bool = True, others: list[str] | None = None) -> Iterator[Extent]:
    """Yield every sample of an archive, reading it once from front to back. Local.

    ``data``: whether members have their bytes. Raises DataError naming the shard when it is
    missing, not a tar, compressed, or as :func:`grouped` does.
    """
    with open_archive(path) as file:
        yield from grouped(walk(file, data), f"shard '{path.name}'", others)


def read_members(extent: bytes) -> tuple[str, dict[str, bytes]]:
    """Return (key, ext → data) of a sample from the bytes of its extent. Local.

    Raises DataError naming the member if it is cut short, of another key, or at fault.
    """
    if (sound := _quickly(extent)) is not None:
        return sound
    first, *more = grouped(walk(io.BytesIO(extent), whole=False))
    if more:
        name = f"{more[0].key}.{next(iter(more[0].members))}"
        raise DataError(
            f"member '{name}' is where '{first.key}' should be: the index is of another file"
        )
    if first.fault:
        raise DataError(first.fault)
    return first.key, first.members


def _quickly(extent: bytes) -> tuple[str, dict[str, bytes]] | None:
    """Return a sample if all of it is plain and sound, in half the time; else None."""
    key, members, at = "", dict[str, bytes](), 0
    while at < len(extent) and (plain := _plain(extent[at : at + BLOCK])):
        pieces = split_name(plain[0])
        if pieces is None or (key and pieces[0] != key):
            return None
        key, ext = pieces[0], pieces[1].lower()
        begin, end = at + BLOCK, at + BLOCK + plain[1]
        if end > len(extent) or ext in members or ext.endswith(_PICKLES):
            return None
        members[ext] = extent[begin:end]
        at = end + -end % BLOCK
    return (key, members) if key and at == len(extent) else None


def key_of(extent: bytes) -> str:
    """Return the key of an extent's first member, for messages; '?' if it cannot be read."""
    names = list[str]()
    with suppress(DataError, *_DAMAGED):
        for name, *_ in walk(io.BytesIO(extent), whole=False):
            names.append(name)
    pieces = map(split_name, (*names, _name_of(extent[:100])))
    return next((piece[0] for piece in pieces if piece), "?")


# -- files ----------------------------------------------------------------------------------------


def open_archive(path: Path) -> IO[bytes]:
    """Open an archive, as a local file whatever its name. Raises DataError naming the shard."""
    try:
        return path.open("rb")
    except (OSError, ValueError) as error:
        raise refused(path, error) from None


def refused(path: Path, error: Exception) -> DataError:
    """Say what the system says of an archive."""
    if isinstance(error, FileNotFoundError):
        return DataError(f"shard '{path.name}' is missing from '{path.parent}'")
    reason = getattr(error, "strerror", None) or error
    return DataError(f"shard '{path.name}' in '{path.parent}' cannot be read: {reason}")
