"""Failure on one rank becomes failure on all, quickly, with the cause told once.

The rank that fails first writes its cause into the process group's store. A thread on every rank
looks there four times a second, so even a rank that waits inside a collective learns of it. Rank 0
tells the user and acknowledges; then everybody leaves. A rank that dies without a word (``kill
-9``) shows as a broken connection at the next collective, which is a failure like any other.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, TypeVar

from distcl.errors import DistclError, named, told

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

T = TypeVar("T")

_FAILED = "distcl/failed"
_TOLD = "distcl/told"
_POLL_SECONDS = 0.25
_READ_SECONDS = 2 * _POLL_SECONDS
"""How long rank 0, which may host the store, lets the others read it before it leaves."""
_TOLD_SECONDS = 5.0
ANSWER_SECONDS = 15.0
"""A store that takes longer is out of reach: a cable may be cut."""


@dataclass(frozen=True, slots=True)
class Cause:
    """Why the run ends: the first rank that failed, its exit code and message."""

    rank: int
    exit_code: int
    message: str


def answer_of(ask: Callable[[], T], seconds: float) -> T | None:
    """Return what ``ask`` returns of a store; None if it has not in time, or the store is gone."""
    answers: list[T] = []

    def asking() -> None:
        with suppress(RuntimeError):  # the store went with its host
            answers.append(ask())

    thread = threading.Thread(target=asking, name="distcl-ask", daemon=True)
    thread.start()
    thread.join(seconds)
    return answers[0] if answers else None


class FailureRelay:
    """Watches for the failure of any rank. Local calls; no collective.

    ``tell`` is called on rank 0, once, with the cause; then the process exits at once
    (``os._exit``), since its main thread may wait for a rank that is gone.
    """

    def __init__(self, store: Store, rank: int, tell: Callable[[Cause], None]) -> None:
        self._store = store
        self._rank = rank
        self.note: Callable[[Cause], None] = lambda _: None
        """Writes the cause down on rank 0 before others, and with them the launcher, go on."""
        self.tell = tell
        self._lock = threading.Lock()
        self._told = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="distcl-failure", daemon=True)
        self._thread.start()

    def report(self, cause: Cause) -> Cause:
        """Announce this rank's failure; return the cause that came first, which may be another's.

        On rank 0 the caller tells the user of the returned cause. On other ranks this waits until
        rank 0 has told, so that a launcher does not end rank 0 before it could; if rank 0 does not
        answer within seconds, this rank tells instead.
        """
        self._stop.set()
        with self._lock:
            told, self._told = self._told, True
        if told:  # the watching thread is about to end this process
            time.sleep(2 * _TOLD_SECONDS)
        try:
            first = self._announce(json.dumps(asdict(cause)))
            cause = Cause(**json.loads(first)) if first else cause
            if self._rank == 0 and first is not None:
                self.note(cause)
                self._store.set(_TOLD, "1")
                time.sleep(_READ_SECONDS)
                return cause
            deadline = time.monotonic() + _TOLD_SECONDS
            while first is not None and time.monotonic() < deadline:
                if self._store.check([_TOLD]):
                    return cause
                time.sleep(_POLL_SECONDS / 5)
        except RuntimeError:  # the store went with its host
            pass
        if self._rank != 0:
            self.tell(cause)
        return cause

    def _announce(self, text: str) -> str | None:
        """Return the cause that came before this one, or this one; None: the store is lost."""
        return answer_of(
            lambda: self._store.compare_set(_FAILED, "", text).decode(), ANSWER_SECONDS
        )

    def close(self) -> None:
        """Stop watching. Call it before a barrier and the end of the process group."""
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(_POLL_SECONDS):
            try:
                if not self._store.check([_FAILED]):
                    continue
                cause = Cause(**json.loads(self._store.get(_FAILED).decode()))
            except RuntimeError:
                cause = Cause(0, 1, "lost contact with rank 0, which is gone or unreachable")
                self._leave(cause, always_tell=True)
            self._leave(cause)

    def _leave(self, cause: Cause, always_tell: bool = False) -> None:
        with self._lock:
            if self._told:
                return
            self._told = True
        if self._rank == 0 or always_tell:
            self.tell(cause)
        if self._rank == 0:
            self._store.set(_TOLD, "1")
            time.sleep(_READ_SECONDS)
        os._exit(cause.exit_code)


class PeerFailure(DistclError):
    """Another rank failed first, or is gone; message and exit code are the first cause's."""

    def __init__(self, cause: Cause) -> None:
        super().__init__(f"rank {cause.rank}: {cause.message}")
        self.exit_code = cause.exit_code


def describe(error: BaseException, rank: int) -> Cause:
    """Return what to tell of an exception: our own errors as they are, others with their type.

    Those of the user's code are told with its file and line.
    """
    if isinstance(error, DistclError):
        return Cause(rank, error.exit_code, str(error))
    if isinstance(error, KeyboardInterrupt):
        return Cause(rank, 130, "interrupted from the keyboard")
    if is_connection_loss(error):
        first = str(error).strip().partition("\n")[0]
        return Cause(rank, 1, f"lost contact with another rank, which is gone or hangs ({first})")
    return Cause(rank, 1, told(error) or named(error))


def is_connection_loss(error: BaseException) -> bool:
    """Tell whether an exception is a backend's word for a peer that is gone or hangs."""
    signs = ("closed by peer", "onnection reset", "imed out", "Broken pipe", "NCCL", "refused")
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)
