"""Errors a user can cause, each with its exit code. The command line turns them into one line."""

from __future__ import annotations

import os
import sysconfig
import traceback
from pathlib import Path


class DistclError(Exception):
    """Base of every error whose message is meant for a user; ``exit_code`` ends the process."""

    exit_code = 1


class UsageError(DistclError):
    """A wrong command line, environment or way of starting the processes."""

    exit_code = 2


class ConfigError(UsageError):
    """A configuration that cannot be used; the message names the file and the key."""


class DataError(DistclError):
    """Data that cannot be used; the message names the file, shard, member or sample id."""

    exit_code = 3


class DivergenceError(DistclError):
    """Training left the finite numbers; the message names round, step and rank."""

    exit_code = 4


class CheckpointError(DistclError):
    """A checkpoint that cannot be used; the message names the file."""

    exit_code = 5


class Preempted(DistclError):
    """The run was asked to stop and saved its state; raised by all ranks at the same step."""

    exit_code = 75


def of_path(error: BaseException) -> BaseException:
    """Return the system's word on a path as a DataError that names it; other errors as they are."""
    if not isinstance(error, OSError) or not isinstance(error.filename, str | bytes):
        return error
    name = os.fsdecode(error.filename)
    return DataError(f"'{name}' cannot be used: {error.strerror or type(error).__name__}")


class UserCodeError(DistclError):
    """An exception of the user's own code; the message is that of :func:`told`."""


# Whose exception it is: what a model, loss, source or any other part of the user's raises is told
# as theirs, by file and line.

user_packages: set[str] = set()
"""Packages that a part was named from: the user's, also where they are installed."""

_OURS = f"{Path(__file__).parent}{os.sep}"
_COMMANDS = f"{_OURS}cli{os.sep}", f"{_OURS}api.py"
_LIBRARIES = ("<", *(f"{p}{os.sep}" for n, p in sysconfig.get_paths().items() if "lib" in n))
_INSTALLED = ("site-packages", "dist-packages")
_NEVER_THEIRS = {"distcl", "torch", "torchvision", "numpy"}
_MODULE = os.path.join("torch", "nn", "modules", "module.py")
_LONGEST = 500


def line_of_theirs(error: BaseException) -> str | None:
    """Return ``FILE, line N`` of the user's code that an exception comes from, or None. Local.

    That is the innermost line which is neither distcl's nor a library's, if distcl has called it
    (its commands, in ``cli`` and ``api``, call none), and if no line of distcl's lies further in.
    """
    if isinstance(error, SyntaxError) and error.filename and not _is_library(error.filename, ""):
        return f"{error.filename}, line {error.lineno}"
    called = False
    found: str | None = None
    for frame, line in traceback.walk_tb(error.__traceback__):
        file = frame.f_code.co_filename
        if file.startswith(_OURS):
            called, found = not file.startswith(_COMMANDS), None
        elif called and not _is_library(file, str(frame.f_globals.get("__name__", ""))):
            found = f"{file}, line {line}, in {frame.f_code.co_name}"
    return found


def raised_by_user(error: BaseException) -> bool:
    """Tell whether a line of the user's raised an exception itself, and nothing that it called."""
    *_, (innermost, _) = [(None, 0), *traceback.walk_tb(error.__traceback__)]
    if innermost is None or line_of_theirs(error) is None:
        return False
    return not _is_library(innermost.f_code.co_filename, str(innermost.f_globals.get("__name__")))


def told(error: BaseException) -> str | None:
    """Return one line on an exception of the user's own code; None if it is not theirs. Local.

    A layer of torch's in the model counts as theirs too, though none of their lines is in it.
    """
    where, layer = line_of_theirs(error), ""
    if where is not None:
        return f"{named(error)} (in your code: {where})"
    for frame, _ in traceback.walk_tb(error.__traceback__):
        file = frame.f_code.co_filename
        if file.startswith(_OURS):
            layer = ""
        elif file.endswith(_MODULE):
            layer = type(frame.f_locals.get("self")).__name__
    return f"{named(error)} (in the model, at its {layer})" if layer else None


def named(error: BaseException) -> str:
    """Return the type and the text of an exception, in one line."""
    text = " ".join(str(error.msg if isinstance(error, SyntaxError) else error).split())
    kind = type(error).__name__
    return f"{kind}: {text[:_LONGEST]}" if text else kind


def _is_library(file: str, module: str) -> bool:
    if module.partition(".")[0] in user_packages - _NEVER_THEIRS:
        return False
    return file.startswith(_LIBRARIES) or any(folder in file for folder in _INSTALLED)
