"""Signals that ask a run to save itself and stop."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType
from typing import Any

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


SAME_SECONDS = 1.0
"""Signals within this long of the first are the same request: SLURM sends one to a launcher and to
the processes that it started, and the launcher passes it on to them."""


class Preemption:
    """Notes the signals that ask the run to stop, and when its time is over. Local."""

    def __init__(self, max_minutes: float) -> None:
        self.reason = ""
        self._noted: float | None = None
        self._deadline = time.monotonic() + max_minutes * 60 if max_minutes else None
        self._before: dict[signal.Signals, Any] = {}

    def install(self) -> None:
        """Handle the signals from now on; only the main thread may."""
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                self._before[number] = signal.signal(number, self._note)

    def remove(self) -> None:
        """Give the signals back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    @property
    def asked(self) -> bool:
        """Whether this rank wants to stop."""
        if self._deadline is not None and time.monotonic() > self._deadline and not self.reason:
            self.reason = "run.max_minutes is over"
        return bool(self.reason)

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._noted is None:
            self._noted = now
            self.reason = self.reason or f"{signal.Signals(number).name} received"
        elif now - self._noted > SAME_SECONDS:  # at once; the last checkpoint is whole
            os._exit(128 + number)
