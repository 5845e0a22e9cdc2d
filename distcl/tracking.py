"""Where the numbers of a run go. Rank 0 writes; on other ranks every tracker is empty."""

from __future__ import annotations

import json
import math
import os
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

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run must know, as plain values."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there: what was logged since is logged again, so it is taken back."""
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

    def state_dict(self) -> dict[str, Any]:
        """Return the state of every tracker, by its place."""
        return {str(k): tracker.state_dict() for k, tracker in enumerate(self._trackers)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        for k, tracker in enumerate(self._trackers):
            tracker.load_state_dict(state.get(str(k), {}))


class JsonlTracker:
    """One JSON object a line: ``round``, ``step``, ``time`` (Unix seconds), then the values.

    A value is a number, string, bool, None, or a list or dict of them. JSON has no NaN and no
    infinity: such a number becomes null, and the line's ``nonfinite`` maps its dotted name to
    "nan", "inf" or "-inf". Every line is flushed. An existing file is replaced, or with ``resume``
    kept, until ``load_state_dict`` cuts it. Raises UsageError if it cannot be written.
    """

    def __init__(self, path: Path, resume: bool = False) -> None:
        try:
            self._file = path.open("a" if resume else "w", encoding="utf-8")
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

    def state_dict(self) -> dict[str, Any]:
        """Return the length of the file in bytes."""
        return {"bytes": self._file.tell()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Cut the file to the length that it had."""
        if "bytes" in state and self._file.tell() > state["bytes"]:
            self._file.truncate(state["bytes"])
            self._file.seek(0, os.SEEK_END)


def create_tracker(config: TrackingConfig, out: Path, rank: int, resume: bool = False) -> Tracker:
    """Return this rank's tracker: those that are configured on rank 0, none on other ranks."""
    if rank != 0 or config.kind == "none":
        return Trackers()
    return Trackers([JsonlTracker(out / "metrics.jsonl", resume)])


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
