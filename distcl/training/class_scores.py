"""Scores of classification: top_k, f1_macro and auroc, of a class a sample, or of labels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from distcl.errors import ConfigError
from distcl.losses import are_scores_of
from distcl.training.scores import NotScored, Score, one_class_a_target
from distcl.types import DataSpec, Outputs, PyTree


class TopKScore(Score):
    """Share of samples whose class is among the k largest outputs."""

    works_on = "accuracy"

    def __init__(self, spec: DataSpec, loss: str, k: int = 5) -> None:
        super().__init__(spec, loss)
        if type(k) is not int or k < 1:
            raise ConfigError(f"model.score_options.top_k.k: must be at least 1, not {k!r}")
        _refuse_positions("top_k", spec)
        one_class_a_target("top_k", loss)
        self._check(k, spec.classes or k)
        self.k = k

    def rows(self, outputs: Outputs, y: PyTree) -> torch.Tensor:
        """See :meth:`Score.rows`."""
        logits, labels = _classified("top_k", outputs.logits, y)
        self._check(self.k, logits.shape[1])
        return (logits.topk(self.k, dim=1).indices == labels[:, None]).any(1, keepdim=True)

    def chance(self) -> float | None:
        """See :meth:`Score.chance`."""
        return min(1.0, self.k / len(self.spec.labels)) if self.spec.classes else None

    @staticmethod
    def _check(k: int, classes: int) -> None:
        if k > classes:
            raise ConfigError(
                f"model.score_options.top_k.k = {k} is more than the {classes} classes there are"
            )


class F1MacroScore(Score):
    """F1 = 2·tp / (2·tp + fp + fn), mean over the classes (labels, of ``bce``) that occur.

    Those that were only predicted occur too, as scikit-learn has it.
    """

    works_on = "accuracy"

    def __init__(self, spec: DataSpec, loss: str) -> None:
        super().__init__(spec, loss)
        _refuse_positions("f1_macro", spec)

    def rows(self, outputs: Outputs, y: PyTree) -> torch.Tensor:
        """Return predictions, then targets, [B, 2L]: of L labels 0 or 1, or else of one class."""
        if self.loss == "bce":
            logits, labels = _labelled("f1_macro", outputs.logits, y)
            return torch.cat([logits > 0, labels], 1).double()
        logits, classes = _classified("f1_macro", outputs.logits, y)
        return torch.stack([logits.argmax(1), classes], 1)

    def value(self, rows: torch.Tensor) -> float:
        """See :meth:`Score.value`."""
        predicted, true = rows.tensor_split(2, dim=1)
        if self.loss != "bce":
            classes = torch.unique(rows)
            predicted, true = predicted == classes, true == classes
        predicted, true = predicted.double(), true.double()
        of_each = predicted.sum(0) + true.sum(0)
        occurs = of_each > 0
        if not occurs.any():
            raise NotScored("no label occurs, and none is predicted")
        return float((2 * (predicted * true).sum(0)[occurs] / of_each[occurs]).mean())


class AurocScore(Score):
    """Area under the ROC curve of each class against the rest, mean over the classes that occur.

    That is how often a sample of the class has a larger probability of it than one that is not; a
    tie counts half. Of ``bce``: of each label. Keeps C + 1 numbers a sample.
    """

    works_on = "accuracy"

    def __init__(self, spec: DataSpec, loss: str) -> None:
        super().__init__(spec, loss)
        _refuse_positions("auroc", spec)

    def rows(self, outputs: Outputs, y: PyTree) -> torch.Tensor:
        """Return probabilities and the class [B, C + 1]; of ``bce`` logits and labels [B, 2L]."""
        if self.loss == "bce":
            logits, labels = _labelled("auroc", outputs.logits, y)
            return torch.cat([logits.double(), labels], 1)
        logits, classes = _classified("auroc", outputs.logits, y)
        return torch.cat([logits.double().softmax(1), classes[:, None]], 1)

    def value(self, rows: torch.Tensor) -> float:
        """See :meth:`Score.value`."""
        from scipy import stats

        if not rows.isfinite().all():
            return math.nan
        if self.loss == "bce":
            scores, true = rows.tensor_split(2, dim=1)
            true = true > 0.5
        else:
            scores, classes = rows[:, :-1], rows[:, -1:]
            true = classes == torch.arange(scores.shape[1], device=rows.device)
        inside = true.sum(0)
        both = (inside > 0) & (inside < len(rows))
        if not both.any():
            raise NotScored(f"all {len(rows)} held-out samples are of one class; it needs two")
        positive = inside[both].double().cpu()
        ranks = torch.from_numpy(stats.rankdata(scores[:, both].cpu().numpy(), axis=0))
        above = (ranks * true[:, both].cpu()).sum(0) - positive * (positive + 1) / 2
        return float((above / (positive * (len(rows) - positive))).mean())

    def chance(self) -> float | None:
        """See :meth:`Score.chance`."""
        return 0.5


MOST_CLASSES = 1000
"""Classes up to which the accuracy on each is told."""
MOST_CONFUSED = 100
"""Classes up to which it is told what they are taken for, and by experience."""


def class_pairs(outputs: Outputs, y: PyTree, loss: str) -> torch.Tensor:
    """Return the predicted and the true class of each sample, float64 [B, 2]; [B, 0] of no classes.

    A label below 0 counts for nothing.
    """
    logits = outputs.logits
    if isinstance(logits, torch.Tensor) and logits.ndim == 2 and logits.shape[1] > 1:
        soft = isinstance(y, torch.Tensor) and y.shape == logits.shape and loss == "cross_entropy"
        if soft or (are_scores_of(logits, y) and y.ndim == 1):
            true = y.argmax(1) if soft else y
            return torch.stack([logits.argmax(1), true], 1).double()
    return outputs.loss.new_empty((len(outputs.loss), 0), dtype=torch.float64)


def count_confusions(pairs: torch.Tensor, classes: int) -> npt.NDArray[np.int64] | None:
    """Return how often each class, a row, is taken for which, int64 [C, C]; None: not to be told.

    C is ``classes``, more if others are predicted. ``pairs`` [N, 2] are of :func:`class_pairs`.
    """
    if pairs.shape[1:] != (2,) or len(pairs) == 0:
        return None
    predicted, true = pairs.long().cpu().numpy().T
    predicted, true = predicted[true >= 0], true[true >= 0]
    size = int(max(classes, predicted.max(initial=0) + 1, true.max(initial=0) + 1))
    if size > MOST_CLASSES:
        return None
    counts = np.bincount(true * size + predicted, minlength=size * size)
    return counts.reshape(size, size).astype(np.int64)


def class_report(
    found: Sequence[npt.NDArray[np.int64] | None], seen: int, names: Sequence[str]
) -> dict[str, Any] | None:
    """Return what is told of classes, plain values; None if there are none, or too many.

    ``found``: the counts of each experience; ``seen``: how many of them, from the first, have been
    trained on: ``accuracy`` [C] of a class (the share of its samples that are right: its recall;
    None: it has none), and ``confusion`` [C, C] are over their held-out samples together.
    ``by_experience``: accuracies [E][C]. With more than ``MOST_CONFUSED`` classes both are None.
    """
    known = [counts for counts in found if counts is not None]
    if not known or len(known) < len(found):
        return None
    size = max(map(len, known))
    every = [np.pad(counts, (0, size - len(counts))) for counts in known]
    whole = sum(every[:seen] or every, np.zeros((size, size), np.int64))
    few = size <= MOST_CONFUSED
    return {
        "names": [names[k] if k < len(names) else str(k) for k in range(size)],
        "accuracy": _recall(whole),
        "by_experience": [_recall(counts) for counts in every] if few else None,
        "confusion": whole.tolist() if few else None,
    }


def _recall(counts: npt.NDArray[np.int64]) -> list[float | None]:
    pairs = zip(counts.diagonal().tolist(), counts.sum(1).tolist(), strict=True)
    return [right / number if number else None for right, number in pairs]


def _refuse_positions(name: str, spec: DataSpec) -> None:
    if spec.classes and spec.y_shape:
        raise ConfigError(
            f"model.score = '{name}' needs one class label a sample, but targets have shape "
            f"{list(spec.y_shape)}; token_accuracy, perplexity and loss take several"
        )


def _classified(name: str, logits: PyTree, y: PyTree) -> tuple[torch.Tensor, torch.Tensor]:
    """Return scores of classes [B, C] and the class of each sample [B]."""
    fits = isinstance(logits, torch.Tensor) and isinstance(y, torch.Tensor) and logits.ndim == 2
    if fits and y.shape == logits.shape:
        y = y.argmax(1)
    if not fits or y.is_floating_point() or y.shape != logits.shape[:1]:
        raise ConfigError(
            f"model.score = '{name}' needs outputs [B, C] and class labels [B], but outputs are "
            f"{_shape(logits)} and targets {_shape(y)}"
        )
    return logits, y


def _labelled(name: str, logits: PyTree, y: PyTree) -> tuple[torch.Tensor, torch.Tensor]:
    """Return logits of labels [B, L] and the labels, 0 or 1, [B, L]."""
    fits = isinstance(logits, torch.Tensor) and isinstance(y, torch.Tensor)
    if not fits or logits.numel() != y.numel():
        raise ConfigError(
            f"model.score = '{name}' needs one output per label, but outputs are {_shape(logits)} "
            f"and targets {_shape(y)}"
        )
    n = len(y)
    return logits.reshape(n, -1), (y.reshape(n, -1) > 0.5).double()


def _shape(tree: PyTree) -> str:
    return str(list(tree.shape)) if isinstance(tree, torch.Tensor) else type(tree).__name__
