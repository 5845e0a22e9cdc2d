"""The run folder: what stands in ``OUT/`` besides checkpoints and metrics."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from distcl.config import Config
from distcl.config.load import to_toml
from distcl.errors import UsageError

_ORPHANS_SECONDS = 15.0

log = logging.getLogger("distcl")


class RunFolder:
    """``OUT/``: rank 0 writes, other ranks do nothing. Local calls."""

    def __init__(self, path: Path, config: Config, is_main: bool) -> None:
        self.path = path
        self._config = config
        self._is_main = is_main
        self._ready = False

    @contextmanager
    def open(self, append: bool = False) -> Iterator[None]:
        """Make the folder, lock it, and log into ``log.txt`` while inside (``append``: go on).

        Raises UsageError if it is not writable, or if another run has it.
        """
        if not self._is_main:
            yield
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = self._lock()
            self.write("config.toml", to_toml(self._config))
            handler = _LogFile(self.path / "log.txt", mode="a" if append else "w", encoding="utf-8")
        except OSError as error:
            raise self._not_writable(error) from error
        self._ready = True
        self.status("running", None, "")
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
        log.addHandler(handler)
        log.setLevel(logging.INFO)
        log.propagate = False
        try:
            yield
        finally:
            log.removeHandler(handler)
            handler.close()
            lock.close()

    def _lock(self) -> IO[str]:
        """Hold the folder as long as this process lives: the system lets go when it dies.

        Workers that a killed process leaves hold it too, until they notice seconds later.
        """
        lock = (self.path / ".lock").open("a+", encoding="utf-8")
        deadline = time.monotonic() + _ORPHANS_SECONDS
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                lock.seek(0)
                who = lock.read().strip()
            if not _is_dead(who) or time.monotonic() > deadline:
                lock.close()
                raise UsageError(
                    f"the run folder '{self.path}' is in use by another run ({who or 'unknown'}); "
                    "wait for it, or give --out another folder"
                )
            time.sleep(0.1)
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        lock.flush()
        return lock

    def write(self, name: str, text: str) -> None:
        """Replace a file as a whole: readers see the old or the new one. Raises UsageError."""
        temporary = self.path / f".{name}.{os.getpid()}"
        try:
            temporary.write_text(text + "\n", encoding="utf-8")
            temporary.replace(self.path / name)
        except OSError as error:
            raise self._not_writable(error) from error

    def status(self, state: str, exit_code: int | None, reason: str) -> None:
        """Write ``status.json``, if the folder is in use and this is rank 0.

        Raises UsageError if it cannot be written, unless the run is ending for another reason.
        """
        if not (self._is_main and self._ready):
            return
        me = {"host": socket.gethostname(), "pid": os.getpid()}  # where to send SIGUSR1
        status = {"state": state, "exit_code": exit_code, **me, "reason": reason}
        try:
            self.write("status.json", json.dumps(status))
        except UsageError:
            if exit_code in (None, 0):
                raise

    def _not_writable(self, error: OSError) -> UsageError:
        why = error.strerror or str(error)
        return UsageError(f"the run folder '{self.path}' is not writable: {why}")


class _LogFile(logging.FileHandler):
    """A log that ends quietly where the disk does; the run goes on."""

    def handleError(self, record: logging.LogRecord) -> None:
        """Let it be."""

    def close(self) -> None:
        """Close it; what the disk has no room for is lost."""
        with suppress(OSError):
            super().close()


def _is_dead(who: str) -> bool:
    """Tell whether the holder of a lock was a process of this machine that is gone."""
    words = who.split()
    if len(words) != 4 or words[3] != socket.gethostname() or not words[1].isdigit():
        return False
    try:
        os.kill(int(words[1]), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False
