"""The figures of ``summary.json`` in words: one place for percent, points and R². Without torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean, stdev
from typing import Any, NamedTuple

Summary = Mapping[str, Any]
"""What ``summary.json`` holds; a key may be missing."""


class Figure(NamedTuple):
    """One of a run's figures: key in ``summary.json``, name, note; ``gain``: it is a difference."""

    key: str
    name: str
    note: str
    gain: bool = False


FIGURES = (
    Figure("average_accuracy", "average accuracy", "over all experiences, at the end"),
    Figure("average_forgetting", "forgetting", "since each was known best; less is better", True),
    Figure("worst_experience_accuracy", "worst experience", "at the end"),
    Figure("average_anytime_accuracy", "anytime accuracy", "mean over the run"),
    Figure("backward_transfer", "backward transfer", "what later rounds did to earlier ones", True),
    Figure("forward_transfer", "forward transfer", "known before being trained on", True),
)


class Words(NamedTuple):
    """How a metric is told: its name, the factor and digits of a number, units of it and a gain."""

    name: str
    scale: float
    digits: int
    unit: str
    gain: str

    @property
    def label(self) -> str:
        """Name and unit, for an axis."""
        return f"{self.name}, {self.unit}" if self.unit else self.name

    def number(self, value: float | None, sign: str = "", unknown: str = "–") -> str:
        """Return a share, or R², as a number; ``sign``: "+" to show it always."""
        if value is None:
            return unknown
        shown = self.scale * value
        digits = self.digits if self.unit or abs(shown) < 10 else 0
        return f"{shown:{sign}.{digits}f}"

    def named(self, figure: Figure) -> tuple[str, str]:
        """Return name and unit of a figure; R² has none."""
        unit = self.gain if figure.gain else self.unit
        return figure.name.replace("accuracy", self.name), unit if self.unit else ""


_ACCURACY = Words("accuracy", 100.0, 1, "%", "points")
_R2 = Words("R²", 1.0, 3, "", "R²")


def words_of(*metrics: str) -> Words:
    """Return the words of ``metric`` in ``summary.json``, accuracy or r2; of several, for all."""
    return _ACCURACY if all(metric == "accuracy" for metric in metrics) else _R2


def figures_of(summary: Summary) -> list[tuple[str, str, str, str]]:
    """Return (name, number, unit, note) of each figure that the run has."""
    words = words_of(summary.get("metric", "accuracy"))
    known = [(figure, summary.get(figure.key)) for figure in FIGURES]
    return [
        (name, words.number(value), unit, figure.note)
        for figure, value in known
        if value is not None
        for name, unit in [words.named(figure)]
    ]


def stream_end(summary: Summary) -> list[tuple[str, str, str, str]]:
    """Return the same of what a run on a stream is judged by first; [] of other runs."""
    end = summary.get("stream_end")
    if not end:
        return []
    words = words_of("r2" if "r2" in end else "accuracy")
    name, value = ("R²", end["r2"]) if "r2" in end else ("error", 1 - end["accuracy"])
    note = f"of the stream's last {end['samples']:,} samples"
    return [(f"{name} at the end", words.number(value), words.unit, note)]


def untrained(summary: Summary) -> list[int]:
    """Return the accuracy matrix's columns, from 0, of experiences that were never trained on."""
    return [k for k, one in enumerate(summary.get("experiences") or []) if not one["trained"]]


def row_names(summary: Summary) -> list[str]:
    """Return the names of the accuracy matrix's rows."""
    rounds, rows = summary.get("rounds") or [], len(summary.get("accuracy") or [])
    first = "pretrained" if summary.get("pretrain") else "untrained"
    return ([first] * (rows - len(rounds)) + [f"round {r['round']}" for r in rounds])[-rows:]


SPENT = {"training": "train", "priorities": "priority", "evaluation": "evaluate"}
"""What a run spends time on, and its key in the report of a round, before ``_seconds``."""


def stages(summary: Summary) -> list[dict[str, Any]]:
    """Return the reports of pretraining, if there was any, and of all rounds."""
    first = summary.get("pretrain")
    return [*([first] if first else []), *(summary.get("rounds") or [])]


def time_spent(summary: Summary) -> str:
    """Return the seconds of a run, and the share of what they were spent on; "" if unknown."""
    total = float(summary.get("seconds") or 0.0)
    spent = {
        name: sum(float(stage.get(f"{key}_seconds") or 0.0) for stage in stages(summary))
        for name, key in SPENT.items()
    }
    spent["evaluation"] = float(summary.get("evaluate_seconds") or spent["evaluation"])
    spent["the rest"] = max(0.0, total - sum(spent.values()))
    shares = [f"{name} {s:.1f} s ({s / total:.0%})" for name, s in spent.items() if s and total]
    return f"{total:.1f} s: {', '.join(shares)}" if shares else ""


def spread(values: Iterable[float], digits: int, scale: float = 1.0) -> str:
    """Return mean ± standard deviation of ``scale`` times the values; the mean alone of one."""
    scaled: Sequence[float] = [scale * value for value in values]
    if not scaled:
        return "–"
    mean = f"{fmean(scaled):.{digits}f}"
    return f"{mean} ± {stdev(scaled):.{digits}f}" if len(scaled) > 1 else mean


def clock(seconds: float) -> str:
    """Return a duration for people, such as 1:02:05."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
