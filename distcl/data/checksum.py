"""SHA-256 of data files, where the user says what it must be."""

from __future__ import annotations

import hashlib
from pathlib import Path

from distcl.config import StreamConfig
from distcl.data.npy import open_file
from distcl.errors import DataError


def check_files(config: StreamConfig) -> None:
    """Check every file that ``stream.sha256`` names. Local; reads each file once.

    Names are relative to ``stream.path``, or to its folder if it is a file; without a path, to the
    working folder. Raises DataError naming a file that is absent or has another digest.
    """
    base = Path(config.path).expanduser()
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
