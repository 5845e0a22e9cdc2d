"""From scores to weights: targets, pools, tempering, loss correction; keys that do not combine."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from distcl.config import PriorityConfig
from distcl.errors import ConfigError
from distcl.priority.round_weights import RoundWeights, Shape, weigh
from distcl.priority.signals import create_signal
from distcl.priority.weighting import WeightVector
from distcl.sampling.composition import MAIN, Mix
from distcl.sampling.groups import Part, packed, unpacked
from distcl.sampling.round_loader import Correction
from distcl.training.build import check_priority
from distcl.types import Batch
from tests.small import small

CURRENT, HISTORY = np.arange(100, 140), np.arange(60)


def _scored(ids: np.ndarray) -> WeightVector:
    return WeightVector(ids, 1.0 + ids % 7)


def test_union_shares_one_normalization_and_others_do_not() -> None:
    shape = Shape(PriorityConfig(target="union", cap=1.5), 2.0)
    both = weigh(shape, [_scored(CURRENT), _scored(HISTORY)])
    dense = shape.weights(_scored(np.r_[CURRENT, HISTORY])).held
    assert [*both.parts] == ["cur", "hist"]
    assert np.concatenate([part.held for part in both.parts.values()]).tolist() == dense.tolist()
    shape = Shape(PriorityConfig(target="history", cap=1.5), 2.0)
    alone = weigh(shape, [None, _scored(HISTORY)])
    assert [*alone.parts] == ["hist"]
    assert not np.allclose(alone.parts["hist"].held, both.parts["hist"].held)
    assert both.report["cur"]["n"] == 40
    assert both.report["hist"]["mean"] == pytest.approx((_scored(HISTORY).held ** 2).mean())
    assert [line.split()[0] for line in both.lines()] == ["[priority/cur]", "[priority/hist]"]


def test_a_pool_is_weighed_in_the_historys_place() -> None:
    pool = HISTORY[::4]
    result = weigh(Shape(PriorityConfig(), 1.0), [None, _scored(pool)])
    assert result.parts["hist"].ids is pool
    assert result.parts["hist"].held.tolist() == _scored(pool).held.tolist()
    again = RoundWeights.from_state(result.state_dict(HISTORY), CURRENT, HISTORY)
    assert again.parts["hist"].ids.tolist() == pool.tolist()


def test_the_recommended_tempering_is_the_largest_power_up_to_two_that_keeps_half_the_ess() -> None:
    """w = max(h, 1e-4)^a: alpha = 2, min_score = 1e-4, min_ess = 0.5 say the same."""
    rng = np.random.default_rng(0)
    config = PriorityConfig(min_score=1e-4, min_ess=0.5)
    ids = np.arange(2000)
    for spread in (0.3, 2.0, 6.0):
        h = np.exp(spread * rng.standard_normal(2000) - spread)
        found = Shape(config, 2.0).weights(WeightVector(ids, h)).held
        logs = np.log(np.maximum(h, 1e-4))
        a = np.polyfit(logs, np.log(found), 1)[0]  # found = c · max(h, 1e-4)^a

        def ess(power: float, logs: np.ndarray = logs) -> float:
            w = np.exp(power * (logs - logs.max()))
            return float(w.sum() ** 2 / np.square(w).sum() / len(w))

        assert np.allclose(np.diff(np.log(found)), a * np.diff(logs), atol=1e-8)
        assert a <= 2 + 1e-9
        assert ess(a) >= 0.5 - 1e-9
        assert a > 2 - 1e-5 or ess(a + 1e-5) < 0.5


@pytest.mark.parametrize("mean", [0.05, 0.5, 1.3, 2.2])
def test_a_gate_mixes_in_uniform_draws_as_the_mean_entropy_rises(mean: float) -> None:
    """λ w + (1 - λ), λ = 1 - H / (0.6 ln C) in [0, 1], w of mean 1 and tempered."""
    h = np.random.default_rng(0).random(500)
    h *= mean / h.mean()
    keys = {"min_score": 1e-4, "min_ess": 0.5}
    shape = Shape(PriorityConfig(gate=0.6, **keys), 2.0, np.log(10))
    found = weigh(shape, [None, WeightVector(np.arange(500), h.copy())])
    plain = Shape(PriorityConfig(**keys), 2.0).weights(WeightVector(np.arange(500), h)).held
    opened = min(1.0, max(0.0, 1 - mean / (0.6 * np.log(10))))
    wanted = opened * plain / plain.mean() + 1 - opened
    got = found.parts["hist"].held
    np.testing.assert_allclose(got / got.mean(), wanted, rtol=1e-12)
    assert found.report["hist"]["gate"] == pytest.approx(opened)


def test_correction_is_n_p_to_the_minus_beta_with_mean_one_over_draws() -> None:
    weights = np.array([1.0, 2.0, 5.0, 0.0])
    group = Part(np.array([30, 10, 20, 40]), weights, draws=4)
    plain = Part(np.array([7, 8]), None, draws=2)
    share = weights[:3] / 8
    for beta in (0.4, 1.0):
        raw = (4 * share) ** -beta
        dense = raw / (share @ raw)
        batch = Batch(torch.tensor([10, 7, 20, 30, 10]), torch.zeros(5, 1), torch.zeros(5), 5)
        found = Correction(beta, torch.float64).applied(batch, [group, plain]).weights
        assert found is not None
        expected = [dense[1], 1.0, dense[2], dense[0], dense[1]]
        np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-12)
    # beta = 1: the corrected mean over draws is the uniform mean over those that can be drawn
    losses = np.array([3.0, 1.0, 4.0])
    assert share @ (dense * losses) == pytest.approx(losses.mean())
    assert Correction(0.0, torch.float64).applied(batch, [group]) is batch


def test_correction_over_a_pool_is_towards_all_that_the_pool_stands_for() -> None:
    config = small("continual_learning.mix_historic_data=true", "priority.target=union")
    mix = Mix(config.training, config.continual_learning, union=True)
    pool = WeightVector(HISTORY[::4], np.linspace(1, 3, 15))
    groups = mix.groups([_scored(CURRENT), pool], len(CURRENT), len(HISTORY), False)[MAIN]
    [group] = [unpacked(packed(part)) for part in groups]
    ids = torch.from_numpy(np.asarray(group.ids))
    batch = Batch(ids, torch.zeros(len(ids), 1), torch.zeros(len(ids)), len(ids))
    found = Correction(1.0, torch.float64).applied(batch, [group]).weights
    assert found is not None
    losses = np.random.default_rng(0).random(len(ids))
    corrected = group.held / group.sum() @ (found.numpy() * losses)
    uniform = (losses[:40].sum() + 60 * losses[40:].mean()) / 100
    assert corrected == pytest.approx(uniform, rel=1e-12)


REFUSED: list[tuple[tuple[str, ...], str, str]] = [
    (("source=online",), "priority.signal = 'loss_delta'", "source = 'online'"),
    (
        ("source=online", "signal=entropy", "draw=without_replacement"),
        "priority.draw = 'without_replacement'",
        "source = 'online'",
    ),
    (("source=online", "signal=loss", "gate=0.6"), "priority.gate = 0.6", "signal = 'loss'"),
    (
        ("source=online", "signal=entropy", "draw=credit", "pool=50"),
        "priority.draw = 'credit'",
        "pool = 50",
    ),
    (("draw=credit", "correction=0.5"), "priority.correction = 0.5", "draw = 'credit'"),
    (("source=candidates", "correction=0.5"), "priority.correction = 0.5", "source = 'candidates'"),
    (
        ("draw=without_replacement", "correction=0.5"),
        "priority.correction = 0.5",
        "draw = 'without_replacement'",
    ),
    (("pool=100",), "priority.source = 'score'", "pool = 100"),
    (
        ("source=online", "signal=entropy", "target=history"),
        "priority.target = 'history'",
        "update_mode = 'base'",
    ),
]


@pytest.mark.parametrize(("keys", "one", "other"), REFUSED)
def test_keys_that_do_not_combine_are_refused_and_both_named(
    keys: tuple[str, ...], one: str, other: str
) -> None:
    config = small(*(f"priority.{key}" for key in keys))
    signal = create_signal(config.priority.signal)
    with pytest.raises(ConfigError) as error:
        check_priority(config, signal, takes_history=False)
    assert one in str(error.value)
    assert other in str(error.value)


def _check(*keys: str, takes_history: bool = False) -> Any:
    config = small(*keys)
    check_priority(config, create_signal(config.priority.signal), takes_history)


def test_reading_ahead_past_a_refresh_and_history_among_mixed_candidates_are_refused() -> None:
    online = ("priority.source=online", "priority.signal=entropy")
    with pytest.raises(ConfigError, match=r"data.workers = 6 .*priority.refresh_steps = 10"):
        _check(*online, "data.workers=6")
    _check(*online, "data.workers=5")
    mixed = (
        "priority.source=candidates",
        "priority.target=history",
        "continual_learning.mix_historic_data=true",
    )
    with pytest.raises(ConfigError, match=r"'candidates' .*priority.target = 'history'"):
        _check(*mixed)
    _check(*mixed, takes_history=True)


@pytest.mark.parametrize(("alpha", "why"), [(1000, "is inf"), (2000, "weights are zero")])
def test_an_exponent_that_leaves_no_weights_is_told_by_its_key(alpha: float, why: str) -> None:
    scores = WeightVector(np.arange(3), np.array([0.5, 0.1, 0.2]) * (10 if why == "is inf" else 1))
    with pytest.raises(ConfigError, match=f"importance_alpha = {alpha} is too large.*{why}"):
        Shape(PriorityConfig(), alpha).weights(scores)
