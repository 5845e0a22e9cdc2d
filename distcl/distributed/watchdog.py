"""Says which rank hangs, and where: a rank that waits for it looks just as still.

The main thread beats whenever it gets on: at every step, chunk and collective. A thread beside it
notices when it has not for long, and puts into the process group's store whether the main thread
waits in a collective, and its stack. Rank 0 reads what all of them have put there, names those that
do not wait, and logs the stacks. Nobody is stopped for it: a collective has a timeout of its own.

A main thread that never lets go of the interpreter silences that thread too. Then Python's
``faulthandler`` writes its stack, from outside the interpreter, and ends the process.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import sys
import threading
import time
import traceback
from pathlib import Path
from types import FrameType
from typing import IO, TYPE_CHECKING, Any

from distcl.distributed.failure import ANSWER_SECONDS, answer_of

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

_WAITING = ("/torch/distributed/", "/torch/autograd/graph.py")
"""Files of the innermost frames of a main thread that waits for other ranks: in a collective, or in
one within backward."""

log = logging.getLogger("distcl")


class Watchdog:
    """Watches this process's main thread while entered. Local calls.

    ``seconds``: what a collective may take at most; half of that without a beat is too long.
    ``store``: the process group's, None for a process alone.
    """

    def __init__(self, rank: int, world_size: int, seconds: float, store: Store | None) -> None:
        self._rank = rank
        self._world_size = world_size
        self._seconds = seconds
        self._patience = min(ANSWER_SECONDS, seconds / 8)
        self._store = store
        self._beats = self._seen = 0
        self._stuck = False
        self._mine = ""
        self._file: IO[str] = sys.stderr
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def beat(self) -> None:
        """Note that the main thread gets on."""
        self._beats += 1

    def write_to(self, path: Path) -> None:
        """Let ``faulthandler`` append to this file, where its folder can be reached from here."""
        try:
            self._file = path.open("a", encoding="utf-8")
        except OSError:  # then to stderr, as before
            return

    def __enter__(self) -> None:
        main = threading.main_thread().ident
        self._arm()
        self._thread = threading.Thread(
            target=self._watch, args=(main,), name="distcl-watchdog", daemon=True
        )
        self._thread.start()

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()  # it waits for a store for two seconds at most
        faulthandler.cancel_dump_traceback_later()
        if self._file is not sys.stderr:
            self._file.close()

    def verdict(self) -> str:
        """Return which ranks hang, and where; '' if this process has not waited for long."""
        if not self._stuck or self._beats != self._seen or self._store is None:
            return ""
        return "; ".join(_hanging(self._found() or []))

    def _arm(self) -> None:
        """Let faulthandler strike unless this is called again in time."""
        if self._world_size > 1:
            faulthandler.dump_traceback_later(self._seconds, exit=True, file=self._file)

    def _watch(self, main: int) -> None:
        every = min(1.0, self._seconds / 8)
        since = time.monotonic()
        while not self._stop.wait(every):
            self._arm()
            if self._beats != self._seen:
                if self._stuck:
                    self._tell(None)
                    log.warning("[watchdog] rank %d gets on again", self._rank)
                self._seen, since, self._stuck = self._beats, time.monotonic(), False
            elif not self._stuck and time.monotonic() - since > self._seconds / 2:
                self._stuck = True
                self._tell(sys._current_frames().get(main))
                if self._rank == 0:
                    self._stop.wait(2 * every)  # others notice a little later
                    self._log(self._found())

    def _tell(self, frame: FrameType | None) -> None:
        """Put into the store where the main thread is; None: it gets on."""
        told = "" if frame is None else json.dumps(_describe(frame))
        self._mine = told
        if self._store is not None:
            store, key = self._store, f"distcl/stuck/{self._rank}"
            answer_of(lambda: store.set(key, told), self._patience)

    def _found(self) -> list[dict[str, Any] | None] | None:
        """Return what every rank has told, None for nothing; None if the store is out of reach."""
        if self._store is None:
            return [json.loads(self._mine)]
        store, keys = self._store, [f"distcl/stuck/{rank}" for rank in range(self._world_size)]

        def read() -> list[str]:
            return [store.get(key).decode() if store.check([key]) else "" for key in keys]

        told = answer_of(read, self._patience)
        return None if told is None else [json.loads(one) if one else None for one in told]

    def _log(self, found: list[dict[str, Any] | None] | None) -> None:
        named = "the other ranks cannot be asked"
        if found is not None:
            named = "; ".join(_hanging(found)) or "every rank waits for another"
        log.warning("[watchdog] no progress for %.0f s: %s", self._seconds / 2, named)
        for rank, told in enumerate(found or ()):
            if told is not None:
                log.warning("[watchdog] stack of rank %d:\n%s", rank, told["stack"])


def _describe(frame: FrameType) -> dict[str, Any]:
    stack = traceback.extract_stack(frame)
    last = stack[-1]
    return {
        "waits": any(part in entry.filename for entry in stack[-3:] for part in _WAITING)
        and not any("importlib" in entry.filename for entry in stack),
        "at": f"{last.filename}:{last.lineno} in {last.name}",
        "stack": "".join(traceback.format_list(stack)),
    }


def _hanging(found: list[dict[str, Any] | None]) -> list[str]:
    """Return a clause for each rank that hangs."""
    clauses = []
    for rank, told in enumerate(found):
        if told is None:
            clauses.append(f"rank {rank} does not answer: it hangs, or is slow")
        elif not told["waits"]:
            clauses.append(f"rank {rank} hangs at {told['at']}")
    return clauses
