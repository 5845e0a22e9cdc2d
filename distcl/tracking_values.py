"""Values that trackers take, besides numbers, strings, lists and dicts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt


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
