"""Failure on one rank becomes failure on all, quickly, with the cause told once.

The rank that fails first writes its cause into the process group's store. A thread on every rank
looks there four times a second, so even a rank that waits inside a collective learns of it. Rank 0
tells the user and acknowledges; then everybody leaves. A rank that dies without a word (``kill
-9``) shows as a broken connection at the next collective, which is a failure like any other.

A process that is stopped, or whose node is gone, breaks no connection. So each rank counts up in
the store, rank 0 looks at all counts and the others at rank 0's; one that stands still for the
timeout is a failure, and so is a store that says nothing for as long: rank 0 may host it.
"""

from __future__ import annotations

import json
import math
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, TypeVar

from distcl.errors import DistclError, named, of_path, raised_by_user, told

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

T = TypeVar("T")

_FAILED = "distcl/failed"
_TOLD = "distcl/told"
_POLL_SECONDS = 0.25
_READ_SECONDS = 2 * _POLL_SECONDS
"""How long rank 0, which may host the store, lets the others read it before it leaves."""
_TOLD_SECONDS = 5.0
_QUIET_SECONDS = 3.0
"""Who answers later than this is not waited for when this process ends on a failure."""
ANSWER_SECONDS = 2.0
"""A store that takes longer is out of reach: a cable may be cut, or its process be stopped."""
_ALIVE = "distcl/alive"
_LATER_SECONDS = 1.0
"""A collective that times out on the same account knows more, and is to be first."""


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

    def __init__(
        self,
        store: Store,
        rank: int,
        tell: Callable[[Cause], None],
        world_size: int = 1,
        timeout: float = math.inf,
    ) -> None:
        self._store: Store = store.clone()  # type: ignore[attr-defined]  # of its own
        self._rank = rank
        self.note: Callable[[Cause], None] = lambda _: None
        """Writes the cause down on rank 0 before others, and with them the launcher, go on."""
        self.tell = tell
        self._timeout = timeout
        self._every = min(1.0, timeout / 8)
        self._lock = threading.Lock()
        self._told = False
        self._stop = threading.Event()
        peers = range(1, world_size) if rank == 0 else [0]
        self._counts = {peer: ("", time.monotonic()) for peer in peers}
        """What each rank that is watched here had counted up to, and when that was news."""
        self._heard = time.monotonic()
        """When the store last answered."""
        watches = {"distcl-failure": self._watch, "distcl-silence": self._listen}
        self._threads = [
            threading.Thread(target=watch, name=name, daemon=True)
            for name, watch in watches.items()
        ]
        for thread in self._threads:
            thread.start()

    def missing(self) -> str:
        """Tell which ranks give no sign of life, after a connection broke or a wait timed out.

        Waits for a few counts at most; another rank may know more, and its word ends this process.
        """
        begun = {peer: found for peer, found in self._counts.items() if found[0]}
        now = time.monotonic()
        still = [peer for peer, (_, news) in begun.items() if now - news > _QUIET_SECONDS]
        until = now + 3 * self._every
        while not still and (now := time.monotonic()) < until + (self._rank > 0):  # rank 0 first
            time.sleep(_POLL_SECONDS / 5)
            if now > until - self._every / 2:
                still = [peer for peer, found in begun.items() if found == self._counts[peer]]
        return "; ".join(f"rank {peer} gives no sign of life" for peer in still)

    def report(self, cause: Cause) -> Cause:
        """Announce this rank's failure; return the cause that came first, which may be another's.

        On rank 0 the caller tells the user of the returned cause. On other ranks this waits until
        rank 0 has told, so that a launcher does not end rank 0 before it could; if rank 0 does not
        answer within seconds, this rank tells instead, and the process exits.
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
            while first is not None and not self._silent and time.monotonic() < deadline:
                if self._store.check([_TOLD]):
                    return cause
                time.sleep(_POLL_SECONDS / 5)
        except RuntimeError:  # the store went with its host
            pass
        if self._rank != 0:
            self.tell(cause)
            os._exit(cause.exit_code)
        return cause

    @property
    def _silent(self) -> bool:
        """Whether rank 0 has not counted for seconds, as seen from another."""
        return self._rank != 0 and time.monotonic() - self._counts[0][1] > _QUIET_SECONDS

    def _announce(self, text: str) -> str | None:
        """Return the cause that came before this one, or this one; None: the store is lost."""
        if time.monotonic() - self._heard > _QUIET_SECONDS:
            return None
        return answer_of(
            lambda: self._store.compare_set(_FAILED, "", text).decode(), ANSWER_SECONDS
        )

    def close(self) -> None:
        """Stop watching. Call it before a barrier and the end of the process group."""
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _watch(self) -> None:
        """Look for failures, and count up; a store that is out of reach may block this."""
        count, due = 0, 0.0
        keys = [f"{_ALIVE}/{peer}" for peer in self._counts]
        all_there = False
        while not self._stop.wait(_POLL_SECONDS):
            try:
                failed = self._store.check([_FAILED])
                self._heard = now = time.monotonic()
                if failed:
                    cause = Cause(**json.loads(self._store.get(_FAILED).decode()))
                    self._leave(cause)
                elif now >= due and math.isfinite(self._timeout):
                    count, due = count + 1, now + self._every
                    self._store.set(f"{_ALIVE}/{self._rank}", str(count))
                    all_there = all_there or self._store.check(keys)
                    if all_there:
                        self._compare(self._store.multi_get(keys))
            except RuntimeError:
                cause = Cause(0, 1, "lost contact with rank 0, which is gone or unreachable")
                self._leave(cause, always_tell=True)

    def _compare(self, told: list[bytes]) -> None:
        """Note which counts are news."""
        now = time.monotonic()
        for (peer, (before, _)), found in zip(list(self._counts.items()), told, strict=True):
            if found.decode() != before:
                self._counts[peer] = found.decode(), now

    def _listen(self) -> None:
        """End this process once the store, or a rank, has said nothing for the timeout."""
        last = time.monotonic()
        while not self._stop.wait(_POLL_SECONDS):
            before, last = last, time.monotonic()
            if last - before > _QUIET_SECONDS:  # this very process was stopped, or the machine
                self._heard = last
                self._counts = {peer: (count, last) for peer, (count, _) in self._counts.items()}
            rank, since = 0, self._heard
            for peer, (count, news) in list(self._counts.items()):
                if count and news < since:
                    rank, since = peer, news
            if last - since <= self._timeout + _LATER_SECONDS:
                continue
            what = "is stopped, or its node is out of reach"
            cause = Cause(rank, 1, f"no sign of life for {self._timeout:.0f} s: it {what}")
            if self._rank == 0 and rank == 0:
                told = f"the store of the process group says nothing for {self._timeout:.0f} s: "
                cause = Cause(0, 1, f"{told}the launcher that holds it {what}")
            first = self._announce(json.dumps(asdict(cause)))
            cause = Cause(**json.loads(first)) if first else cause
            self._leave(cause, always_tell=True)

    def _leave(self, cause: Cause, always_tell: bool = False) -> None:
        with self._lock:
            if self._told:
                return
            self._told = True
        if self._rank == 0 or always_tell:
            self.tell(cause)
        if self._rank == 0:
            answer_of(lambda: self._store.set(_TOLD, "1"), ANSWER_SECONDS)
            time.sleep(_READ_SECONDS)
        elif not always_tell:  # a launcher ends all as soon as one is gone, and rank 0 is to tell
            time.sleep(2 * _READ_SECONDS)
        os._exit(cause.exit_code)


class PeerFailure(DistclError):
    """Another rank failed first, or is gone; message and exit code are the first cause's."""

    def __init__(self, cause: Cause) -> None:
        super().__init__(f"rank {cause.rank}: {cause.message}")
        self.exit_code = cause.exit_code


def cause_of(error: BaseException, rank: int) -> Cause:
    """Return what to tell of an exception: our own errors as they are, others with their type.

    Those of the user's code are told with its file and line.
    """
    theirs = told(error)
    error = error if theirs else of_path(error)
    if isinstance(error, DistclError):
        return Cause(rank, error.exit_code, str(error))
    if isinstance(error, KeyboardInterrupt):
        return Cause(rank, 130, "interrupted from the keyboard")
    if is_connection_loss(error):
        first = str(error).strip().partition("\n")[0]
        return Cause(rank, 1, f"lost contact with another rank, which is gone or hangs ({first})")
    return Cause(rank, 1, theirs or named(error))


def is_connection_loss(error: BaseException) -> bool:
    """Tell whether an exception is a backend's word for a peer that is gone or hangs."""
    signs = ("closed by peer", "onnection reset", "imed out", "Broken pipe", "NCCL", "refused")
    found = isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)
    return found and not raised_by_user(error)
