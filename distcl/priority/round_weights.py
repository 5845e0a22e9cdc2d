"""From scores to the weights of a round: which samples have one, and what they report."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any

import numpy as np
import torch

from distcl.config import PriorityConfig
from distcl.data.ids import ids_tensor, tensor_ids
from distcl.distributed.memory import large_arrays
from distcl.errors import ConfigError
from distcl.priority.online import Ledger
from distcl.priority.population import Dealer
from distcl.priority.scoring import Scorer
from distcl.priority.weighting import Of, Positions, Weights, WeightVector, joined
from distcl.types import Ids, Source, as_array, as_tensor, exact

NAMES = ("cur", "hist")
"""What the parts of a round, current data and history, are called in reports."""
_PARTS = ("current", "history")  # and in checkpoints


@dataclass
class RoundWeights:
    """Draw weights of the parts of a round, current data and history; None: not known yet.

    A vector without values is drawn uniformly. That of history may be of a pool of it.
    ``weighted``: whether each part is to have weights in this round; by ``chosen``, its batches are
    chosen among candidates. ``report`` has the statistics for summary.json; ``note`` is what else
    the log should say, or empty.
    """

    vectors: tuple[WeightVector | None, WeightVector | None] = (None, None)
    weighted: tuple[bool, bool] = (False, False)
    chosen: tuple[bool, bool] = (False, False)
    report: dict[str, dict[str, float]] = field(default_factory=dict)
    note: str = ""

    @property
    def parts(self) -> dict[str, WeightVector]:
        """The parts that have weights, by their name in ``report``."""
        both = zip(NAMES, self.vectors, strict=True)
        return {name: part for name, part in both if part is not None and part.values is not None}

    def of(self, current: Ids, history: Ids, dealer: Dealer | None) -> RoundWeights:
        """Return these with parts that know their samples, uniform ones too. Collective.

        ``dealer``: those of this rank's lanes.
        """
        if dealer is None:
            whole = zip(self.vectors, (current, history), strict=True)
            first, second = (WeightVector(ids, None) if p is None else p for p, ids in whole)
        elif any(part is None or part.slices is None for part in self.vectors):
            cut = dealer.deal(current), dealer.deal(history)
            first, second = (WeightVector(slices.ids, None, slices) for slices in cut)
        else:
            return self
        return replace(self, vectors=(first, second))

    def lines(self) -> list[str]:
        """Return the note and the report as lines for the log."""
        lines = [self.note] if self.note else []
        for name, stats in self.report.items():
            text = " ".join(f"{key}={value:.6g}" for key, value in stats.items())
            lines.append(f"[priority/{name}] {text}")
        return lines

    def state_dict(self, history: Ids) -> dict[str, Any]:
        """Return what is the same on every rank, as tensors and plain values."""
        whole = [None if p is None or p.slices is not None else p for p in self.vectors]
        pool = None if whole[1] is None or whole[1].ids is history else whole[1].ids
        return {
            **{k: p and as_tensor(p.values) for k, p in zip(_PARTS, whole, strict=True)},
            "pool": ids_tensor(pool),
            "weighted": list(self.weighted),
            "chosen": list(self.chosen),
            "report": self.report,
            "note": self.note,
        }

    @classmethod
    def from_state(cls, state: dict[str, Any], current: Ids, history: Ids) -> RoundWeights:
        """Return the weights that ``state_dict`` was called on."""
        ids = current, history if state["pool"] is None else tensor_ids(state["pool"])
        first, second = (
            None if state[name] is None else WeightVector(some, as_array(state[name]))
            for some, name in zip(ids, _PARTS, strict=True)
        )
        flags: dict[str, Any] = {name: tuple(state[name]) for name in ("weighted", "chosen")}
        return cls((first, second), **flags, report=state["report"], note=state["note"])

    def stand_down(self, note: str) -> RoundWeights:
        """Return uniform weights in place of these. Local.

        What they were stays in the report, and ``note`` says why they are not used.
        """
        note = "\n".join(line for line in (self.note, note) if line)
        return RoundWeights(report=self.report, note=note)


@dataclass(frozen=True, slots=True)
class Shape:
    """How scores become weights: ``priority.*`` and the exponent ``importance_alpha``."""

    config: PriorityConfig
    alpha: float  # importance_alpha
    largest: float = math.inf
    """What a score can be at most: ln C, the entropy of C classes."""

    def priorities(self, scores: Weights) -> Weights:
        """Return max(score, min_score)^alpha, [N]: what is reported."""
        clamped: Weights = np.maximum(scores, self.config.min_score)
        clamped **= self.alpha
        return clamped

    def opening(self, scores: WeightVector) -> float:
        """Return λ = clip(1 - mean score / (gate · ln C), 0, 1), for a gate above 0.

        The share 1 - λ of the draws is uniform: where the model is unsure of everything, how unsure
        it is of a sample says nothing. Collective over slices.
        """
        mean = scores.sum() / scores.number
        return min(1.0, max(0.0, 1 - mean / (self.config.gate * self.largest)))

    def weights(self, scores: WeightVector, overwrite: bool = False) -> WeightVector:
        """Return the weights of scores: alpha, cap, min_ess, floor, see WeightVector.shaped.

        Raises ConfigError if the exponent leaves nothing of sound scores, or makes them infinite.
        """
        c = self.config
        floor = 1 - (1 - c.floor) * self.opening(scores) if c.gate else c.floor
        try:
            return scores.shaped(self.alpha, c.cap, c.min_ess, floor, c.min_score, overwrite)
        except ValueError as error:
            raise ConfigError(
                f"continual_learning.importance_alpha = {self.alpha:g} is too large an exponent "
                f"for these scores: {error}"
            ) from error


class RoundWeighter:
    """Scores what a round may draw and shapes the scores into its weights.

    ``dealer``: of a source that is read from front to back, whose samples are scored and weighed
    lane by lane. ``pick``: (round, N, first, n) -> the positions of a pool among N, the same on
    every rank. ``largest``: see Shape.
    """

    def __init__(
        self,
        source: Source,
        config: PriorityConfig,
        alpha: float,
        scorer: Scorer,
        ledger: Ledger | None,
        dealer: Dealer | None,
        pick: Callable[[int, int, int, int], Positions],
        largest: float = math.inf,
    ) -> None:
        self.shape = Shape(config, alpha, largest)
        self.scorer = scorer
        self.ledger = ledger
        self.dealer = dealer
        self._source = source
        self._config = config
        self._pick = pick

    def weigh(
        self, round_index: int, current: Ids, history: Ids, history_batch: bool, replays: Fraction
    ) -> RoundWeights:
        """Return the weights that a round begins with. Collective.

        ``priority.target`` says what has weights; auto: the current data, and the history if the
        updater takes a history batch. ``replays``: how often the round draws a stored sample.
        """
        target, limit = self._config.target, self._config.max_replay
        on_current = target in ("auto", "current", "union")
        on_history = target in ("history", "union") or (target == "auto" and history_batch)
        note = ""
        if on_history and limit and replays > exact(limit):
            on_history, on_current = False, target != "union" and on_current
            note = (
                f"[priority/hist] uniform: {float(replays):.3g} replays of a stored sample in this "
                f"round, more than priority.max_replay = {limit:g}"
            )
        weighted = on_current, on_history
        if self._config.source == "candidates":
            result = RoundWeights(chosen=(on_current, on_history and history_batch))
        elif self.ledger is not None:
            self.ledger.expect(round_index, self._source, current, history)
            result = self.by_ledger(weighted, round_index, current, history)
        else:
            result = self._by_scores(weighted, current, history)
        return replace(result, weighted=weighted, note=note)

    def by_ledger(
        self,
        weighted: tuple[bool, bool],
        round_index: int,
        current: Ids,
        history: Ids,
        update: int = 0,
    ) -> RoundWeights:
        """Return weights by the table as it is, over a fresh pool of the history if asked.

        ``update``: which of the round's refreshes it is; 0 makes a report too. Local.
        """
        assert self.ledger is not None
        table, size = self.ledger.table, self._config.pool
        scored: list[WeightVector | None] = [None, None]
        if weighted[0]:
            scored[0] = WeightVector(current, table.read(current))
        if weighted[1] and 0 < size < len(history):
            chosen = self._pick(round_index, len(history), update * size, size)
            scored[1] = WeightVector(history[chosen], table.read(history, chosen))
        elif weighted[1]:
            scored[1] = WeightVector(history, table.read(history))
        return weigh(self.shape, scored, report=not update)

    def _by_scores(self, weighted: tuple[bool, bool], current: Ids, history: Ids) -> RoundWeights:
        """Return weights by a scoring pass, over this rank's lanes if there are any. Collective."""
        scored: list[WeightVector | None] = []
        for ids, wanted in zip((current, history), weighted, strict=True):
            scored.append(self._scored(ids, wanted))
        return weigh(self.shape, scored)

    def _scored(self, ids: Ids, wanted: bool) -> WeightVector | None:
        """Return the scores of what is ``wanted``; of lanes, the samples also if it is not."""
        if self.dealer is None:
            if not (wanted and len(ids)):
                return None
            return WeightVector(ids, _float64(self.scorer.score(self._source, ids)))
        slices = self.dealer.deal(ids)
        if not wanted or not slices.number:
            return WeightVector(slices.ids, None, slices)
        scores = _float64(self.scorer.score_slices(self._source, ids, slices))
        return WeightVector(slices.ids, scores, slices)


def _float64(scores: torch.Tensor) -> Weights:
    with large_arrays():
        return scores.cpu().numpy().astype(np.float64)


def weigh(shape: Shape, scored: list[WeightVector | None], report: bool = True) -> RoundWeights:
    """Shape the scores of current data and of history into weights. Collective over slices.

    The list is emptied and the scores are overwritten. What has no scores, or no samples, stays
    uniform. Under ``priority.target = "union"`` both are shaped together, so that they share one
    normalization.
    """
    parts = [p if p is None or p.number else replace(p, values=None) for p in scored]
    scored.clear()
    weighted = {k: p for k, p in enumerate(parts) if p is not None and p.values is not None}
    result, gate = RoundWeights(), report and shape.config.gate
    with large_arrays() if report else nullcontext():  # a refresh comes every few steps
        if report:
            with np.errstate(over="ignore", invalid="ignore"):  # infinite weights are refused below
                result.report = {
                    NAMES[k]: statistics(part, shape.priorities) for k, part in weighted.items()
                }
        if shape.config.target == "union" and len(weighted) == 2:
            both = joined(weighted[0], weighted[1])
            opened = [shape.opening(both)] * 2 if gate else []
            weighted = {k: replace(part, values=None) for k, part in weighted.items()}
            parts.clear()
            both = shape.weights(both, overwrite=True)
            halves = np.split(both.held, [len(weighted[0].ids)])
            parts = [replace(weighted[k], values=half) for k, half in enumerate(halves)]
        else:
            opened = [shape.opening(part) for part in weighted.values()] if gate else []
            for k in [*weighted]:
                parts[k] = shape.weights(weighted.pop(k), overwrite=True)
        result.vectors = parts[0], parts[1]
        if report:
            for name, part in result.parts.items():
                result.report[name] |= {"ess_fraction": part.ess(), "top_share": part.top_share()}
            if gate:
                for name, share in zip(result.parts, opened, strict=True):
                    result.report[name]["gate"] = share
    return result


def statistics(scores: WeightVector, priorities: Of) -> dict[str, float]:
    """Return n, min, mean, max, std of the priorities of scores, which rise with these."""
    n, low, high = scores.number, scores.min(), scores.max()
    smallest, largest = priorities(np.array([low, high])).tolist()
    mean = scores.sum(of=priorities) / n
    variance = scores.sum(of=lambda s: np.square(priorities(s) - mean)) / n
    return {"n": n, "min": smallest, "mean": mean, "max": largest, "std": math.sqrt(variance)}
