"""The figures of ``summary.json`` in words: one place for names, units and which way is good.

Without torch.
"""

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
    """How a score is told: its name, the factor and digits of a number, units of it and a gain.

    ``higher``: whether higher is better.
    """

    name: str
    scale: float
    digits: int
    unit: str
    gain: str
    higher: bool = True

    @property
    def hint(self) -> str:
        """Which way is good, where that is not up: " (less is better)", or ""."""
        return "" if self.higher else " (less is better)"

    @property
    def label(self) -> str:
        """Name, unit and which way is good, for an axis."""
        return (f"{self.name}, {self.unit}" if self.unit else self.name) + self.hint

    def number(self, value: float | None, sign: str = "", unknown: str = "–", most: int = 9) -> str:
        """Return a value as a number; ``sign``: "+" to show it always; ``most``: digits after it.

        Without a unit there are fewer of them from 10 on, and powers of ten from a million on.
        """
        if value is None:
            return unknown
        shown, digits = self.scale * value, min(self.digits, most)
        if not self.unit and abs(shown) >= 1e6:
            return f"{shown:{sign}.1e}"
        if not self.unit and abs(shown) >= 10:
            digits = max(0, digits - len(str(int(abs(shown)))) + 1)
        return f"{shown:{sign}.{digits}f}"

    def named(self, figure: Figure) -> tuple[str, str]:
        """Return name and unit of a figure; a score without unit has none."""
        unit = self.gain if figure.gain else self.unit
        return figure.name.replace("accuracy", self.name), unit if self.unit else ""

    def better(self, a: float, b: float) -> float:
        """Return by how much a is better than b."""
        return a - b if self.higher else b - a


_SHARE = (100.0, 1, "%", "points")
_WORDS = {
    "accuracy": Words("accuracy", *_SHARE),
    "r2": Words("R²", 1.0, 3, "", "R²"),
    "loss": Words("loss", 1.0, 4, "", "loss", higher=False),
    "perplexity": Words("perplexity", 1.0, 3, "", "perplexity", higher=False),
    "bits_per_byte": Words("bits per byte", 1.0, 3, "", "bits per byte", higher=False),
    "token_accuracy": Words("token accuracy", *_SHARE),
    "top_k": Words("top-k accuracy", *_SHARE),
    "f1_macro": Words("macro F1", 1.0, 3, "", "F1"),
    "auroc": Words("AUROC", 1.0, 3, "", "AUROC"),
}
_MIXED = Words("score", 1.0, 3, "", "score")


def words_of(*metrics: str, higher: bool = True) -> Words:
    """Return the words of ``metric`` in ``summary.json``; of several, for all.

    ``higher``: whether higher is better, of a score that is none of distcl's.
    """
    names = set(metrics) or {"accuracy"}
    if len(names) > 1:
        return _MIXED
    (name,) = names
    told = name.replace("_", " ")
    return _WORDS.get(name) or Words(told, 1.0, 4, "", told, higher)


def words_in(summary: Summary) -> Words:
    """Return the words of the score of a summary."""
    metric = str(summary.get("metric", "accuracy"))
    return words_of(metric, higher=bool(summary.get("higher_is_better", True)))


def figures_of(summary: Summary) -> list[tuple[str, str, str, str]]:
    """Return (name, number, unit, note) of each figure that the run has."""
    words = words_in(summary)
    known = [(figure, summary.get(figure.key)) for figure in FIGURES]
    less = "" if words.higher else "; less is better"
    return [
        (name, words.number(value), unit, figure.note + less * (not figure.gain))
        for figure, value in known
        if value is not None
        for name, unit in [words.named(figure)]
    ]


def further_scores(summary: Summary) -> list[Summary]:
    """Return what the summary has of each score but the leading one, each as a summary itself."""
    rest = {key: summary.get(key) for key in ("rounds", "pretrain", "experiences")}
    found = (summary.get("scores") or {}).items()
    return [{**rest, **one, "metric": name} for name, one in found]


def stream_end(summary: Summary) -> list[tuple[str, str, str, str]]:
    """Return the same of what a run on a stream is judged by first; [] of other runs."""
    end = summary.get("stream_end")
    if not end:
        return []
    metric = next(key for key in end if key != "samples")
    higher = bool(summary.get("higher_is_better", True))
    words, value = words_of(metric, higher=higher), end[metric]
    name, value = ("error", 1 - value) if metric == "accuracy" else (words.name, value)
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
