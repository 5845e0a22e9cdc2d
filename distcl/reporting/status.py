"""How far a run is: ``OUT/progress.json``, which the run writes and ``distcl status`` reads."""

from __future__ import annotations

import json
import math
import os
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distcl.errors import UsageError
from distcl.reporting.figures import clock, words_in, words_of

FILE = "progress.json"


@dataclass(frozen=True, slots=True)
class RunStatus:
    """What a run folder tells. Times in seconds; None where nothing is known.

    ``state``: running, done, failed, preempted, or ``gone``: it says running, but its process is
    not there any more. ``left``: estimated from the pace so far. ``results``: in the units of
    ``metric``; shares, if that is accuracy.
    """

    state: str
    reason: str
    last_round: int | None
    stage: str
    samples_per_second: float | None
    seconds: float | None
    left: float | None
    silent: float | None
    results: dict[str, float]
    metric: str = "accuracy"

    def __str__(self) -> str:
        lines = [f"state       {self.state}" + (f": {self.reason}" if self.reason else "")]
        if self.last_round is not None:
            lines.append(f"last round  {self.last_round}")
        if self.stage and self.state != "done":
            lines.append(f"now at      {self.stage}")
        if self.samples_per_second:
            lines.append(f"rate        {self.samples_per_second:,.0f} samples/s")
        if self.seconds is not None:
            lines.append(f"time        {clock(self.seconds)}")
        if self.left is not None:
            lines.append(f"time left   about {clock(self.left)}")
        if self.silent is not None and self.silent >= 60:
            lines.append(f"last sign   {clock(self.silent)} ago")
        shown = words_of(self.metric).number
        lines += [f"{name:<11} {shown(value)}" for name, value in self.results.items()]
        return "\n".join(lines)


def read_status(folder: Path, now: float | None = None) -> RunStatus:
    """Read a run folder, of a run that is going on or over. Raises UsageError if it is none."""
    status = read_json(folder, "status.json")
    if status is None:
        raise UsageError(f"'{folder}' is not a run folder: it has no status.json")
    progress = read_json(folder, FILE) or {}
    summary = read_json(folder, "summary.json") if status.get("state") == "done" else None
    now = time.time() if now is None else now
    state, reason = str(status.get("state")), str(status.get("reason") or "")
    seconds = left = silent = None
    rate, last = progress.get("samples_per_second"), _last_round(folder)
    if progress:
        seconds, silent = progress["time"] - progress["begun"], now - progress["time"]
    if state == "running":
        if progress and has_ended(progress["host"], progress["pid"]):
            state, reason = "gone", f"process {progress['pid']} of {progress['host']} has ended"
        elif (
            seconds
            and None not in (progress["first_share"], progress["share"])
            and (progress["first_share"] < progress["share"] <= 1)
        ):
            pace = (progress["share"] - progress["first_share"]) / seconds
            left = (1 - progress["share"]) / pace
    else:
        silent = None
    results, metric = {}, "accuracy"
    if summary:
        metric = str(summary.get("metric", metric))
        keys = {}
        words = words_in(summary)
        if end := summary.get("stream_end"):
            at_end = end[metric]
            keys = {f"{words.name} at end": at_end}
            if metric == "accuracy":
                keys = {"error %": 1 - at_end}
        keys[words._replace(higher=True).label.replace(",", "")] = summary.get("average_accuracy")
        keys["forgetting"] = summary.get("average_forgetting")
        seconds, rate = summary.get("seconds"), summary.get("samples_per_second")
        last = len(summary.get("rounds") or [])
        results = {name: value for name, value in keys.items() if isinstance(value, float)}
    stage = _stage(progress)
    return RunStatus(state, reason, last, stage, rate, seconds, left, silent, results, metric)


def read_json(folder: Path, name: str) -> dict[str, Any] | None:
    """Return a JSON object of a run folder, None if it is not there.

    Raises UsageError naming the file if it cannot be read or is no JSON object.
    """
    try:
        found = json.loads((folder / name).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise UsageError(f"'{folder / name}' cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise UsageError(f"'{folder / name}' is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise UsageError(f"'{folder / name}' is not a JSON object")
    return found


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Return the lines of ``metrics.jsonl``, [] without one; a line cut short at the end is let be.

    Raises UsageError naming the line if another one is no JSON object.
    """
    path = folder / "metrics.jsonl"
    try:
        text = path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return []
    except (OSError, ValueError) as error:
        raise UsageError(f"'{path}' cannot be read: {error}") from error
    lines = []
    for number, line in enumerate(text.splitlines(keepends=True), start=1):
        try:
            found = json.loads(line)
        except ValueError as error:
            if not line.endswith("\n"):  # being written, or cut off with the run
                break
            raise UsageError(f"'{path}', line {number}, is not JSON: {error}") from error
        if not isinstance(found, dict):
            raise UsageError(f"'{path}', line {number}, is not a JSON object")
        lines.append(found)
    return lines


def finite(value: Any) -> Any:
    """Return plain values with NaN and infinities as None, tuples as lists: JSON has neither."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _last_round(folder: Path) -> int | None:
    """Return the last round that was evaluated, by ``metrics.jsonl``."""
    done = [
        line.get("round")
        for line in read_metrics(folder)
        if any(k.endswith("/1") and k.count("/") == 1 for k in line)  # of the first experience
    ]
    return max((r for r in done if isinstance(r, int)), default=None)


def _stage(progress: dict[str, Any]) -> str:
    if not progress:
        return ""
    text = str(progress["title"])
    if progress["of"]:
        text += f", {progress['done']} of {progress['of']}"
    if progress["value"] is not None:
        text += f", {progress['metric']} {progress['value']:.4f}"
    return text


def has_ended(host: str, pid: int) -> bool:
    """Tell whether a process was one of this machine and is gone."""
    if host != socket.gethostname():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    return False
