"""Paths that a user gives, in a configuration or on the command line: always of local files."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator

from distcl.errors import DataError, DistclError, UsageError


def expanded(path: str | os.PathLike[str]) -> Path:
    """Return a path with ``~`` and ``~user`` expanded; nothing else in it has a meaning.

    Raises UsageError for an empty one, as of a variable that is not set: it would be the folder
    that one is in.
    """
    if path == "":
        raise UsageError("a path is empty; '.' is the folder that you are in")
    return Path(os.path.expanduser(path))


def reachable(path: str | os.PathLike[str], error: type[DistclError] = DataError) -> Path:
    """Return :func:`expanded`; whether it is there can be asked without an OSError then. Local.

    Raises ``error`` naming a path that the system refuses: no permission, a name too long, links
    in a circle, a null byte.
    """
    found = expanded(path)
    try:
        found.stat()
    except (FileNotFoundError, NotADirectoryError):
        pass  # who needs it says what is missing
    except (OSError, ValueError) as refused:
        reason = getattr(refused, "strerror", None) or refused
        raise error(f"'{path}' cannot be used: {reason}") from None
    return found


def _text(value: str) -> str:
    if "\0" in value:
        raise ValueError(f"{value!r} is no path: it has a null byte")
    return os.path.expanduser(value)


PathText = Annotated[str, AfterValidator(_text)]
"""A key of the configuration that is a path; ``~`` is expanded as it is read."""
