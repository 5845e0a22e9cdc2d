"""A measured figure beside its alternative."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Row:
    """``ours`` and ``theirs`` in ``unit``, and ``ratio``, as a rule ours / theirs.

    ``target``: what the ratio should be, as "<= 1.05" or ">= 5"; empty where there is none.
    ``theirs`` is None where the target is absolute. ``limit``: what physics, or the plainest code,
    allows ``ours`` to be. All three are None where nothing could be measured; ``unit`` says why.
    """

    name: str
    ours: float | None
    theirs: float | None
    unit: str
    ratio: float | None
    target: str = ""
    limit: float | None = None

    @property
    def passed(self) -> bool | None:
        """Whether the ratio reaches the target; None without one, or without a measurement."""
        if not self.target or self.ratio is None:
            return None
        sign, _, bound = self.target.partition(" ")
        return self.ratio <= float(bound) if sign == "<=" else self.ratio >= float(bound)

    @property
    def of_limit(self) -> float | None:
        """The share of the limit that is reached: 1 is all of it, whether less or more is better.

        None without a limit. Noise can put ``ours`` beyond the limit; that shows as less than 1.
        """
        if not self.ours or not self.limit:
            return None
        return min(self.ours / self.limit, self.limit / self.ours)

    def as_json(self) -> dict[str, Any]:
        """Return the row as plain values, with ``pass`` and ``of_limit``."""
        return asdict(self) | {"pass": self.passed, "of_limit": self.of_limit}


def compared(
    name: str,
    ours: float,
    theirs: float,
    unit: str,
    target: str = "",
    scale: float = 1.0,
    limit: float | None = None,
) -> Row:
    """Return a row whose ratio is ours / (scale · theirs)."""
    return Row(name, ours, theirs, unit, ours / (scale * theirs), target, limit)


def times_faster(
    name: str, ours: float, theirs: float, unit: str, target: str = "", limit: float | None = None
) -> Row:
    """Return a row whose ratio is theirs / ours, both of them times."""
    return Row(name, ours, theirs, unit, theirs / ours, target, limit)


def skipped(name: str, why: str) -> Row:
    """Return the row of something that cannot be measured here."""
    return Row(name, None, None, f"not measured: {why}", None)
