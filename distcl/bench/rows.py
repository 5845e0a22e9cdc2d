"""One line of a benchmark's result."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True, slots=True)
class Row:
    """What was measured: ``ours`` beside ``theirs``, both in ``unit``.

    ``ratio`` is theirs / ours where ``better`` is "faster", else ours / theirs. ``target`` is what
    it should be, at least ("faster", "more") or at most ("less"); None: there is no target.
    ``limit`` is what physics, or a plain copy, allows ``ours`` to be, in ``unit``; ``note`` says
    what stands beside it, or why nothing could be measured (then ``ours`` is None).
    """

    name: str
    ours: float | None
    theirs: float | None
    unit: str = "s"
    better: Literal["faster", "more", "less"] = "faster"
    target: float | None = None
    limit: float | None = None
    note: str = ""

    @property
    def ratio(self) -> float | None:
        """The figure that is held against the target."""
        if not self.ours or not self.theirs:
            return None
        return self.theirs / self.ours if self.better == "faster" else self.ours / self.theirs

    @property
    def passed(self) -> bool | None:
        """Whether the target holds; None where nothing was measured or asked for."""
        ratio = self.ratio
        if ratio is None or self.target is None:
            return None
        return ratio <= self.target if self.better == "less" else ratio >= self.target

    @property
    def goal(self) -> str | None:
        """The target in words, as "≥ 9"."""
        if self.target is None:
            return None
        return f"{'≤' if self.better == 'less' else '≥'} {self.target:g}"

    @property
    def of_limit(self) -> float | None:
        """The share of the limit that is reached, 1 being all of it."""
        if not self.ours or not self.limit:
            return None
        return self.ours / self.limit if self.better == "more" else self.limit / self.ours

    def as_object(self) -> dict[str, Any]:
        """Return what goes into the JSON file."""
        return {
            "name": self.name,
            "ours": self.ours,
            "theirs": self.theirs,
            "ratio": self.ratio,
            "target": self.goal,
            "pass": self.passed,
            "unit": self.unit,
            "limit": self.limit,
            "of_limit": self.of_limit,
            "note": self.note,
        }


def skipped(name: str, why: str) -> Row:
    """Return the row of something that cannot be measured here."""
    return Row(name, None, None, note=f"skipped: {why}")
