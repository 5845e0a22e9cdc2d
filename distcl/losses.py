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
from distcl.errors import ConfigError, DataError
from distcl.types import IGNORED, DataSpec, PyTree, UnreducedLoss

Judgement = Literal["accuracy", "r2"]
"""What the accuracy matrix of a run holds: shares of right samples, or R²."""


def cross_entropy(outputs: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Return -log softmax(outputs)[y], [B].

    outputs [B, C], or of several positions [B, C, ...] as torch has it, or [B, ..., C] as language
    models do; y int64 [B, ...], or probabilities in the shape of outputs. With several positions it
    is the mean over a sample's own whose y is not -100; NaN if there is none. Raises ConfigError if
    the shapes do not fit, or fit both ways.
    """
    if y.shape == outputs.shape or (outputs.ndim == 2 and y.ndim == 1):
        return _mean_positions(F.cross_entropy(outputs, y, reduction="none"))
    return _over_positions(_classes_last(outputs, y), y)


def next_token(outputs: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Return how badly each token is foretold by those before it, mean over a sample's, [B].

    outputs [B, T, V] of a causal model; y int64 [B, T]: its *inputs*, -100 where there is nothing
    to learn (padding). Outputs at t are held against y at t + 1 here, so neither the data nor the
    model shifts anything. NaN if nothing is left of a sample. Raises ConfigError on other shapes.
    """
    return _over_positions(*_foretold(outputs, y))


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


_BUILT_IN = (cross_entropy, next_token, mse, bce)


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
    reduces |= getattr(found, "reduction", None) == "none"  # a module of torch's that is made
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
    Raises ConfigError, naming the loss, if a built-in loss cannot work on the stream's targets;
    DataError naming a sample that has nothing to foretell.
    """
    loss = registry.resolve("loss", loss_name)
    if loss in (mse, bce) and spec.classes:
        raise ConfigError(
            f"model.loss = '{loss_name}' needs floating-point targets, but the stream has class "
            "labels (integers); save y as floating-point numbers"
        )
    if loss is next_token and not (spec.classes and len(spec.y_shape) == 1):
        raise ConfigError(
            "model.loss = 'next_token' needs the tokens themselves as targets, integers [T] a "
            f"sample; the stream has {'labels' if spec.classes else 'floating-point numbers'} of "
            f"shape {list(spec.y_shape)}"
        )
    if loss is next_token and spec.lone:
        raise DataError(
            f"{spec.lone} has no token to foretell (model.loss = 'next_token'): its targets are "
            f"{IGNORED} but for the first"
        )
    if loss is cross_entropy and not spec.classes and (spec.y_shape or (1,))[0] < 2:
        raise ConfigError(
            "model.loss = 'cross_entropy' needs class labels, but the stream's targets are "
            f"floating-point numbers of shape {list(spec.y_shape)}; save y as integers, or choose "
            "another loss (mse, bce)"
        )
    return "accuracy" if spec.classes or loss in (cross_entropy, bce) else "r2"


def count_positions(loss_name: str, y: PyTree) -> torch.Tensor:
    """Return how many targets of each sample count, int64 [B]: those that are not -100.

    One if a sample has one target; ``next_token`` foretells all tokens but the first.
    """
    if not isinstance(y, torch.Tensor) or y.ndim == 1 or y.is_floating_point():
        leaf = tree_leaves(y)[0]
        return torch.ones(len(leaf), dtype=torch.int64, device=leaf.device)
    shifted = registry.resolve("loss", loss_name) is next_token
    return _valid(y[:, 1:] if shifted else y)


def per_sample_error(outputs: PyTree, y: PyTree, loss_name: str) -> torch.Tensor:
    """Return how wrong each sample is, floating point [B], without gradient.

    ``bce``: 1 where any label is on the wrong side of 0.5. With class labels, and for
    ``cross_entropy`` and ``next_token``: 1 where the largest output is not the label (the share of
    wrong positions, if there are several). In regression: the loss itself, in its units.
    """
    loss = registry.resolve("loss", loss_name)
    with torch.no_grad():
        if loss is bce:
            wrong: torch.Tensor = (_as_targets("model.loss = 'bce'", outputs, y) > 0) != (y > 0.5)
            return (wrong if wrong.ndim == 1 else wrong.flatten(1).any(1)).to(outputs.dtype)
        if loss is next_token:
            outputs, y = _foretold(outputs, y)
        if loss in (cross_entropy, next_token) or are_scores_of(outputs, y):
            if y.shape == outputs.shape:
                return _mean_positions((outputs.argmax(1) != y.argmax(1)).to(outputs.dtype))
            last = outputs if loss is next_token else _classes_last(outputs, y)
            wrong = (last.argmax(-1) != y).to(outputs.dtype)
            return wrong if y.ndim == 1 else (wrong * (y != IGNORED)).flatten(1).sum(1) / _valid(y)
        return create_loss(loss_name)(outputs, y)


def class_scores(outputs: torch.Tensor, y: PyTree, loss_name: str) -> torch.Tensor:
    """Return scores of classes with the classes last, [B, ..., C]; y says where they were."""
    if outputs.ndim == 2 or registry.resolve("loss", loss_name) is next_token:
        return outputs
    return outputs.movedim(1, -1) if y.shape == outputs.shape else _classes_last(outputs, y)


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


Gather = Callable[[torch.Tensor], torch.Tensor]
"""Values [N] of single positions -> their mean over each sample's that count, [B]."""


def one_by_one(
    outputs: torch.Tensor, y: PyTree, loss: str | UnreducedLoss
) -> tuple[torch.Tensor, Gather]:
    """Return outputs [N, C] of the positions of all samples, and what makes one value a sample.

    For y int64 [B, ...] of several labels a sample; other outputs, [B, C, ...], stay as they are.
    """
    several = isinstance(y, torch.Tensor) and y.ndim > 1 and not y.is_floating_point()
    if not several or outputs.ndim < 3:
        return outputs, _mean_positions
    if (registry.resolve("loss", loss) if isinstance(loss, str) else loss) is next_token:
        outputs, y = _foretold(outputs, y)
    else:
        outputs = _classes_last(outputs, y)
    there, number = y != IGNORED, _valid(y)
    return outputs.flatten(
        0, -2
    ), lambda values: (values.view_as(y) * there).flatten(1).sum(1) / number


def are_scores_of(outputs: PyTree, y: PyTree) -> bool:
    """Tell whether outputs are scores of classes for integer labels y [B, ...]."""
    if not (isinstance(outputs, torch.Tensor) and isinstance(y, torch.Tensor)):
        return False
    shapes = (outputs.shape[:1] + outputs.shape[2:], outputs.shape[:-1])
    return not y.is_floating_point() and y.shape in shapes


def _classes_last(outputs: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Return outputs [B, C, ...] or [B, ..., C] as [B, ..., C], for labels y [B, ...]."""
    first = y.shape == outputs.shape[:1] + outputs.shape[2:]
    last = y.shape == outputs.shape[:-1]
    shapes = f"outputs have shape {list(outputs.shape)} and targets {list(y.shape)}"
    if not (first or last):
        raise ConfigError(f"scores [B, C, ...] or [B, ..., C] for labels [B, ...] needed: {shapes}")
    if first and last and outputs.ndim > 2:
        raise ConfigError(
            f"{shapes}: the classes could be the second dimension or the last; choose another "
            "number of positions"
        )
    return outputs if last else outputs.movedim(1, -1)


def _foretold(outputs: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return outputs [B, T - 1, V] and the tokens [B, T - 1] that they foretell."""
    if outputs.ndim != 3 or y.is_floating_point() or y.shape != outputs.shape[:2]:
        raise ConfigError(
            "model.loss = 'next_token' needs outputs [B, T, V] for tokens [B, T], but outputs have "
            f"shape {list(outputs.shape)} and targets {list(y.shape)}"
        )
    return outputs[:, :-1], y[:, 1:]


def _valid(y: torch.Tensor) -> torch.Tensor:
    return (y != IGNORED).flatten(1).sum(1)


def _over_positions(outputs: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Return the mean cross entropy over the positions of each sample that count, [B]."""
    each = F.cross_entropy(
        outputs.flatten(0, -2), y.flatten(), reduction="none", ignore_index=IGNORED
    )
    return each.view_as(y).flatten(1).sum(1) / _valid(y)


def _mean_positions(values: torch.Tensor) -> torch.Tensor:
    return values if values.ndim == 1 else values.flatten(1).mean(1)


def _as_targets(who: str, outputs: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    if outputs.shape[:1] != y.shape[:1] or outputs.numel() != y.numel():
        raise ConfigError(
            f"{who} needs one output per target, but outputs have shape {list(outputs.shape)} and "
            f"targets {list(y.shape)}"
        )
    return outputs.reshape(y.shape)
