"""Scores of classification: top_k, f1_macro and auroc, of a class a sample, or of labels."""

from __future__ import annotations

import math

import torch

from distcl.errors import ConfigError
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
