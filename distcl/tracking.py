"""Where the numbers of a run go. Rank 0 writes; on other ranks every tracker is empty."""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import os
import time
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from distcl.config import TrackingConfig
from distcl.errors import ConfigError, UsageError
from distcl.tracking_service import Ending
from distcl.tracking_values import Histogram

_RESERVED = ("step", "time", "nonfinite")
_IDS = "tracking.json"
_PACKAGES = {"wandb": "wandb", "mlflow": "mlflow-skinny"}

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


def create_tracker(
    config: TrackingConfig,
    out: Path,
    rank: int,
    resume: bool = False,
    tell: Callable[[str], None] = log.info,
) -> Tracker:
    """Return this rank's tracker: those that are configured on rank 0, none on other ranks.

    ``resume``: go on with what the folder ``out`` holds, in the same runs. ``tell`` takes a line
    for the user. ``out/metrics.jsonl`` is written whenever there is any tracker. Raises ConfigError
    if a package is not installed; a service that cannot be used is left out, with a warning.
    """
    if rank != 0 or config.kinds == ["none"]:
        return Trackers()
    for kind in config.kinds:
        package = _PACKAGES.get(kind, "json").partition("-")[0]
        if importlib.util.find_spec(package) is None:
            raise ConfigError(
                f"tracking.kind = '{kind}' needs the package {_PACKAGES[kind]}: "
                f"pip install 'distcl[{kind}]'"
            )
    trackers: list[Tracker] = [JsonlTracker(out / "metrics.jsonl", resume)]
    for kind in config.kinds:
        try:
            if kind == "wandb":
                from distcl.tracking_wandb import WandbTracker

                trackers.append(WandbTracker(config, out, _id(out, kind, resume), tell))
            elif kind == "mlflow":
                from distcl.tracking_mlflow import MlflowTracker

                trackers.append(MlflowTracker(config, out, _id(out, kind, resume), tell))
        except Exception as error:  # whatever a service or its client raises
            tell(f"[tracking] {_failed(kind, error)}")
    return Trackers(trackers, tell)


def _failed(kind: str, error: Exception) -> str:
    reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    return f"{kind} failed, so the run goes on without it: {reason}"


def _id(out: Path, kind: str, resume: bool) -> str:
    """Return the id of the run at a service: of ``out/tracking.json`` if it goes on, else new."""
    path = out / _IDS
    known: dict[str, str] = {}
    if path.exists():
        known = json.loads(path.read_text(encoding="utf-8"))
    if not resume or kind not in known:
        known[kind] = uuid.uuid4().hex[:12]
        temporary = path.with_name(f".{_IDS}")
        temporary.write_text(json.dumps(known) + "\n", encoding="utf-8")
        temporary.replace(path)
    return known[kind]


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
