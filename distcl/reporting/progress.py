"""``OUT/progress.json``, as the run writes it."""

from __future__ import annotations

import json
import math
import os
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from distcl.config.files import write_atomically
from distcl.reporting.status import FILE
from distcl.types import GROWING, WAITING, WATCHING, Progress

EVERY_SECONDS = 1.0
"""Least time between two writes of ``progress.json`` within one part of a run."""


class FolderProgress:
    """Passes everything on to another display, and keeps ``progress.json`` up to date. Rank 0.

    ``stages``: how many parts (pretraining and rounds) the run has; 0 where rounds start on drift,
    and watching the stream tells how far the run is, unless the stream may grow. A file that cannot
    be written is let be: the run's own files tell of a full disk soon enough.
    """

    def __init__(
        self,
        shown: Progress,
        folder: Path,
        stages: int,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._shown = shown
        self._folder = folder
        self._stages = stages
        self._clock = clock
        self._begun = self._written = clock()
        self._finished = -1  # stages done
        self._watched = 0  # samples of the stream that were watched
        self._share: float | None = 0.0  # of the stream
        self._first: float | None = None  # share of the run that was done when this process began
        self._state: dict[str, Any] = {}

    def round_begins(self, title: str, steps: int, metric: str = "loss") -> None:
        """Begin a part of the run."""
        self._finished += 1
        watching = title in (WATCHING, GROWING, WAITING)
        if title in (GROWING, WAITING):
            self._share = None
        self._state = {"title": title, "metric": metric, "of": steps, "watching": watching}
        self._write(self._watched if watching else 0, math.nan, 0.0)
        self._shown.round_begins(title, steps, metric)

    def resumed(self, finished: int) -> None:
        """Say that the run goes on after so many finished stages. Before the first of its own."""
        self._finished = finished - 1

    def step(self, done: int, value: float, samples_per_second: float) -> None:
        """Note how far the part has come."""
        waiting = self._state["title"] == WAITING
        if 0 < self._state["of"] <= done or self._clock() - self._written >= EVERY_SECONDS:
            self._write(done, value, samples_per_second)
        if not waiting:
            self._shown.step(done, value, samples_per_second)

    def message(self, text: str) -> None:
        """Pass it on."""
        self._shown.message(text)

    def _write(self, done: int, value: float, rate: float) -> None:
        part = done / self._state["of"] if self._state["of"] else 0.0
        if self._state["watching"]:
            self._watched = done
            if self._share is not None:
                self._share = part
        now = self._clock()
        self._written = now
        share = (self._finished + part) / self._stages if self._stages else self._share
        if self._first is None:
            self._first = share
        record = {
            "title": self._state["title"],
            "done": done,
            "of": self._state["of"],
            "metric": self._state["metric"],
            "value": value if math.isfinite(value) else None,
            "samples_per_second": rate or None,
            "share": share,
            "first_share": self._first,
            "begun": self._begun,
            "time": now,
            "host": socket.gethostname(),
            "pid": os.getpid(),
        }
        with suppress(OSError):
            write_atomically(self._folder / FILE, json.dumps(record) + "\n")
