"""The run folder: what stands in ``OUT/`` besides checkpoints and metrics."""

from __future__ import annotations

import fcntl
import glob
import json
import logging
import os
import re
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from distcl.config import Config
from distcl.config.files import write_atomically
from distcl.config.load import to_toml
from distcl.config.paths import expanded
from distcl.errors import UsageError
from distcl.reporting.status import has_ended, read_json

_ORPHANS_SECONDS = 15.0
_SIGNS = ("status.json", "summary.json", "metrics.jsonl", "checkpoints")
"""What only a run leaves."""
_REST = ("config.toml", "log.txt", "progress.json", "tracking.json", "report.html", "draws")

log = logging.getLogger("distcl")


class RunFolder:
    """``OUT/``: rank 0 writes, other ranks do nothing. Local calls, unless they say otherwise.

    ``path``: the folder, or with ``numbered`` what its name begins with, see :meth:`open`.
    """

    def __init__(
        self,
        path: Path,
        config: Config,
        is_main: bool,
        command: str = "train",
        numbered: bool = False,
    ) -> None:
        self.path = path
        self.before: dict[str, Any] = {}
        """On rank 0, ``status.json`` of the run that goes on here; {} if there is none."""
        self._about = {"command": command, "name": path.name}
        self._numbered = numbered
        self._config = config
        self._is_main = is_main
        self._ready = False

    @contextmanager
    def open(
        self,
        resume: str = "never",
        overwrite: bool = False,
        share: Callable[[Path], Path] = lambda path: path,
    ) -> Iterator[Config]:
        """Make the folder, lock it, and log into ``log.txt`` while inside. Collective.

        Yields the configuration with the folder in it. ``numbered``: a run that begins takes the
        first of PATH, PATH-2, … after all that exist, one that goes on (``resume`` is auto) the
        last of them that holds a run of this command and name; a path in a run's own folder is
        that run. ``share`` returns rank 0's word on every rank.

        Raises UsageError, on rank 0, if the folder is not writable, if another run has it, or if
        it holds a run and neither ``resume`` nor ``overwrite`` says what is to become of it.
        """
        if overwrite and resume != "never":
            raise UsageError("--overwrite begins anew and --resume goes on: give one of them")
        lock: IO[str] | None = None
        handler: logging.Handler | None = None
        if self._is_main:
            try:
                lock = self._take(resume, overwrite)
                mode = "w" if resume == "never" else "a"
                handler = _LogFile(self.path / "log.txt", mode=mode, encoding="utf-8")
            except OSError as error:
                raise self._not_writable(error) from error
        self.path = share(self.path)
        run = self._config.run.model_copy(update={"out": str(self.path)})
        config = self._config.model_copy(update={"run": run})
        self._ready = True
        if lock is None or handler is None:
            yield config
            return
        self.write("config.toml", to_toml(config))
        self.status("running", None, "")
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
        log.addHandler(handler)
        log.setLevel(logging.INFO)
        log.propagate = False
        try:
            yield config
        finally:
            log.removeHandler(handler)
            handler.close()
            lock.close()

    def _take(self, resume: str, overwrite: bool) -> IO[str]:
        """Choose the folder and lock it; no other process that asks gets the same."""
        own = expanded(resume).resolve().parent.parent  # of a checkpoint
        if self._numbered and not overwrite:
            last = self._last() if resume == "auto" else None
            if resume not in ("auto", "never") and holds_run(own):
                last = own
            self.path = last or make_numbered(self.path)
        self.path.mkdir(parents=True, exist_ok=True)
        lock = self._lock()
        if holds_run(self.path):
            self.before = read_json(self.path, "status.json") or {}
            same = resume == "auto" or own == self.path.resolve()
            if overwrite:
                clear(self.path)
            elif not same:
                lock.close()
                raise UsageError(
                    f"the folder '{self.path}' holds a run: go on with it (--resume auto), replace "
                    "it (--overwrite), or give --out another folder"
                )
        return lock

    def _last(self) -> Path | None:
        """Return the newest of the numbered folders that holds a run of this command and name."""
        for path in reversed(numbered_folders(self.path)):
            if holds_run(path):
                status = read_json(path, "status.json") or {}
                if self._about.items() <= (self._about | status).items():
                    return path
        return None

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
            words = who.split()  # process PID on HOST
            dead = len(words) == 4 and words[1].isdigit() and has_ended(words[3], int(words[1]))
            if not dead or time.monotonic() > deadline:
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
        try:
            write_atomically(self.path / name, text + "\n")
        except OSError as error:
            raise self._not_writable(error) from error

    def status(self, state: str, exit_code: int | None, reason: str) -> None:
        """Write ``status.json``, if the folder is in use and this is rank 0; a failure is logged.

        Raises UsageError if it cannot be written, unless the run is ending for another reason.
        """
        if not (self._is_main and self._ready):
            return
        self._write_status(state, exit_code, reason)

    def failed_without_rank_0(self, exit_code: int, reason: str) -> None:
        """Write ``status.json`` in the place of rank 0, which cannot, unless it says so already."""
        with suppress(UsageError):
            found = read_json(self.path, "status.json") if self._ready else None
            if found is not None and found.get("state") == "running":
                self._write_status("failed", exit_code, reason)

    def _write_status(self, state: str, exit_code: int | None, reason: str) -> None:
        me = {"host": socket.gethostname(), "pid": os.getpid()}  # where to send SIGUSR1
        status = {"state": state, "exit_code": exit_code, **me, "reason": reason, **self._about}
        try:
            self.write("status.json", json.dumps(status))
        except UsageError:
            if exit_code in (None, 0):
                raise
        if state == "failed":
            with suppress(OSError), (self.path / "log.txt").open("a", encoding="utf-8") as file:
                file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} failed: {reason}\n")

    def _not_writable(self, error: OSError) -> UsageError:
        why = error.strerror or str(error)
        return UsageError(f"the run folder '{self.path}' is not writable: {why}")


def holds_run(folder: Path) -> bool:
    """Tell whether a folder holds a run, whatever became of it."""
    return any((folder / name).exists() for name in _SIGNS)


def protect(file: Path) -> None:
    """Raise UsageError if a file to be written is a folder, or a run's other than its report."""
    if file.is_dir():
        raise UsageError(f"'{file}' is a folder, not a file")
    own = file.name in (*_SIGNS, *_REST) and file.name != "report.html"
    if own and holds_run(file.parent):
        raise UsageError(f"'{file}' is part of a run: give another file")


def clear(folder: Path) -> None:
    """Remove what a run left in its folder, and nothing else."""
    for name in (*_SIGNS, *_REST):
        if (folder / name).is_dir():
            shutil.rmtree(folder / name)
        else:
            (folder / name).unlink(missing_ok=True)


def numbered_folders(path: Path) -> list[Path]:
    """Return what there is of PATH, PATH-2, PATH-3, …, in this order."""
    found = {}
    for one in path.parent.glob(f"{glob.escape(path.name)}*"):
        number = one.name.removeprefix(path.name)
        if number == "" or (re.fullmatch(r"-[1-9][0-9]{0,8}", number) and number != "-1"):
            found[int(number[1:] or 1)] = one
    return [found[k] for k in sorted(found)]


def next_numbered(path: Path) -> Path:
    """Return the first of PATH, PATH-2, PATH-3, … after all that exist."""
    last = [one.name for one in numbered_folders(path)[-1:]]
    if not last:
        return path
    return path.with_name(f"{path.name}-{int(last[0].removeprefix(path.name)[1:] or 1) + 1}")


def make_numbered(path: Path) -> Path:
    """Make the folder that :func:`next_numbered` names; of two processes each gets its own."""
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        found = next_numbered(path)
        with suppress(FileExistsError):
            found.mkdir()
            return found


class _LogFile(logging.FileHandler):
    """A log that ends quietly where the disk does; the run goes on."""

    def handleError(self, record: logging.LogRecord) -> None:
        """Let it be."""

    def close(self) -> None:
        """Close it; what the disk has no room for is lost."""
        with suppress(OSError):
            super().close()
