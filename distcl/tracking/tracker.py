"""Where the numbers of a run go. Rank 0 writes; on other ranks every tracker is empty."""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import time
import tomllib
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from distcl import __version__
from distcl.config import TrackingConfig
from distcl.errors import UsageError

_RESERVED = ("step", "time", "nonfinite")

log = logging.getLogger("distcl")


Draw = Callable[[Path], None]
Ending = Literal["done", "preempted", "failed"]
"""How a process ends: the run is over; it will go on in another process; an error."""
_STATUS: dict[Ending, str] = {"done": "FINISHED", "preempted": "KILLED", "failed": "FAILED"}


@dataclass(frozen=True, slots=True)
class Histogram:
    """A value that trackers take: counts int64 [b ≤ 64] between edges float64 [b + 1]."""

    counts: npt.NDArray[np.int64]
    edges: npt.NDArray[np.float64]

    def trimmed(self) -> Histogram:
        """Return it without empty bins at either end."""
        held = np.flatnonzero(self.counts)
        first, last = (int(held[0]), int(held[-1]) + 1) if len(held) else (0, 1)
        return Histogram(self.counts[first:last], self.edges[first : last + 1])


class Tracker:
    """One place that values go to, or none. Local: called on every rank, does its work on rank 0.

    Calls of ``log`` are numbered from 0. A run that goes on from a checkpoint repeats those after
    it; a tracker holds each of them once all the same.
    """

    kind = ""

    def log(self, values: dict[str, Any], step: int) -> None:
        """Record values at a step: the number of optimizer steps of the run so far.

        Values: numbers, strings, bools, None, lists and dicts of them, and ``Histogram``.
        """

    def summarize(self, summary: dict[str, Any], draw: Draw | None = None) -> None:
        """Record the contents of ``summary.json`` when the run is over.

        ``draw`` writes the accuracy matrix as a PNG file, for a tracker that takes images.
        """

    def checkpoint(self, path: Path) -> None:
        """Record where a checkpoint, or the final weights, has been written."""

    def finish(self, ending: Ending = "done") -> None:
        """Write what is pending and close."""

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run must know, as plain values."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there: what was logged since will be logged again."""


class Trackers(Tracker):
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

    def summarize(self, summary: dict[str, Any], draw: Draw | None = None) -> None:
        """Pass the summary on to every tracker."""
        self._each(lambda tracker: tracker.summarize(summary, draw))

    def checkpoint(self, path: Path) -> None:
        """Pass it on to every tracker."""
        self._each(lambda tracker: tracker.checkpoint(path))

    def finish(self, ending: Ending = "done") -> None:
        """Finish every tracker, and drop it."""
        self._each(lambda tracker: tracker.finish(ending))
        self._trackers.clear()

    def state_dict(self) -> dict[str, Any]:
        """Return the state of every tracker, by its kind."""
        return {tracker.kind: tracker.state_dict() for tracker in self._trackers}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned, also for a tracker that was not there."""
        self._each(lambda tracker: tracker.load_state_dict(state.get(tracker.kind, {})))

    def _each(self, act: Callable[[Tracker], None]) -> None:
        for tracker in list(self._trackers):
            try:
                act(tracker)
            except Exception as error:  # whatever a service or its client raises
                self._trackers.remove(tracker)
                self._warn(f"[tracking] {failure(tracker.kind, error)}")


class JsonlTracker(Tracker):
    """One JSON object a line: ``round``, ``step``, ``time`` (Unix seconds), then the values.

    JSON has no NaN and no infinity: such a number becomes null, and the line's ``nonfinite`` maps
    its dotted name to "nan", "inf" or "-inf". A histogram is its ``counts`` and ``edges``. Every
    line is flushed. An existing file is replaced, or with ``resume`` kept, until
    ``load_state_dict`` cuts it. Raises UsageError if it cannot be written.
    """

    kind = "jsonl"

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


class ServiceTracker(Tracker):
    """Sends what the service lacks. ``id``: of the run at the service, to go on in it.

    Calls are numbered, so that the run there has each of them once. ``held``: calls that it has
    from earlier processes of the run. ``metrics.jsonl`` has every call; a run that goes on from a
    checkpoint first sends from there what was lost on the way to the service, then leaves out what
    it had got beyond the checkpoint.
    """

    def __init__(self, out: Path, run_id: str, held: int = 0) -> None:
        self.id = run_id
        self._out = out
        self._held = held
        self._calls = 0

    @abstractmethod
    def send(self, values: dict[str, Any], step: int, call: int) -> None:
        """Send the values of one call of ``log``, the call-th of the run from 0 on."""

    def log(self, values: dict[str, Any], step: int) -> None:
        """Send values, unless the run has them."""
        if self._calls >= self._held:
            self.send(values, step, self._calls)
        self._calls += 1

    def state_dict(self) -> dict[str, Any]:
        """Return how many calls of ``log`` there were, and the run's id."""
        return {"calls": self._calls, "id": self.id}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on after the calls in ``metrics.jsonl``, which has been cut to the checkpoint."""
        self._calls = 0
        for values, step in recorded(self._out / "metrics.jsonl"):
            self.log(values, step)


class AccelerateTracker(ServiceTracker):
    """The numbers of each call, at a service that ``accelerate.tracking`` knows by name.

    What earlier processes sent is counted in ``metrics.jsonl``, where they wrote it first.
    """

    def __init__(self, kind: str, config: TrackingConfig, out: Path, run_id: str) -> None:
        from accelerate import PartialState
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        held = (out / "metrics.jsonl").read_bytes().count(b"\n") if run_id else 0
        super().__init__(out, run_id or kind, held)
        self.kind = kind
        self._step = 0
        PartialState()  # which its logging asks for; there is one, where there is a Runtime
        arguments, options = _arguments(kind, config, out, run_id)
        self._service = LOGGER_TYPE_TO_CLASS[kind](*arguments, **options)
        self._service.main_process_only = False  # this is rank 0
        self._service.start()
        if kind in _ID_OF:
            self.id = str(_ID_OF[kind](self._service.tracker))
        if not run_id:
            told = flat_values(config_of(out)) | {"distcl_version": __version__}
            # MLflow takes 500 characters.
            short = {key.replace("/", "."): str(value)[:500] for key, value in told.items()}
            self._service.store_init_configuration(short)

    def send(self, values: dict[str, Any], step: int, call: int) -> None:
        """Log the numbers among the values."""
        self._step = step
        numbers = {
            name: value
            for name, value in flat_values(values).items()
            if isinstance(value, int | float) and not isinstance(value, bool)
        }
        self._service.log(numbers, step=step)

    def summarize(self, summary: dict[str, Any], draw: Draw | None = None) -> None:
        """Log the final numbers."""
        AccelerateTracker.send(self, {"final": summary}, self._step, self._calls)

    def finish(self, ending: Ending = "done") -> None:
        """Close the run, or this process's part of it."""
        self._service.finish()


class MlflowTracker(AccelerateTracker):
    """MLflow: the metric ``call`` is the number of the call, and tells what the run has.

    The server is MLFLOW_TRACKING_URI; without it, files in ``OUT/mlruns``.
    """

    def __init__(self, kind: str, config: TrackingConfig, out: Path, run_id: str) -> None:
        import mlflow

        self._mlflow: Any = mlflow
        self._files = not os.environ.get("MLFLOW_TRACKING_URI")
        if self._files:
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # else it refuses files
            mlflow.set_tracking_uri((out / "mlruns").absolute().as_uri())
            os.environ.pop("MLFLOW_TRACKING_URI", None)  # which that sets: not for the next run
        super().__init__(kind, config, out, run_id)
        self._held = int(self._service.tracker.data.metrics.get("call", -1)) + 1

    def send(self, values: dict[str, Any], step: int, call: int) -> None:
        """Log the numbers among the values, and that of the call."""
        super().send({**values, "call": call}, step, call)

    def checkpoint(self, path: Path) -> None:
        """Tell where the newest checkpoint is, by the tag ``distcl.checkpoint``."""
        uri = path.absolute().as_uri()
        self._mlflow.MlflowClient().set_tag(self.id, "distcl.checkpoint", uri)

    def summarize(self, summary: dict[str, Any], draw: Draw | None = None) -> None:
        """Log the final numbers, and the summary as a file."""
        super().summarize(summary)
        self._mlflow.log_dict(summary, "summary.json")

    def finish(self, ending: Ending = "done") -> None:
        """Close the run, or this process's part of it."""
        self._mlflow.end_run(_STATUS[ending])
        if self._files:
            self._mlflow.set_tracking_uri(None)


_ID_OF: dict[str, Callable[[Any], Any]] = {
    "mlflow": lambda run: run.info.run_id,
    "comet_ml": lambda experiment: experiment.get_key(),
    "aim": lambda run: run.hash,
    "clearml": lambda task: task.id,
}


def _arguments(
    kind: str, config: TrackingConfig, out: Path, run_id: str
) -> tuple[list[Any], dict[str, Any]]:
    """Return what makes accelerate's tracker of a new run, or of the one of that id."""
    project, name = config.project, config.name or out.resolve().name
    match kind:
        case "tensorboard":
            if not run_id:
                shutil.rmtree(out / kind, ignore_errors=True)
            return [kind, out], {}
        case "dvclive":
            return [], {"dir": str(out / kind), "resume": bool(run_id), "save_dvc_exp": False}
        case "aim":
            return [name, str(out)], {"run_hash": run_id or None, "experiment": project}
        case "clearml":
            goes_on = {"reuse_last_task_id": run_id, "continue_last_task": 0}  # 0: keeps our steps
            return [project], {"task_name": name, **(goes_on if run_id else {})}
        case "comet_ml":
            from comet_ml import ExperimentConfig

            named = ExperimentConfig(name=name)
            return [project], {"experiment_key": run_id or None, "experiment_config": named}
    tags = {"distcl.version": __version__}
    return [project], {"run_id": run_id or None, "run_name": name, "tags": tags, "nested_run": True}


def recorded(path: Path) -> Iterator[tuple[dict[str, Any], int]]:
    """Yield (values, step) of every call that a ``metrics.jsonl`` has, as they were logged."""
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            values = json.loads(line)
            step = values.pop("step")
            del values["time"]
            nonfinite = values.pop("nonfinite", {})
            values |= {name: float(text) for name, text in nonfinite.items() if name in values}
            yield {name: _logged(value) for name, value in values.items()}, step


def _logged(value: Any) -> Any:
    if isinstance(value, dict) and value.keys() == {"counts", "edges"}:
        return Histogram(np.array(value["counts"]), np.array(value["edges"]))
    return value


def config_of(out: Path) -> dict[str, Any]:
    """Return the configuration that a run folder holds; nothing where there is none."""
    path = out / "config.toml"
    return tomllib.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def failure(kind: str, error: Exception) -> str:
    """Return one line on a tracker that is dropped."""
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


def flat_values(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested dicts as one, names joined by '/'."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        inner = isinstance(value, dict)
        found |= flat_values(value, f"{prefix}{name}/") if inner else {f"{prefix}{name}": value}
    return found
