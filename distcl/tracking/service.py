"""A tracker at a service: its calls are numbered, so that the run there has each of them once."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from distcl.tracking.tracker import Histogram


class ServiceTracker(ABC):
    """Sends what the service lacks. ``held``: calls that it has from earlier processes of the run.

    ``metrics.jsonl`` has every call; a run that goes on from a checkpoint first sends from there
    what was lost on the way to the service, then leaves out what it had got beyond the checkpoint.
    """

    def __init__(self, out: Path, held: int = 0) -> None:
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
        """Return how many calls of ``log`` there were."""
        return {"calls": self._calls}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on after the calls in ``metrics.jsonl``, which has been cut to the checkpoint."""
        self._calls = 0
        for values, step in recorded(self._out / "metrics.jsonl"):
            self.log(values, step)


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
