"""From scores to the weights of a round: which samples have one, and what they report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils._pytree import tree_leaves

from distcl.config import Config, PriorityConfig
from distcl.errors import ConfigError
from distcl.priority.draws import Weights, ess_fraction, shape_weights
from distcl.priority.windows import Part
from distcl.types import Batch, Ids, PrioritySignal


@dataclass
class RoundWeights:
    """Draw weights of a round; None: uniform.

    ``history`` belongs to the ids ``pool``, or to all of the history where that is None. By
    ``chosen``, batches of current data or of history are chosen among candidates. ``report`` has
    the statistics for summary.json; ``note`` is what else the log should say, or empty.
    """

    current: Weights | None = None
    history: Weights | None = None
    pool: Ids | None = None
    chosen: tuple[bool, bool] = (False, False)
    report: dict[str, dict[str, float]] = field(default_factory=dict)
    note: str = ""

    @property
    def parts(self) -> dict[str, Weights]:
        """The weights that there are, by the name of their part in ``report``."""
        both = {"cur": self.current, "hist": self.history}
        return {name: weights for name, weights in both.items() if weights is not None}

    def lines(self) -> list[str]:
        """Return the note and the report as lines for the log."""
        lines = [self.note] if self.note else []
        for name, stats in self.report.items():
            text = " ".join(f"{key}={value:.6g}" for key, value in stats.items())
            lines.append(f"[priority/{name}] {text}")
        return lines

    def state_dict(self) -> dict[str, Any]:
        """Return everything as tensors and plain values."""
        return {
            "current": as_tensor(self.current),
            "history": as_tensor(self.history),
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
        clamped: Weights = np.maximum(scores, self.config.min_score) ** self.alpha
        return clamped

    def weights(self, scores: Weights, ids: Ids) -> Weights:
        """Return the weights [N] of scores [N]: alpha, cap, min_ess, floor, in that order."""
        c = self.config
        return shape_weights(scores, self.alpha, c.cap, c.min_ess, c.floor, ids, c.min_score)


def weigh(
    shape: Shape,
    score: Callable[[Ids], Weights],
    current: Ids | None,
    history: Ids | None,
    pool: Ids | None = None,
    *,
    report: bool = True,
) -> RoundWeights:
    """Score what is given and shape the scores into weights; collective if ``score`` is.

    Under ``priority.target = "union"`` both are shaped together, so that they share one
    normalization. ``pool``: a uniform sample of the history, scored in its place.
    """
    result = RoundWeights(pool=pool)
    scored = history if pool is None else pool
    wanted = [ids for ids in (current, scored) if ids is not None and len(ids)]
    scores = [score(ids) for ids in wanted]
    if shape.config.target == "union" and len(wanted) == 2:
        both = shape.weights(np.concatenate(scores), np.concatenate(wanted))
        parts = np.split(both, [len(wanted[0])])
    else:
        parts = [shape.weights(raw, ids) for raw, ids in zip(scores, wanted, strict=True)]
    for ids, raw, weights in zip(wanted, scores, parts, strict=True):
        if report:
            name = "cur" if ids is current else "hist"
            result.report[name] = statistics(shape.priorities(raw), weights)
        if ids is current:
            result.current = weights
        else:
            result.history = weights
    return result


def statistics(priority: Weights, weights: Weights) -> dict[str, float]:
    """Return n, min, mean, max, std of priorities [N] and the weights' ESS as a share of N."""
    return {
        "n": len(priority),
        "min": float(priority.min()),
        "mean": float(priority.mean()),
        "max": float(priority.max()),
        "std": float(priority.std()),
        "ess_fraction": float(ess_fraction(weights)),
    }


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
        """Return the batch with the loss weights of its samples, drawn from ``groups``. Local."""
        if not self._beta:
            return batch
        device = tree_leaves(batch.y)[0].device
        return replace(batch, weights=self._of(batch.ids, groups).to(device, self._dtype))

    def _of(self, ids: torch.Tensor, groups: Sequence[Part]) -> torch.Tensor:
        if groups is not self._groups:
            self._groups = groups
            weighted = [(g.ids, g.weights) for g in groups if g.weights is not None]
            held = np.concatenate([i for i, _ in weighted]) if weighted else ids.numpy()[:0]
            values = [self._loss_weights(w) for _, w in weighted]
            order = np.argsort(held, kind="stable")
            self._ids = held[order]
            self._values = np.concatenate(values)[order] if weighted else np.empty(0)
        found = np.ones(len(ids))
        if len(self._ids):
            at = np.searchsorted(self._ids, ids.numpy()).clip(max=len(self._ids) - 1)
            found = np.where(self._ids[at] == ids.numpy(), self._values[at], found)
        return torch.from_numpy(found)

    def _loss_weights(self, weights: Weights) -> Weights:
        share = weights / weights.sum()
        with np.errstate(divide="ignore"):
            raw = np.where(share > 0, (len(share) * share) ** -self._beta, 0.0)
        loss_weights: Weights = raw / (share @ raw)
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


def as_tensor(array: npt.NDArray[Any] | None) -> torch.Tensor | None:
    """Return an array as a tensor over the same memory; None stays None."""
    return None if array is None else torch.from_numpy(array)


def as_array(tensor: torch.Tensor | None) -> Any:
    """Return what :func:`as_tensor` was given."""
    return None if tensor is None else tensor.numpy()
