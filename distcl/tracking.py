"""Where the numbers of a run go. Rank 0 writes; on other ranks every tracker is empty."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from distcl.config import TrackingConfig
from distcl.errors import UsageError

_RESERVED = ("step", "time", "nonfinite")


class Tracker(Protocol):
    """One place that values go to. Local: called on every rank, does something on rank 0 only."""

    def log(self, values: dict[str, Any], step: int) -> None:
        """Record values at a step: the number of optimizer steps of the run so far."""
        ...

    def finish(self) -> None:
        """Write what is pending and close."""
        ...


class Trackers:
    """Several trackers as one; with none, nothing is recorded."""

    def __init__(self, trackers: Iterable[Tracker] = ()) -> None:
        self._trackers = list(trackers)

    def log(self, values: dict[str, Any], step: int) -> None:
        """Pass values on to every tracker."""
        for tracker in self._trackers:
            tracker.log(values, step)

    def finish(self) -> None:
        """Finish every tracker."""
        for tracker in self._trackers:
            tracker.finish()


class JsonlTracker:
    """One JSON object a line: ``round``, ``step``, ``time`` (Unix seconds), then the values.

    A value is a number, string, bool, None, or a list or dict of them. JSON has no NaN and no
    infinity: such a number becomes null, and the line's ``nonfinite`` maps its dotted name to
    "nan", "inf" or "-inf". Every line is flushed. An existing file is replaced. Raises UsageError
    if it cannot be written.
    """

    def __init__(self, path: Path) -> None:
        try:
            self._file = path.open("w", encoding="utf-8")
        except OSError as error:
            raise UsageError(f"cannot write '{path}': {error.strerror}") from error

    def log(self, values: dict[str, Any], step: int) -> None:
        """Write one line; the round is taken from ``values``, null if it is not there."""
        if not values.keys().isdisjoint(_RESERVED):
            raise ValueError("values may not be named step, time or nonfinite")
        nonfinite: dict[str, str] = {}
        record: dict[str, Any] = {"round": None, "step": step, "time": time.time()}
        record |= {name: _plain(value, name, nonfinite) for name, value in values.items()}
        if nonfinite:
            record["nonfinite"] = nonfinite
        self._file.write(json.dumps(record, allow_nan=False) + "\n")
        self._file.flush()

    def finish(self) -> None:
        """Close the file."""
        self._file.close()


def create_tracker(config: TrackingConfig, out: Path, rank: int) -> Tracker:
    """Return this rank's tracker: those that are configured on rank 0, none on other ranks."""
    if rank != 0 or config.kind == "none":
        return Trackers()
    return Trackers([JsonlTracker(out / "metrics.jsonl")])


def _plain(value: Any, name: str, nonfinite: dict[str, str]) -> Any:
    """Return ``value`` as JSON can hold it; numbers that it cannot hold are noted by name."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, dict):
        return {str(k): _plain(v, f"{name}.{k}", nonfinite) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v, f"{name}.{k}", nonfinite) for k, v in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        nonfinite[name] = str(value)
        return None
    return value
