"""Losses without reduction over the batch: (outputs, y) → Tensor [B].

One number per sample is what priorities, the exact mean over uneven ranks, and a report of which
samples diverged are made of. Everything here is local.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_leaves

from distcl import registry
from distcl.errors import ConfigError
from distcl.types import DataSpec, PyTree, UnreducedLoss

Judgement = Literal["accuracy", "r2"]
"""What the accuracy matrix of a run holds: shares of right samples, or R²."""


def cross_entropy(outputs: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Return -log softmax(outputs)[y], [B].

    outputs [B, C, ...]; y int64 [B, ...], or probabilities in the shape of outputs. Mean over
    positions, if a sample has several.
    """
    return _mean_positions(F.cross_entropy(outputs, y, reduction="none"))


def mse(outputs: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Return the squared difference, mean over a sample's values, [B].

    outputs and y have equally many values; y's shape counts, so [B, 1] and [B] fit. Raises
    ConfigError if they do not.
    """
    return _mean_positions((_as_targets("model.loss = 'mse'", outputs, y) - y) ** 2)


def bce(outputs: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Return the binary cross entropy of logits, mean over a sample's labels, [B].

    outputs and y (0, 1, or between) have equally many values, as for ``mse``.
    """
    outputs = _as_targets("model.loss = 'bce'", outputs, y)
    losses = F.binary_cross_entropy_with_logits(outputs, y.to(outputs.dtype), reduction="none")
    return _mean_positions(losses)


_BUILT_IN = (cross_entropy, mse, bce)


def create_loss(name: str) -> UnreducedLoss:
    """Return a loss by name: (outputs, y) → Tensor [B].

    A user's own is a function, or a class made without arguments, of (outputs, y). If it takes
    ``reduction``, as torch's do, it is given "none", outputs in the shape of floating-point y where
    they have as many values, and its mean over a sample's values counts. Otherwise it must return
    [B] by itself. A loss that does not raises ConfigError when called.
    """
    found: Callable[..., Any] = registry.resolve("loss", name)
    if found in _BUILT_IN:
        return found
    reduces = "reduction" in inspect.signature(found).parameters
    options = {"reduction": "none"} if reduces else {}
    criterion = found(**options) if isinstance(found, type) else partial(found, **options)

    def checked(outputs: PyTree, y: PyTree) -> torch.Tensor:
        batch = tree_leaves(outputs)[0].shape[:1]
        elementwise = reduces and isinstance(outputs, torch.Tensor) and isinstance(y, torch.Tensor)
        if elementwise and y.is_floating_point() and outputs.numel() == y.numel():
            outputs = outputs.reshape(y.shape)  # [B, 1] against [B] would broadcast to [B, B]
        losses = criterion(outputs, y)
        if elementwise and isinstance(losses, torch.Tensor) and losses.shape == y.shape:
            return _mean_positions(losses)
        return unreduced(losses, batch[0], f"model.loss = '{name}'")

    return checked


def unreduced(losses: Any, number: int, who: str = "the criterion") -> torch.Tensor:
    """Return losses that are one number a sample, [number]; else raise ConfigError. Local.

    A mean or a sum over the batch would pass for the loss of each sample.
    """
    if not isinstance(losses, torch.Tensor):
        raise ConfigError(f"{who} returned {type(losses).__name__}, no tensor")
    if losses.shape != (number,):
        raise ConfigError(
            f"{who} is a loss without unreduced form: it must return one number per sample, shape "
            f"[{number}], but returned {list(losses.shape)} (torch's take reduction='none')"
        )
    return losses


def judged_by(loss_name: str, spec: DataSpec) -> Judgement:
    """Return how a model is judged: "r2" in regression, else "accuracy".

    Regression is every loss but ``cross_entropy`` and ``bce``, on targets that are no class labels.
    Raises ConfigError, naming the loss, if a built-in loss cannot work on the stream's targets.
    """
    loss = registry.resolve("loss", loss_name)
    if loss in (mse, bce) and spec.classes:
        raise ConfigError(
            f"model.loss = '{loss_name}' needs floating-point targets, but the stream has class "
            "labels (integers); save y as floating-point numbers"
        )
    if loss is cross_entropy and not spec.classes and (spec.y_shape or (1,))[0] < 2:
        raise ConfigError(
            "model.loss = 'cross_entropy' needs class labels, but the stream's targets are "
            f"floating-point numbers of shape {list(spec.y_shape)}; save y as integers, or choose "
            "another loss (mse, bce)"
        )
    return "accuracy" if spec.classes or loss in (cross_entropy, bce) else "r2"


def per_sample_error(outputs: PyTree, y: PyTree, loss_name: str) -> torch.Tensor:
    """Return how wrong each sample is, floating point [B], without gradient.

    ``bce``: 1 where any label is on the wrong side of 0.5. With class labels, and for
    ``cross_entropy``: 1 where the largest output is not the label (the share of wrong positions,
    if there are several). In regression: the loss itself, in its units.
    """
    loss = registry.resolve("loss", loss_name)
    with torch.no_grad():
        if loss is bce:
            wrong: torch.Tensor = (_as_targets("model.loss = 'bce'", outputs, y) > 0) != (y > 0.5)
            return (wrong if wrong.ndim == 1 else wrong.flatten(1).any(1)).to(outputs.dtype)
        if loss is cross_entropy or _are_scores_of(outputs, y):
            labels = y.argmax(1) if y.shape == outputs.shape else y
            return _mean_positions((outputs.argmax(1) != labels).to(outputs.dtype))
        return create_loss(loss_name)(outputs, y)


def per_sample_squares(outputs: PyTree, y: PyTree) -> torch.Tensor:
    """Return what R² is made of, float64 [B, 1 + D].

    That is a sample's squared error, summed over its D values, and then the targets themselves.
    Raises ConfigError if outputs and y are not tensors of equally many values.
    """
    if not (isinstance(outputs, torch.Tensor) and isinstance(y, torch.Tensor)):
        raise ConfigError("R² needs outputs and targets that are one tensor each")
    with torch.no_grad():
        y = y if y.ndim > 1 else y[:, None]
        errors = (_as_targets("R²", outputs, y) - y).double().flatten(1)
        return torch.cat([errors.square().sum(1, keepdim=True), y.double().flatten(1)], 1)


def r_squared(squares: torch.Tensor) -> float:
    """Return R² = 1 - Σ|y - ŷ|² / Σ|y - ȳ|² from ``per_sample_squares`` of N samples, [N, 1 + D].

    1 is perfect, 0 what predicting the mean target would give, below 0 is worse than that. Sums
    run over samples and values together, so values of larger variance count more. Constant targets
    give 1 if met exactly, else 0, as scikit-learn has it.
    """
    error, y = squares[:, 0].sum(), squares[:, 1:]
    total = (y - y.mean(0)).square().sum()
    if total == 0:
        return float(error == 0)
    return float(1 - error / total)


def _are_scores_of(outputs: PyTree, y: PyTree) -> bool:
    """Tell whether outputs [B, C, ...] are scores of classes for integer labels y [B, ...]."""
    if not (isinstance(outputs, torch.Tensor) and isinstance(y, torch.Tensor)):
        return False
    return not y.is_floating_point() and y.shape == outputs.shape[:1] + outputs.shape[2:]


def _mean_positions(values: torch.Tensor) -> torch.Tensor:
    return values if values.ndim == 1 else values.flatten(1).mean(1)


def _as_targets(who: str, outputs: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    if outputs.shape[:1] != y.shape[:1] or outputs.numel() != y.numel():
        raise ConfigError(
            f"{who} needs one output per target, but outputs have shape {list(outputs.shape)} and "
            f"targets {list(y.shape)}"
        )
    return outputs.reshape(y.shape)
