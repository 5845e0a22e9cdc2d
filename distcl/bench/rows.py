"""A measured figure beside its alternative, and how works are timed side by side."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Row:
    """``ours`` and ``theirs`` in ``unit``, and ``ratio``, as a rule ours / theirs.

    ``target``: what the ratio should be, as "<= 1.05" or ">= 5"; empty where there is none.
    ``theirs`` is None where the target is absolute.
    """

    name: str
    ours: float
    theirs: float | None
    unit: str
    ratio: float
    target: str = ""

    @property
    def passed(self) -> bool | None:
        """Whether the ratio reaches the target; None without one."""
        if not self.target:
            return None
        sign, _, bound = self.target.partition(" ")
        return self.ratio <= float(bound) if sign == "<=" else self.ratio >= float(bound)

    def as_json(self) -> dict[str, Any]:
        """Return the row as plain values, with ``pass``."""
        return asdict(self) | {"pass": self.passed}


def compared(
    name: str, ours: float, theirs: float, unit: str, target: str = "", scale: float = 1.0
) -> Row:
    """Return a row whose ratio is ours / (scale · theirs)."""
    return Row(name, ours, theirs, unit, ours / (scale * theirs), target)


def seconds_of(*works: Callable[[], Any], repeats: int = 5) -> list[float]:
    """Return the median seconds of each work; they take turns, so that noise meets all alike."""
    times: list[list[float]] = [[] for _ in works]
    for _ in range(repeats):
        for work, mine in zip(works, times, strict=True):
            begun = time.perf_counter()
            work()
            mine.append(time.perf_counter() - begun)
    return [statistics.median(mine) for mine in times]
