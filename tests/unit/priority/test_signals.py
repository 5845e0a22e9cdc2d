"""Each signal against its formula, written out, in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import expit, log_softmax, softmax, xlogy
from torch import nn

from distcl import Anchor, Runtime
from distcl.data.loader import as_source
from distcl.errors import ConfigError
from distcl.losses import bce, cross_entropy, mse
from distcl.parallel.inference import ShardedForward
from distcl.parallel.partition import create_partition
from distcl.priority.scoring import Scorer
from distcl.priority.signals import create_signal
from distcl.types import Batch, Outputs

B, C = 23, 5


def _batch(kind: str, seed: int = 0) -> tuple[Batch, Outputs]:
    """Logits [B, C] with labels, [B, C, 3] with labels [B, 3], or [B, C] with targets [B, C]."""
    g = torch.Generator().manual_seed(seed)
    shape = (B, C, 3) if kind == "positions" else (B, C)
    logits = 4 * torch.randn(shape, generator=g, dtype=torch.float64)
    if kind in ("bce", "mse"):
        y, criterion = torch.rand(B, C, generator=g, dtype=torch.float64).round(), bce
        criterion = bce if kind == "bce" else mse
    else:
        y = torch.randint(0, C, (B, *shape[2:]), generator=g)
        criterion = cross_entropy
    batch = Batch(torch.arange(B), torch.zeros(B, 1), y, B)
    return batch, Outputs(criterion(logits, y), logits)


def _score(name: str, batch: Batch, now: Outputs, anchor: Any = None, **more: Any) -> np.ndarray:
    signal = create_signal(name, **{"criterion": cross_entropy, "classes": C, **more})
    before = now.logits.clone()
    with torch.inference_mode():
        scores = signal.score(batch, now, anchor)
    assert torch.equal(now.logits, before)
    assert scores.shape == (len(batch),)
    assert not scores.requires_grad
    return scores.numpy()


def _entropy(p: np.ndarray) -> np.ndarray:
    return -xlogy(p, p).sum(1)


def test_loss_is_the_loss_and_loss_delta_what_it_gained() -> None:
    batch, now = _batch("classes")
    _, anchor = _batch("classes", seed=1)
    gained = np.maximum(now.loss.numpy() - anchor.loss.numpy(), 0)
    assert (_score("loss", batch, now) == now.loss.numpy()).all()
    np.testing.assert_allclose(_score("loss_delta", batch, now, anchor), gained, rtol=0, atol=1e-8)


def test_entropy_of_classes_of_positions_and_of_independent_labels() -> None:
    batch, now = _batch("classes")
    dense = _entropy(softmax(now.logits.numpy(), 1))
    np.testing.assert_allclose(_score("entropy", batch, now), dense, rtol=0, atol=1e-8)
    masked = now.logits.clone()
    masked[:, 2] = -torch.inf
    dense = _entropy(softmax(masked.numpy(), 1))
    scores = _score("entropy", batch, Outputs(now.loss, masked))
    np.testing.assert_allclose(scores, dense, rtol=0, atol=1e-8)
    batch, now = _batch("positions")
    dense = _entropy(softmax(now.logits.numpy(), 1)).mean(1)
    np.testing.assert_allclose(_score("entropy", batch, now), dense, rtol=0, atol=1e-8)
    batch, now = _batch("bce")
    p = expit(now.logits.numpy())
    dense = _entropy(p) + _entropy(1 - p)
    scores = _score("entropy", batch, now, loss="bce", classes=0)
    np.testing.assert_allclose(scores, dense, rtol=0, atol=1e-8)


def test_grad_norm_of_cross_entropy_bce_and_mse_is_the_closed_form() -> None:
    batch, now = _batch("classes")
    onehot = np.eye(C)[batch.y.numpy()]
    dense = np.linalg.norm(softmax(now.logits.numpy(), 1) - onehot, axis=1)
    np.testing.assert_allclose(_score("grad_norm", batch, now), dense, rtol=0, atol=1e-8)
    batch, now = _batch("positions")
    onehot = np.moveaxis(np.eye(C)[batch.y.numpy()], 2, 1)
    gradient = (softmax(now.logits.numpy(), 1) - onehot) / 3  # the loss is the mean of 3 positions
    dense = np.sqrt(np.square(gradient).sum((1, 2)))
    np.testing.assert_allclose(_score("grad_norm", batch, now), dense, rtol=0, atol=1e-8)
    batch, now = _batch("bce")
    dense = np.linalg.norm(expit(now.logits.numpy()) - batch.y.numpy(), axis=1) / C
    scores = _score("grad_norm", batch, now, criterion=bce)
    np.testing.assert_allclose(scores, dense, rtol=0, atol=1e-8)
    batch, now = _batch("mse")
    dense = np.linalg.norm(now.logits.numpy() - batch.y.numpy(), axis=1) * 2 / C
    scores = _score("grad_norm", batch, now, criterion=mse)
    np.testing.assert_allclose(scores, dense, rtol=0, atol=1e-8)


def test_fisher_is_the_expected_squared_gradient_under_the_models_own_labels() -> None:
    batch, now = _batch("classes")
    p = softmax(now.logits.numpy(), 1)
    squares = np.square(p[:, None, :] - np.eye(C)).sum(2)  # [B, label]: ‖p - e_label‖²
    dense = (p * squares).sum(1)
    np.testing.assert_allclose(_score("fisher", batch, now), dense, rtol=0, atol=1e-8)
    batch, now = _batch("bce")
    p = expit(now.logits.numpy())
    scores = _score("fisher", batch, now, loss="bce", classes=0)
    np.testing.assert_allclose(scores, (p * (1 - p)).sum(1), rtol=0, atol=1e-8)


def _divergence(members: np.ndarray) -> np.ndarray:
    """Mean KL from members [M, B, C] to their mean."""
    return (members * (np.log(members) - np.log(members.mean(0)))).sum(2).mean(0)


def test_disagreement_is_the_mean_divergence_of_the_committee_from_its_mean() -> None:
    batch, now = _batch("classes")
    others = [_batch("classes", seed)[1] for seed in (1, 2, 3)]
    anchor = Outputs(others[0].loss, others[0].logits, older=tuple(others[1:]))
    members = np.stack([softmax(o.logits.numpy(), 1) for o in (now, *others)])
    scores = _score("disagreement", batch, now, anchor)
    np.testing.assert_allclose(scores, _divergence(members), rtol=0, atol=1e-8)
    alone = _score("disagreement", batch, now, now)
    np.testing.assert_allclose(alone, 0, atol=1e-8)


def test_disagreement_asks_the_anchors_of_the_last_rounds_however_few_there_are() -> None:
    runtime = Runtime()
    module = nn.Linear(4, C)
    model = runtime.prepare(module)
    partition = create_partition(runtime, model)
    signal = create_signal("disagreement", {"anchors": 2})
    anchor = Anchor(partition, keep=signal.anchors)  # type: ignore[attr-defined]
    forward = ShardedForward(runtime, model, partition, cross_entropy)
    scorer = Scorer(forward, anchor, signal, 8)
    x, y = torch.randn(B, 4, generator=torch.Generator().manual_seed(3)), torch.arange(B) % C
    source = as_source(torch.utils.data.TensorDataset(x, y))
    weights = [torch.randn(C, 4, generator=torch.Generator().manual_seed(k)) for k in range(4)]

    def probabilities(w: torch.Tensor) -> np.ndarray:
        return np.exp(log_softmax((x @ w.T + module.bias.detach()).double().numpy(), 1))

    for k, w in enumerate(weights):  # a round: score under the new weights, then refresh
        with torch.no_grad():
            module.weight.copy_(w)
        if k == 0:
            anchor.restart()
        before = forward.forwards
        scores = scorer.score(source, np.arange(B)).numpy()
        committee = [w, *reversed(weights[max(k - 2, 0) : k])] if k else [w, w]
        dense = _divergence(np.stack([probabilities(v) for v in committee]))
        np.testing.assert_allclose(scores, dense, rtol=0, atol=1e-6)
        assert forward.forwards - before == B * len(committee)
        anchor.refresh()


def test_half_precision_outputs_are_scored_in_float32() -> None:
    batch, now = _batch("classes")
    half = Outputs(now.loss.float(), now.logits.bfloat16())
    for name in ("entropy", "fisher", "grad_norm"):
        full = Outputs(now.loss.float(), now.logits.bfloat16().float())
        assert (_score(name, batch, half) == _score(name, batch, full)).all()


@pytest.mark.parametrize("name", ["entropy", "fisher", "disagreement"])
def test_signals_of_probabilities_are_refused_for_regression_by_name(name: str) -> None:
    for loss in ("mse", "torch.nn:L1Loss"):
        message = f"priority.signal = '{name}' needs outputs that are probabilities.*'{loss}'"
        with pytest.raises(ConfigError, match=message):
            create_signal(name, loss=loss, classes=0)
    batch, now = _batch("classes")
    single = Outputs(now.loss, now.logits[:, :1])
    tree = Outputs(now.loss, {"head": now.logits})
    signal = create_signal(name, loss="torch.nn:NLLLoss", classes=C)
    with pytest.raises(ConfigError, match=r"two classes or more in dimension 1.*\[23, 1\]"):
        signal.score(batch, single, single)
    with pytest.raises(ConfigError, match="one tensor of logits, not dict"):
        signal.score(batch, tree, tree)


def test_options_of_signals_are_checked() -> None:
    with pytest.raises(ConfigError, match=r"priority\.options\.anchors must be at least 1, not 0"):
        create_signal("disagreement", {"anchors": 0})
    with pytest.raises(ConfigError, match=r"priority\.options\.loss is no option"):
        create_signal("entropy", {"loss": "bce"})
    with pytest.raises(ConfigError, match="has no option 'anchor', did you mean 'anchors'"):
        create_signal("disagreement", {"anchor": 3})


def test_the_anchors_state_has_the_older_ones() -> None:
    runtime = Runtime()
    module = nn.Linear(2, 2, bias=False)
    partition = create_partition(runtime, runtime.prepare(module))
    first, second = Anchor(partition, keep=3), Anchor(partition, keep=3)
    for value in (1.0, 2.0, 3.0, 4.0):
        with torch.no_grad():
            module.weight.fill_(value)
        first.refresh()
    second.load_state_dict(first.state_dict())
    found = [float(s["weight"][0]) for s in (second.theta_star, *second.older)]
    assert found == [4.0, 3.0, 2.0]
    first.restart()
    assert first.older == []
