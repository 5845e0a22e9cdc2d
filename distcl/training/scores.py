"""Scores: what the accuracy matrix holds, from a row of every held-out sample to one number.

A score is one subclass of :class:`Score`, or a function of the user's. The registry calls the class
with (spec, name of the loss) and, as keywords, ``model.score_options.NAME``. Nothing here
communicates: ranks measure different samples, and the evaluator gathers their rows.
"""

from __future__ import annotations

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from distcl import registry
from distcl.config import ModelConfig
from distcl.errors import ConfigError
from distcl.losses import (
    count_positions,
    judged_by,
    per_sample_error,
    per_sample_squares,
    r_squared,
)
from distcl.types import DataSpec, Outputs, PyTree


class NotScored(ConfigError):
    """Held-out samples of which a score says nothing; the message says why."""


class Score(ABC):
    """Base of every score.

    ``higher_is_better``: which way is good, for all that is made of the matrix. ``works_on``: what
    :func:`distcl.losses.judged_by` must say of loss and targets, "" for any.
    """

    higher_is_better = True
    works_on = ""

    def __init__(self, spec: DataSpec, loss: str) -> None:
        self.spec = spec
        self.loss = loss

    @abstractmethod
    def rows(self, outputs: Outputs, y: PyTree) -> torch.Tensor:
        """Return what the score needs to know of each sample, real numbers [B, K]; K is fixed.

        Local; called in inference mode, the model in eval mode. Kept as float64.
        """

    def value(self, rows: torch.Tensor) -> float:
        """Return the score of N > 0 samples, float64 [N, K] in their order: the mean of column 0.

        Local, and the same on every rank. Raises NotScored saying why it is not defined on them.
        """
        return float(rows[:, 0].mean())

    def error(self, value: float) -> float:
        """Return how wrong a model of this score is, 0 for a perfect one; the guard compares it."""
        return 1.0 - value if self.higher_is_better else value

    def chance(self) -> float | None:
        """Return what a model that knows nothing would score, or None where that is unknown.

        Of classes, only those that occur are guessed at.
        """
        return None


class AccuracyScore(Score):
    """Share of samples that are right; of several positions, the mean share of right ones."""

    works_on = "accuracy"

    def rows(self, outputs: Outputs, y: PyTree) -> torch.Tensor:
        """See :meth:`Score.rows`."""
        return per_sample_error(outputs.logits, y, self.loss)[:, None]

    def value(self, rows: torch.Tensor) -> float:
        """See :meth:`Score.value`."""
        return 1.0 - super().value(rows)

    def chance(self) -> float | None:
        """See :meth:`Score.chance`."""
        return 1.0 / len(self.spec.labels) if self.spec.classes else None


class R2Score(Score):
    """R² of regression, see :func:`distcl.losses.r_squared`."""

    works_on = "r2"

    def rows(self, outputs: Outputs, y: PyTree) -> torch.Tensor:
        """See :meth:`Score.rows`."""
        return per_sample_squares(outputs.logits, y)

    def value(self, rows: torch.Tensor) -> float:
        """See :meth:`Score.value`."""
        return r_squared(rows)

    def chance(self) -> float | None:
        """See :meth:`Score.chance`."""
        return 0.0


class LossScore(Score):
    """The loss: mean over all targets that count, so a sample of many tokens counts more."""

    higher_is_better = False

    def rows(self, outputs: Outputs, y: PyTree) -> torch.Tensor:
        """See :meth:`Score.rows`."""
        return _counted(outputs.loss, self.loss, y)

    def value(self, rows: torch.Tensor) -> float:
        """See :meth:`Score.value`."""
        return _mean_counted(rows)

    def chance(self) -> float | None:
        """See :meth:`Score.chance`."""
        known = self.loss in ("cross_entropy", "next_token") and self.spec.classes
        return math.log(len(self.spec.labels)) if known else None


class PerplexityScore(LossScore):
    """Exponential of the mean cross entropy of all targets that count."""

    works_on = "accuracy"

    def value(self, rows: torch.Tensor) -> float:
        """See :meth:`Score.value`."""
        return _exp(super().value(rows))

    def error(self, value: float) -> float:
        """See :meth:`Score.error`."""
        return math.log(value) if value > 0 else 0.0

    def chance(self) -> float | None:
        """See :meth:`Score.chance`."""
        found = super().chance()
        return None if found is None else _exp(found)


class BitsPerByteScore(LossScore):
    """Mean cross entropy in bits of all targets that count: per byte, where tokens are bytes."""

    works_on = "accuracy"

    def value(self, rows: torch.Tensor) -> float:
        """See :meth:`Score.value`."""
        return super().value(rows) / math.log(2)

    def chance(self) -> float | None:
        """See :meth:`Score.chance`."""
        found = super().chance()
        return None if found is None else found / math.log(2)


class TokenAccuracyScore(AccuracyScore):
    """Share of right targets among all that count, whichever sample they are of."""

    def __init__(self, spec: DataSpec, loss: str) -> None:
        super().__init__(spec, loss)
        one_class_a_target("token_accuracy", loss)

    def rows(self, outputs: Outputs, y: PyTree) -> torch.Tensor:
        """See :meth:`Score.rows`."""
        return _counted(super().rows(outputs, y)[:, 0], self.loss, y)

    def value(self, rows: torch.Tensor) -> float:
        """See :meth:`Score.value`."""
        return 1.0 - _mean_counted(rows)


class OwnScore(Score):
    """A function of the user's, (outputs, y) → [B], whose mean counts."""

    def __init__(
        self, spec: DataSpec, loss: str, name: str, function: Callable[..., Any], higher: bool
    ) -> None:
        super().__init__(spec, loss)
        self.higher_is_better = higher
        self._name = name
        self._function = function

    def rows(self, outputs: Outputs, y: PyTree) -> torch.Tensor:
        """See :meth:`Score.rows`."""
        found, n = self._function(outputs.logits, y), len(outputs.loss)
        if not isinstance(found, torch.Tensor) or found.shape != (n,) or found.is_complex():
            got = type(found).__name__
            if isinstance(found, torch.Tensor):
                got = f"shape {list(found.shape)}{', complex numbers' * found.is_complex()}"
            raise ConfigError(
                f"model.score = '{self._name}' must return one number per sample, shape [{n}], but "
                f"returned {got}; their mean counts"
            )
        return found[:, None].to(outputs.loss.device)


_TAKEN = ("compute", "draws", "guard", "loss", "monitor", "priority", "samples")
"""Names of other figures beside which scores are told, but for the score that is called so."""


def create_scores(config: ModelConfig, spec: DataSpec) -> dict[str, Score]:
    """Return the scores of a run by the names that they are told by, the leading one first.

    Without ``model.score`` that is accuracy, or R² in regression. Raises ConfigError naming a score
    that does not fit loss and targets, or an option that it does not take. Local.
    """
    judged = judged_by(config.loss, spec)
    known = {part.name for part in registry.parts("score")}
    found: dict[str, Score] = {}
    for name in config.scores or [judged]:
        told = name.rpartition(":")[2]
        if name in list(config.scores)[: len(found)]:
            raise ConfigError(f"model.score names '{name}' twice")
        if (told in _TAKEN and told != name) or told in found or (told != name and told in known):
            raise ConfigError(
                f"model.score = '{name}' would be told as '{told}', which has another "
                "meaning; give it another name"
            )
        score = found[told] = _create(name, config.score_options.get(name, {}), spec, config.loss)
        if score.works_on not in ("", judged):
            needs = ("class labels", f"model.loss = '{config.loss}' on floating-point targets")
            other = "'r2' or 'loss'"
            if judged == "accuracy":
                what = "class labels" if spec.classes else f"model.loss = '{config.loss}'"
                needs, other = ("regression on floating-point targets", what), "'accuracy'"
            raise ConfigError(
                f"model.score = '{name}' needs {needs[0]}, which {needs[1]} is not; choose {other}"
            )
    return found


def _create(name: str, options: dict[str, Any], spec: DataSpec, loss: str) -> Score:
    factory = registry.resolve("score", name)
    if isinstance(factory, type):
        if not issubclass(factory, Score):
            raise ConfigError(
                f"model.score = '{name}' is a class, but no distcl.training.scores.Score; it may "
                "also be a function of (outputs, y) that returns one number per sample"
            )
        if inspect.isabstract(factory):
            missing = ", ".join(sorted(factory.__abstractmethods__))
            raise ConfigError(f"model.score = '{name}' has no method {missing}")
        score: Score = registry.create("score", name, spec, loss, options=options)
        if not isinstance(score.higher_is_better, bool):
            raise ConfigError(f"model.score = '{name}': higher_is_better must be true or false")
        return score
    options = dict(options)
    higher = options.pop("higher_is_better", getattr(factory, "higher_is_better", True))
    if not isinstance(higher, bool):
        raise ConfigError(f"model.score = '{name}': higher_is_better must be true or false")
    try:
        takes = list(inspect.signature(factory).parameters.values())
    except ValueError:  # a builtin that does not tell what it takes
        return OwnScore(spec, loss, name, partial(factory, **options), higher)
    known = [p.name for p in takes[2:]]
    for key in options:
        if key not in known and not any(p.kind is p.VAR_KEYWORD for p in takes):
            near = registry.nearest(key, [*known, "higher_is_better"])
            raise ConfigError(f"score '{name}' has no option '{key}'{near}")
    return OwnScore(spec, loss, name, partial(factory, **options), higher)


# Pieces of several scores.


def _counted(means: torch.Tensor, loss: str, y: PyTree) -> torch.Tensor:
    """Return the sum over each sample's targets, and their number, [B, 2], from the mean [B]."""
    counts = count_positions(loss, y).double()
    sums = torch.where(counts > 0, means.double() * counts, 0.0)  # a mean over none is NaN
    return torch.stack([sums, counts], 1)


def _mean_counted(rows: torch.Tensor) -> float:
    total, count = rows.sum(0).tolist()
    if not count:
        raise NotScored("no target of its held-out samples counts: all of them are -100")
    return float(total / count)


def one_class_a_target(name: str, loss: str) -> None:
    """Raise ConfigError if a score that needs it is to work on labels of 0 and 1."""
    if loss == "bce":
        raise ConfigError(
            f"model.score = '{name}' needs one class a sample, or a token; model.loss = 'bce' has "
            "labels of 0 and 1: choose 'accuracy', 'f1_macro' or 'auroc'"
        )


def _exp(value: float) -> float:
    return float(torch.tensor(value, dtype=torch.float64).exp())  # inf, where math.exp raises
