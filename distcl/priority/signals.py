"""What a sample's priority is made of: one small class a signal; see ``types.PrioritySignal``.

Each says what it computes from the unreduced loss [B] and the outputs z of a batch: [B, C, ...]
for classes, [B, ...] for independent labels. Of several positions of a sample the mean counts, as
in the loss. All is local, without gradient; none changes what it is given. Half precision is
computed in float32.

A factory that takes ``loss`` (the name of model.loss), ``classes`` (the stream's number of classes,
0 for none) or ``criterion`` (the unreduced loss itself) is given them.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from distcl import losses, registry
from distcl.errors import ConfigError
from distcl.types import Batch, Outputs, PrioritySignal, PyTree, UnreducedLoss


class LossDelta:
    """The published signal: how much a sample's loss rose since theta_star.

    score_i = max(L(w_now, x_i) - L(theta_star, x_i), 0); weights take ``priority.min_score`` (1e-8)
    for smaller ones.
    """

    needs_anchor = True
    needs_logits = False
    needs_inputs = False

    def score(self, batch: Batch, now: Outputs, anchor: Outputs | None) -> torch.Tensor:
        """Return scores [B]; ``anchor`` holds theta_star's losses."""
        if anchor is None:
            raise ValueError("loss_delta needs the losses of theta_star")
        return (now.loss - anchor.loss).clamp(min=0)


class Loss:
    """The loss itself, L(w_now, x_i) (Loshchilov & Hutter 2016, who rank by it)."""

    needs_anchor = False
    needs_logits = False
    needs_inputs = False

    def score(self, batch: Batch, now: Outputs, anchor: Outputs | None) -> torch.Tensor:
        """Return scores [B]."""
        return now.loss


class GradNorm:
    """An upper bound on the norm of a sample's gradient, up to a factor common to all samples.

    score_i = ‖∂ℓ_i/∂z_i‖₂, z the last layer's pre-activations (Katharopoulos & Fleuret 2018,
    section 3.2). For cross entropy that is ‖softmax(z) - onehot(y)‖₂. Computed by autograd of the
    unreduced loss with respect to the outputs alone, so it fits any loss; no backward through the
    model.
    """

    needs_anchor = False
    needs_logits = False
    needs_inputs = False

    def __init__(self, criterion: UnreducedLoss) -> None:
        self._criterion = criterion

    def score(self, batch: Batch, now: Outputs, anchor: Outputs | None) -> torch.Tensor:
        """Return scores [B]."""
        with torch.inference_mode(False), torch.enable_grad():  # clones are not inference tensors
            outputs = tree_map(lambda z: _full(z).clone().detach().requires_grad_(), now.logits)
            y = tree_map_only(torch.Tensor, torch.Tensor.clone, batch.y)
            total = self._criterion(outputs, y).sum()
            grads = torch.autograd.grad(total, tree_leaves(outputs), materialize_grads=True)
        squares = [g.reshape(len(g), -1).square().sum(1) for g in grads]
        return torch.stack(squares).sum(0).sqrt()


class Entropy:
    """How unsure the model is of a sample, in nats, whatever its label.

    Classes: score_i = -Σ_c p_c ln p_c, p = softmax(z_i) (uncertainty sampling; Settles 2009,
    section 3.1). Independent labels (bce): the sum of their binary entropies, p = sigmoid(z_i).
    """

    needs_anchor = False
    needs_logits = True
    needs_inputs = False

    def __init__(self, loss: str = "cross_entropy", classes: int = 0) -> None:
        self._labelwise, self._loss = _labelwise("entropy", loss, classes), loss

    def score(self, batch: Batch, now: Outputs, anchor: Outputs | None) -> torch.Tensor:
        """Return scores [B]."""
        z, gather = _logits("entropy", now, self._labelwise, self._loss, batch)
        if self._labelwise:
            return _entropy(z.sigmoid(), True, gather)
        # with d = z - max z:  ln Σ e^d - Σ d e^d / Σ e^d; a softmax over few classes is slower
        d = (z - z.amax(1, keepdim=True)).clamp_(min=-200)  # a logit may be -inf
        e = d.exp()
        total = e.sum(1)
        return gather(total.log() - e.mul_(d).sum(1) / total)


class Fisher:
    """The trace of the Fisher information that a sample carries about the last pre-activations.

    score_i = E_{y~p} ‖∂ln p(y|z_i)/∂z_i‖² = Σ_c p_c (1 - p_c), with p as for ``entropy``: the trace
    of the last layer's Fisher (Ash et al. 2021) for an input of norm one. The labels are
    drawn from the model, so it is the Fisher, not the empirical one (Kunstner et al. 2019), and
    label noise does not reach it. No gradient is computed.
    """

    needs_anchor = False
    needs_logits = True
    needs_inputs = False

    def __init__(self, loss: str = "cross_entropy", classes: int = 0) -> None:
        self._labelwise, self._loss = _labelwise("fisher", loss, classes), loss

    def score(self, batch: Batch, now: Outputs, anchor: Outputs | None) -> torch.Tensor:
        """Return scores [B]."""
        p, gather = _probabilities("fisher", now, self._labelwise, self._loss, batch)
        return _of_samples(p * (1 - p), self._labelwise, gather)


class Disagreement:
    """How far the present weights and those of the last K rounds' starts are apart on a sample.

    score_i = 1/M Σ_m KL(p_m ‖ p̄) = H(p̄) - 1/M Σ_m H(p_m): query by committee (McCallum & Nigam
    1998), the committee being w_now, theta_star and the anchors before it, as many as
    there are yet, M ≤ K + 1; p̄ is the mean of its probabilities. ``anchors`` is K; each costs a
    forward and 1/W of the model's memory per rank.
    """

    needs_anchor = True
    needs_logits = True
    needs_inputs = False

    def __init__(self, anchors: int = 3, loss: str = "cross_entropy", classes: int = 0) -> None:
        if anchors < 1:
            raise ConfigError(f"priority.options.anchors must be at least 1, not {anchors}")
        self.anchors = anchors
        self._labelwise, self._loss = _labelwise("disagreement", loss, classes), loss

    def score(self, batch: Batch, now: Outputs, anchor: Outputs | None) -> torch.Tensor:
        """Return scores [B]; ``anchor`` holds theta_star's outputs, and ``older`` ones."""
        if anchor is None:
            raise ValueError("disagreement needs the outputs of theta_star")
        every = [
            _probabilities("disagreement", outputs, self._labelwise, self._loss, batch)
            for outputs in (now, anchor, *anchor.older)
        ]
        members, gather = torch.stack([p for p, _ in every]), every[0][1]
        within = [_entropy(p, self._labelwise, gather) for p in members]
        together = _entropy(members.mean(0), self._labelwise, gather)
        return (together - torch.stack(within).mean(0)).clamp(0)


def _labelwise(signal: str, loss: str, classes: int) -> bool:
    """Tell whether each output is a label of its own (sigmoid), or all are classes (softmax).

    Raises ConfigError naming signal and loss if they are neither: regression.
    """
    found = registry.resolve("loss", loss)
    if found is losses.bce:
        return True
    if found in (losses.cross_entropy, losses.next_token) or (found is not losses.mse and classes):
        return False
    raise ConfigError(
        f"priority.signal = '{signal}' needs outputs that are probabilities; with model.loss = "
        f"'{loss}' they are values of a regression: use loss, loss_delta or grad_norm"
    )


def _logits(
    signal: str, outputs: Outputs, labelwise: bool, loss: str, batch: Batch
) -> tuple[torch.Tensor, losses.Gather]:
    """Return the logits, and what makes one value a sample, as :func:`losses.one_by_one` does.

    Raises ConfigError if there can be no probabilities.
    """
    logits: PyTree = outputs.logits
    if not isinstance(logits, torch.Tensor) or not logits.is_floating_point():
        kind = str(logits.dtype) if isinstance(logits, torch.Tensor) else type(logits).__name__
        raise ConfigError(
            f"priority.signal = '{signal}' needs a model that returns one tensor of logits, "
            f"not {kind}"
        )
    logits, gather = losses.one_by_one(logits, batch.y, loss)
    if not labelwise and (logits.ndim < 2 or logits.shape[1] < 2):
        raise ConfigError(
            f"priority.signal = '{signal}' needs logits of two classes or more in dimension 1, "
            f"not outputs of shape {list(logits.shape)}"
        )
    return _full(logits), gather


def _probabilities(
    signal: str, outputs: Outputs, labelwise: bool, loss: str, batch: Batch
) -> tuple[torch.Tensor, losses.Gather]:
    z, gather = _logits(signal, outputs, labelwise, loss, batch)
    return (z.sigmoid() if labelwise else z.softmax(1)), gather


def _entropy(p: torch.Tensor, labelwise: bool, gather: losses.Gather) -> torch.Tensor:
    terms = torch.special.entr(p)  # -p ln p, 0 at 0
    return _of_samples(terms + torch.special.entr(1 - p) if labelwise else terms, labelwise, gather)


def _of_samples(terms: torch.Tensor, labelwise: bool, gather: losses.Gather) -> torch.Tensor:
    """Sum over classes, mean over positions; or sum over all labels: [B]."""
    if labelwise:
        return terms if terms.ndim == 1 else terms.flatten(1).sum(1)
    return gather(terms.sum(1))


def _full(z: torch.Tensor) -> torch.Tensor:
    return z if z.dtype == torch.float64 else z.float()


def create_signal(
    name: str,
    options: dict[str, Any] | None = None,
    *,
    criterion: UnreducedLoss | None = None,
    loss: str = "cross_entropy",
    classes: int = 0,
) -> PrioritySignal:
    """Return a signal by its registered name or ``package.module:attribute``.

    Its factory gets the user's ``options`` and, if it takes them, ``criterion``, ``loss`` and
    ``classes``; see signals.py. Raises ConfigError for one that does not fit the loss.
    """
    factory = registry.resolve("signal", name)
    try:
        takes = inspect.signature(factory).parameters.keys()
    except ValueError:  # a builtin does not tell
        takes = {}.keys()
    given = {"criterion": criterion, "loss": loss, "classes": classes}
    given = {key: value for key, value in given.items() if key in takes}
    for key in given.keys() & (options or {}).keys():
        raise ConfigError(f"priority.options.{key} is no option: signals are given the model's own")
    signal: PrioritySignal = registry.create("signal", name, options={**(options or {}), **given})
    for attribute in ("needs_anchor", "needs_logits", "score"):
        if not hasattr(signal, attribute):
            raise ConfigError(f"signal '{name}' has no '{attribute}'; see types.PrioritySignal")
    return signal
