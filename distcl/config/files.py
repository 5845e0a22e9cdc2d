"""Files that are there as a whole or not at all, and what they are recognized by. Local."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


def write_atomically(
    path: Path, content: str | bytes | Callable[[Path], object], sync: bool = False
) -> None:
    """Replace a file: readers see the old or the new one, after a failure too. Raises OSError.

    ``content``: text (written as UTF-8), bytes, or what writes a file at the path that it is given.
    ``sync``: wait until it is on the disk, so that this holds after a power cut as well.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        if callable(content):
            content(part)
        else:
            part.write_bytes(content.encode() if isinstance(content, str) else content)
        if sync:
            sync_to_disk(part)
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def sync_to_disk(path: Path) -> None:
    """Wait until a file, or the entries of a folder, are on the disk. Raises OSError."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def file_stamp(path: Path) -> dict[str, Any]:
    """Return what tells a file from another one of its name. Raises OSError."""
    stat = path.stat()
    return {"path": str(path.resolve()), "bytes": stat.st_size, "time": stat.st_mtime_ns}


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file, in hex. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
