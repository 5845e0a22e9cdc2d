"""Errors a user can cause, each with its exit code. The command line turns them into one line."""

import os


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
