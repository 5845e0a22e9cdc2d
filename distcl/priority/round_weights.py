"""From scores to the weights of a round: which samples have one, and what they report."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import numpy as np
import torch

from distcl.config import PriorityConfig
from distcl.distributed.memory import large_arrays
from distcl.priority.online import Ledger
from distcl.priority.population import Dealer, Slices
from distcl.priority.scoring import Scorer
from distcl.priority.weighting import (
    WHOLE,
    Of,
    Positions,
    Sums,
    Weights,
    ess_fraction,
    shape_weights,
    top_share,
)
from distcl.types import Ids, Source, as_array, as_tensor, exact


@dataclass
class RoundWeights:
    """Draw weights of a round; None: uniform.

    ``history`` belongs to the ids ``pool``, or to all of the history where that is None.
    ``weighted``: whether current data, and history, are to have weights in this round; by
    ``chosen``, their batches are chosen among candidates. ``report`` has the statistics for
    summary.json; ``note`` is what else the log should say, or empty. ``over``, for current data and
    history: how weights are summed; where that is a Slices, this rank has only the weights of its
    ids.
    """

    current: Weights | None = None
    history: Weights | None = None
    pool: Ids | None = None
    weighted: tuple[bool, bool] = (False, False)
    chosen: tuple[bool, bool] = (False, False)
    over: tuple[Sums, Sums] = (WHOLE, WHOLE)
    report: dict[str, dict[str, float]] = field(default_factory=dict)
    note: str = ""

    @property
    def parts(self) -> dict[str, tuple[Weights, Sums]]:
        """The weights that there are, and their sums, by the name of their part in ``report``."""
        both = zip(("cur", "hist"), (self.current, self.history), self.over, strict=True)
        return {name: (weights, over) for name, weights, over in both if weights is not None}

    def held(self, current: Ids, history: Ids) -> tuple[Ids, Ids]:
        """Return the ids that the weights belong to, of all current ids and all of the history."""
        mine = [over.ids if isinstance(over, Slices) else None for over in self.over]
        stored = history if self.pool is None else self.pool
        return current if mine[0] is None else mine[0], stored if mine[1] is None else mine[1]

    def lines(self) -> list[str]:
        """Return the note and the report as lines for the log."""
        lines = [self.note] if self.note else []
        for name, stats in self.report.items():
            text = " ".join(f"{key}={value:.6g}" for key, value in stats.items())
            lines.append(f"[priority/{name}] {text}")
        return lines

    def state_dict(self) -> dict[str, Any]:
        """Return what is the same on every rank, as tensors and plain values."""
        cut = [isinstance(over, Slices) for over in self.over]
        return {
            "current": None if cut[0] else as_tensor(self.current),
            "history": None if cut[1] else as_tensor(self.history),
            "pool": as_tensor(self.pool),
            "weighted": list(self.weighted),
            "chosen": list(self.chosen),
            "report": self.report,
            "note": self.note,
        }

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> RoundWeights:
        """Return the weights that ``state_dict`` was called on."""
        arrays = {name: as_array(state[name]) for name in ("current", "history", "pool")}
        flags: dict[str, Any] = {name: tuple(state[name]) for name in ("weighted", "chosen")}
        return cls(**arrays, **flags, report=state["report"], note=state["note"])

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

    def priorities(self, scores: Weights) -> Weights:
        """Return max(score, min_score)^alpha, [N]: what is reported."""
        clamped: Weights = np.maximum(scores, self.config.min_score)
        clamped **= self.alpha
        return clamped

    def weights(
        self, scores: Weights, ids: Ids, over: Sums = WHOLE, overwrite: bool = False
    ) -> Weights:
        """Return the weights [N] of scores [N]: alpha, cap, min_ess, floor, in that order.

        Collective if ``over`` is. ``overwrite``: the scores need not stay.
        """
        c = self.config
        shaped = c.cap, c.min_ess, c.floor
        return shape_weights(scores, self.alpha, *shaped, ids, c.min_score, over, overwrite)


class RoundWeighter:
    """Scores what a round may draw and shapes the scores into its weights.

    ``dealer``: of a source that is read from front to back, whose samples are scored and weighed
    lane by lane. ``pick``: (round, N, first, n) -> the positions of a pool among N, the same on
    every rank.
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
    ) -> None:
        self.shape = Shape(config, alpha)
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
        elif self.dealer is not None:
            result = self._by_lanes(self.dealer, weighted, current, history)
        else:
            result = weigh(self.shape, self._score, *_those(weighted, current, history))
        result.weighted, result.note = weighted, note
        return result

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
        table, size, chosen, pool = self.ledger.table, self._config.pool, None, None
        if weighted[1] and 0 < size < len(history):
            chosen = self._pick(round_index, len(history), update * size, size)
            pool = history[chosen]

        def read(ids: Ids) -> Weights:
            return table.read(history, chosen) if ids is pool else table.read(ids)

        those = _those(weighted, current, history)
        return weigh(self.shape, read, *those, pool, report=not update)

    def _by_lanes(
        self, dealer: Dealer, weighted: tuple[bool, bool], current: Ids, history: Ids
    ) -> RoundWeights:
        """Return the weights of this rank's lanes. Collective."""
        cut = dealer.deal(current), dealer.deal(history)

        def score(mine: Ids) -> Weights:
            ids, slices = (current, cut[0]) if mine is cut[0].ids else (history, cut[1])
            return _float64(self.scorer.score_slices(self._source, ids, slices))

        mine = _those(weighted, cut[0].ids, cut[1].ids)
        return weigh(self.shape, score, *mine, over=cut)

    def _score(self, ids: Ids) -> Weights:
        return _float64(self.scorer.score(self._source, ids))


def _those(weighted: tuple[bool, bool], current: Ids, history: Ids) -> tuple[Any, Any]:
    return current if weighted[0] else None, history if weighted[1] else None


def _float64(scores: torch.Tensor) -> Weights:
    with large_arrays():
        return scores.cpu().numpy().astype(np.float64)


def weigh(
    shape: Shape,
    score: Callable[[Ids], Weights],
    current: Ids | None,
    history: Ids | None,
    pool: Ids | None = None,
    *,
    over: tuple[Sums, Sums] = (WHOLE, WHOLE),
    report: bool = True,
) -> RoundWeights:
    """Score what is given and shape the scores into weights; collective if ``score`` is.

    ``score`` returns a new array, which is overwritten.

    ``over`` sums what belongs to current data, and to history: of each, the ids may be this rank's.

    Under ``priority.target = "union"`` both are shaped together, so that they share one
    normalization. ``pool``: a uniform sample of the history, scored in its place.
    """
    result = RoundWeights(pool=pool, over=over)
    scored = history if pool is None else pool
    wanted = [
        (ids, sums)
        for ids, sums in zip((current, scored), over, strict=True)
        if ids is not None and sums.number(ids)
    ]
    scores = [score(ids) for ids, _ in wanted]
    with large_arrays() if report else nullcontext():  # a refresh comes every few steps
        _fill(result, shape, current, wanted, scores, report)
    return result


def _fill(
    result: RoundWeights,
    shape: Shape,
    current: Ids | None,
    wanted: list[tuple[Ids, Sums]],
    scores: list[Weights],
    report: bool,
) -> None:
    """Shape ``scores``, which are overwritten, into the weights of what is ``wanted``."""
    if report:
        with np.errstate(over="ignore", invalid="ignore"):  # infinite weights are refused below
            stats = [
                statistics(raw, sums, shape.priorities)
                for raw, (_, sums) in zip(scores, wanted, strict=True)
            ]
    if shape.config.target == "union" and len(wanted) == 2:
        ids, sizes = np.concatenate([ids for ids, _ in wanted]), [len(raw) for raw in scores]
        both = np.concatenate(scores)
        scores.clear()
        both = shape.weights(both, ids, joined_sums(*(sums for _, sums in wanted)), overwrite=True)
        parts = np.split(both, sizes[:1])
    else:
        parts = [shape.weights(scores.pop(0), *of, overwrite=True) for of in wanted]
    for k, ((ids, sums), weights) in enumerate(zip(wanted, parts, strict=True)):
        if report:
            result.report["cur" if ids is current else "hist"] = stats[k] | {
                "ess_fraction": ess_fraction(weights, sums),
                "top_share": top_share(weights, over=sums),
            }
        if ids is current:
            result.current = weights
        else:
            result.history = weights


def joined_sums(first: Sums, second: Sums) -> Sums:
    """Return the sums over arrays of the first one's samples, then the second one's."""
    if isinstance(first, Slices) and isinstance(second, Slices):
        return first.joined(second)
    return WHOLE


def statistics(scores: Weights, over: Sums, priorities: Of) -> dict[str, float]:
    """Return n, min, mean, max, std of the priorities of scores [N], which rise with these.

    Collective if ``over`` is.
    """
    n, low, high = over.number(scores), over.smallest(scores), over.largest(scores)
    smallest, largest = priorities(np.array([low, high])).tolist()
    mean = over.total(scores, priorities) / n
    variance = over.total(scores, lambda s: np.square(priorities(s) - mean)) / n
    return {"n": n, "min": smallest, "mean": mean, "max": largest, "std": math.sqrt(variance)}
