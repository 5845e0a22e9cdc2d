"""From scores to the weights of a round: which samples have one, and what they report."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch.utils._pytree import tree_leaves

from distcl.config import Config, PriorityConfig
from distcl.errors import ConfigError
from distcl.footprint import large_arrays
from distcl.priority.shaping import (
    WHOLE,
    Of,
    Sums,
    Weights,
    ess_fraction,
    shape_weights,
    top_share,
)
from distcl.priority.slices import Slices
from distcl.priority.windows import Part
from distcl.types import Batch, Ids, PrioritySignal, as_array, as_tensor


@dataclass
class RoundWeights:
    """Draw weights of a round; None: uniform.

    ``history`` belongs to the ids ``pool``, or to all of the history where that is None. By
    ``chosen``, batches of current data or of history are chosen among candidates. ``report`` has
    the statistics for summary.json; ``note`` is what else the log should say, or empty. ``over``,
    for current data and history: how weights are summed; where that is a Slices, this rank has
    only the weights of its ids.
    """

    current: Weights | None = None
    history: Weights | None = None
    pool: Ids | None = None
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
            "chosen": list(self.chosen),
            "report": self.report,
            "note": self.note,
        }

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> RoundWeights:
        """Return the weights that ``state_dict`` was called on."""
        arrays = {name: as_array(state[name]) for name in ("current", "history", "pool")}
        chosen = (state["chosen"][0], state["chosen"][1])
        return cls(**arrays, chosen=chosen, report=state["report"], note=state["note"])


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
        both = shape.weights(both, ids, joined(*(sums for _, sums in wanted)), overwrite=True)
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


def joined(first: Sums, second: Sums) -> Sums:
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


class Correction:
    """Loss weights that undo the skew of the draws (prioritized replay, Schaul et al. 2016).

    c_i = (N p_i)^-β / Σ_j p_j (N p_j)^-β  for a sample drawn from a group of N with probability
    p_i; 1 for a sample drawn uniformly. Their mean over draws is 1, so the step keeps its length:
    Schaul et al. divide by max_j c_j instead, which scales the learning rate. β = 1 makes the mean
    of corrected losses an unbiased estimate of the uniform mean.
    """

    def __init__(self, beta: float, dtype: torch.dtype) -> None:
        self._beta = beta
        self._dtype = dtype
        self._groups: Sequence[Part] | None = None

    def applied(self, batch: Batch, groups: Sequence[Part]) -> Batch:
        """Return the batch with the loss weights of its samples, drawn from ``groups``.

        Collective at the first batch from new groups, if their weights lie in slices.
        """
        if not self._beta:
            return batch
        device = tree_leaves(batch.y)[0].device
        return replace(batch, weights=self._of(batch.ids, groups).to(device, self._dtype))

    def _of(self, ids: torch.Tensor, groups: Sequence[Part]) -> torch.Tensor:
        if groups is not self._groups:
            self._groups = groups
            weighted = [(g.ids, g.weights, g.over) for g in groups if g.weights is not None]
            held = np.concatenate([i for i, *_ in weighted]) if weighted else ids.numpy()[:0]
            values = [self._loss_weights(w, over) for _, w, over in weighted]
            order = np.argsort(held, kind="stable")
            self._ids = held[order]
            self._values = np.concatenate(values)[order] if weighted else np.empty(0)
        found = np.ones(len(ids))
        if len(self._ids):
            at = np.searchsorted(self._ids, ids.numpy()).clip(max=len(self._ids) - 1)
            found = np.where(self._ids[at] == ids.numpy(), self._values[at], found)
        return torch.from_numpy(found)

    def _loss_weights(self, weights: Weights, over: Sums) -> Weights:
        share = weights / over.total(weights)
        with np.errstate(divide="ignore"):
            raw = np.where(share > 0, (over.number(share) * share) ** -self._beta, 0.0)
        loss_weights: Weights = raw / over.total(share * raw)
        return loss_weights


def check_priority(config: Config, signal: PrioritySignal, takes_history: bool) -> None:
    """Raise ConfigError, naming both, for keys that cannot be combined."""
    p, mode = config.priority, config.continual_learning.update_mode
    replays = takes_history or config.continual_learning.mix_historic_data

    def refuse(key: str, why: str) -> None:
        raise ConfigError(f"{key} does not work with priority.{why}")

    if p.source != "score" and p.target == "history" and not replays:
        raise ConfigError(
            f"priority.target = 'history' has nothing to weigh: update_mode = '{mode}' takes no "
            "history batches, and continual_learning.mix_historic_data is false"
        )
    if p.source == "online":
        if signal.needs_anchor:
            refuse(
                f"priority.signal = '{p.signal}', which needs a forward under theta_star,",
                "source = 'online', which makes none: use entropy, loss, grad_norm or fisher",
            )
        if p.draw == "without_replacement":
            refuse(
                "priority.draw = 'without_replacement'",
                "source = 'online', whose weights change while it draws: use systematic",
            )
        if p.refresh_steps < 2 * config.data.workers:
            refuse(
                f"data.workers = {config.data.workers}",
                f"refresh_steps = {p.refresh_steps}: they read {2 * config.data.workers} batches "
                "ahead, which must be less than the steps between two refreshes",
            )
    elif p.pool:
        refuse(
            f"priority.source = '{p.source}'", f"pool = {p.pool}, which is for source = 'online'"
        )
    if p.source == "candidates" and p.guard == "auto":
        refuse(
            "priority.guard = 'auto'", "source = 'candidates', which has no weights to judge before"
        )
    if p.source == "candidates" and not takes_history and p.target == "history":
        refuse(
            "priority.source = 'candidates'",
            "target = 'history' and mixed batches: use target = 'union', or an update_mode that "
            "takes history batches",
        )
    if p.correction and (p.source == "candidates" or p.draw == "without_replacement"):
        other = "source = 'candidates'" if p.source == "candidates" else f"draw = '{p.draw}'"
        refuse(
            f"priority.correction = {p.correction}",
            f"{other}, whose draws have no probabilities of their own",
        )
