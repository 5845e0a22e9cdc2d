"""Where the numbers of a run go. Rank 0 writes; on other ranks every tracker is empty."""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from distcl.errors import UsageError

_RESERVED = ("step", "time", "nonfinite")

log = logging.getLogger("distcl")


class Tracker(Protocol):
    """One place that values go to. Local: called on every rank, does something on rank 0 only.

    Calls of ``log`` are numbered from 0. A run that goes on from a checkpoint repeats those after
    it; a tracker holds each of them once all the same.
    """

    def log(self, values: dict[str, Any], step: int) -> None:
        """Record values at a step: the number of optimizer steps of the run so far.

        Values: numbers, strings, bools, None, lists and dicts of them, and ``Histogram``.
        """
        ...

    def summarize(self, summary: dict[str, Any]) -> None:
        """Record the contents of ``summary.json`` when the run is over."""
        ...

    def checkpoint(self, path: Path) -> None:
        """Record where a checkpoint, or the final weights, has been written."""
        ...

    def finish(self, ending: Ending = "done") -> None:
        """Write what is pending and close."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run must know, as plain values."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there: what was logged since will be logged again."""
        ...


class Trackers:
    """Several trackers as one; with none, nothing is recorded.

    A tracker that fails is dropped with one warning: tracking never stops training.
    """

    def __init__(
        self, trackers: Iterable[Tracker] = (), warn: Callable[[str], None] = log.warning
    ) -> None:
        self._trackers = list(trackers)
        self._warn = warn

    def log(self, values: dict[str, Any], step: int) -> None:
        """Pass values on to every tracker."""
        self._each(lambda tracker: tracker.log(values, step))

    def summarize(self, summary: dict[str, Any]) -> None:
        """Pass the summary on to every tracker."""
        self._each(lambda tracker: tracker.summarize(summary))

    def checkpoint(self, path: Path) -> None:
        """Pass it on to every tracker."""
        self._each(lambda tracker: tracker.checkpoint(path))

    def finish(self, ending: Ending = "done") -> None:
        """Finish every tracker, and drop it."""
        self._each(lambda tracker: tracker.finish(ending))
        self._trackers.clear()

    def state_dict(self) -> dict[str, Any]:
        """Return the state of every tracker, by its kind."""
        return {type(tracker).__name__: tracker.state_dict() for tracker in self._trackers}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned, also for a tracker that was not there."""
        self._each(lambda t: t.load_state_dict(state.get(type(t).__name__, {})))

    def _each(self, act: Callable[[Tracker], None]) -> None:
        for tracker in list(self._trackers):
            try:
                act(tracker)
            except Exception as error:  # whatever a service or its client raises
                self._trackers.remove(tracker)
                kind = type(tracker).__name__.removesuffix("Tracker").lower()
                self._warn(f"[tracking] {_failed(kind, error)}")


class JsonlTracker:
    """One JSON object a line: ``round``, ``step``, ``time`` (Unix seconds), then the values.

    JSON has no NaN and no infinity: such a number becomes null, and the line's ``nonfinite`` maps
    its dotted name to "nan", "inf" or "-inf". A histogram is its ``counts`` and ``edges``. Every
    line is flushed. An existing file is replaced, or with ``resume`` kept, until
    ``load_state_dict`` cuts it. Raises UsageError if it cannot be written.
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

    def summarize(self, summary: dict[str, Any]) -> None:
        """Do nothing: ``summary.json`` is beside the file."""

    def checkpoint(self, path: Path) -> None:
        """Do nothing."""

    def finish(self, ending: Ending = "done") -> None:
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


def _failed(kind: str, error: Exception) -> str:
    reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    return f"{kind} failed, so the run goes on without it: {reason}"


def _plain(value: Any, name: str, nonfinite: dict[str, str]) -> Any:
    """Return ``value`` as JSON can hold it; numbers that it cannot hold are noted by name."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, Histogram):
        held = value.trimmed()
        value = {"counts": held.counts.tolist(), "edges": held.edges.tolist()}
    if isinstance(value, dict):
        return {str(k): _plain(v, f"{name}.{k}", nonfinite) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v, f"{name}.{k}", nonfinite) for k, v in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        nonfinite[name] = str(value)
        return None
    return value


Ending = Literal["done", "preempted", "failed"]
"""How a process ends: the run is over; it will go on in another process; an error."""


# Values that trackers take, besides numbers, strings, lists and dicts.


@dataclass(frozen=True, slots=True)
class Histogram:
    """Counts int64 [b ≤ 64] of values between edges float64 [b + 1]."""

    counts: npt.NDArray[np.int64]
    edges: npt.NDArray[np.float64]

    def trimmed(self) -> Histogram:
        """Return it without empty bins at either end."""
        held = np.flatnonzero(self.counts)
        first, last = (int(held[0]), int(held[-1]) + 1) if len(held) else (0, 1)
        return Histogram(self.counts[first:last], self.edges[first : last + 1])


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested dicts as one, names joined by '/'."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{name}/")
        else:
            found[f"{prefix}{name}"] = value
    return found
