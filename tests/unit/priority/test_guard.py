"""When sampling is likely to hurt: figures against dense ones, and rounds that become uniform."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from distcl.distributed.runtime import Runtime
from distcl.priority.guard import LOW_ESS, aim, doubts
from distcl.priority.weighting import Slices, WeightVector
from distcl.sampling.groups import Part
from distcl.sampling.staleness import Freshness, rank_correlation
from distcl.types import pack_ids
from tests.small import execute

FINE = {"hist": {"ess_fraction": 0.5, "top_share": 0.03}}


@pytest.mark.parametrize("number", [1, 7, 100, 12_345])
def test_top_share_is_that_of_the_largest_hundredth(number: int) -> None:
    weights = np.random.default_rng(number).pareto(1.5, number).round(2) + 0.01
    most = max(1, round(0.01 * number))
    share = np.sort(weights)[::-1][:most].sum() / weights.sum()
    ids, sizes = np.arange(number), np.array([number // 3, number - number // 3])
    slices = Slices(ids, sizes, sizes, np.arange(2), lambda values, _: values)
    for held in (None, slices):
        assert WeightVector(ids, weights, held).top_share() == pytest.approx(share)


def test_rank_correlation_is_spearmans() -> None:
    rng = np.random.default_rng(0)
    a = rng.integers(0, 20, 400).astype(float)  # ties
    b = a + rng.normal(0, 8, 400)
    assert rank_correlation(a, b) == pytest.approx(spearmanr(a, b).statistic, abs=1e-12)
    order = rng.permutation(400)
    assert rank_correlation(a[order], b[order]) == rank_correlation(a, b)
    assert rank_correlation(a, np.ones(400)) is None
    assert rank_correlation(a[:49], b[:49]) is None


def test_freshness_pairs_losses_with_the_weights_that_drew_them() -> None:
    rng = np.random.default_rng(1)
    uniform, weighted = pack_ids(1, np.arange(50)), pack_ids(0, rng.permutation(300))
    weights = rng.random(300)
    groups = [Part(uniform, None, draws=1), Part(weighted, weights, draws=1)]
    fresh = Freshness(Runtime(), 80)
    assert [step for step in range(1, 81) if fresh.wants(step)] == list(range(10, 81, 10))
    pairs = []
    for _ in range(3):
        at = rng.integers(0, 300, 60)
        ids = np.concatenate([uniform[:20], weighted[at]])
        losses = rng.random(80)
        fresh.take(torch.from_numpy(ids), torch.from_numpy(losses), groups)
        pairs += [(weights[k], loss) for k, loss in zip(at, losses[20:], strict=True)]
    expected = spearmanr(*np.array(pairs).T).statistic
    assert fresh.correlation == pytest.approx(expected, abs=1e-12)
    again = Freshness(Runtime())
    again.load_state_dict(fresh.state_dict())
    assert again.correlation == fresh.correlation and again.wants(10)
    fresh = Freshness(Runtime())
    assert fresh.correlation is None and not any(fresh.wants(step) for step in range(99))


@pytest.mark.parametrize("number", [300, 70_000], ids=["later", "at once"])
def test_freshness_knows_the_weights_of_each_look(number: int) -> None:
    rng = np.random.default_rng(3)
    ids, fresh, pairs = pack_ids(0, rng.permutation(number)), Freshness(Runtime(), 8), []
    for _ in range(4):
        weights, at, losses = rng.random(number), rng.integers(0, number, 40), rng.random(40)
        groups = [Part(ids, weights, draws=1)]
        fresh.take(torch.from_numpy(ids[at]), torch.from_numpy(losses), groups)
        pairs += [(w, loss) for w, loss in zip(weights[at] / weights.mean(), losses, strict=True)]
    assert fresh.correlation == pytest.approx(spearmanr(*np.array(pairs).T).statistic, abs=1e-12)


def test_a_sample_drawn_twice_is_a_tie_whatever_its_last_bits() -> None:
    """They depend on how a batch is cut among ranks, and must not decide the order of ranks."""
    rng = np.random.default_rng(4)
    ids, weights = pack_ids(0, np.arange(40)), np.tile(rng.random(20), 2)
    losses, looked = np.tile(rng.random(40), 2), []
    for noise in (0.0, 1e-15):
        fresh = Freshness(Runtime(), 8)
        found = torch.from_numpy(losses + noise * rng.random(80))
        groups = [Part(ids, weights + noise * rng.random(40), draws=1)]
        fresh.take(torch.from_numpy(np.tile(ids, 2)), found, groups)
        looked.append(fresh.correlation)
    assert looked[0] == looked[1]


def test_aim_is_the_error_where_draws_go() -> None:
    ids = np.concatenate([pack_ids(e, np.arange(n)) for e, n in enumerate((10, 20, 30))])
    experience = np.repeat([0, 1, 2], (10, 20, 30))
    weights = np.random.default_rng(2).random(60)
    errors = np.array([0.3, 0.1, 0.2])
    held_out = [(ids[experience == e], errors[e]) for e in range(3)]
    drawn = (weights * errors[experience]).sum() / weights.sum()
    vector = WeightVector(ids, weights)
    assert aim(vector, held_out) == pytest.approx(drawn / errors[experience].mean() - 1)
    assert aim(WeightVector(ids, np.ones(60)), held_out) == pytest.approx(0)
    assert aim(vector, [*held_out[:1], (ids[10:30], None)]) is None  # one is known
    assert aim(vector, [(members, 0.0) for members, _ in held_out]) is None


def test_doubts_are_told_in_words() -> None:
    assert doubts(FINE, 0.1, 0.5) == [] == doubts(FINE, None, None)
    uneven = {"cur": {"ess_fraction": LOW_ESS - 0.01, "top_share": 0.31}}
    (told,) = doubts(uneven, None)
    assert "39%" in told and "31%" in told and "priority.min_ess" in told
    assert "learned already" in doubts(FINE, -0.03)[0]
    assert not doubts(FINE, -0.01)  # chance
    assert "rank correlation 0.05" in doubts(FINE, None, 0.05)[0]


PUBLISHED = ("continual_learning.importance_alpha=3.0", "priority.target=current")


def test_published_weights_are_warned_of_once_a_round_and_guarded_if_asked(tmp_path: Path) -> None:
    plain = execute("train", PUBLISHED, tmp_path / "plain")
    log = (tmp_path / "plain" / "log.txt").read_text()
    warned = [r for r in plain["rounds"] if r["priority"]["cur"]["ess_fraction"] < LOW_ESS]
    assert warned and not any(r["guard"]["uniform"] for r in plain["rounds"])
    for report in warned:
        assert log.count(f"[guard] round {report['round']}: sampling by priority is likely") == 1
    rows = [json.loads(x) for x in (tmp_path / "plain" / "metrics.jsonl").read_text().splitlines()]
    told = [row for row in rows if "guard/staleness" in row]
    assert len(told) == len(plain["rounds"]) and "priority/cur/top_share" in told[0]

    auto = execute("train", (*PUBLISHED, "priority.guard=auto"), tmp_path / "auto")
    off = ("continual_learning.importance_weighting=false",)
    uniform = execute("train", (*PUBLISHED, *off), tmp_path / "off")
    for report, same in zip(auto["rounds"], uniform["rounds"], strict=True):
        if report["guard"]["uniform"]:
            assert report["draws_sha256"] == same["draws_sha256"]
            assert report["priority"]["cur"]["ess_fraction"] < LOW_ESS  # what it judged
    assert any(r["guard"]["uniform"] for r in auto["rounds"])
    assert "guard" not in uniform["rounds"][0]


def test_the_guard_is_refused_where_no_weights_come_before_the_round(tmp_path: Path) -> None:
    keys = ("priority.source=candidates", "priority.signal=loss", "priority.guard=auto")
    with pytest.raises(Exception, match="guard"):
        execute("train", keys, tmp_path)


def test_held_out_data_switch_a_round_off_and_the_next_one_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from distcl.priority import guard
    from distcl.training import priorities

    aims: list[Any] = [-0.1, 0.1]
    monkeypatch.setattr(guard, "aim", lambda *_: aims.pop(0))
    monkeypatch.setattr(priorities, "judge", guard.judge)
    keys = (
        *("continual_learning.update_mode=er", "training.pretrain_epochs=1"),
        *("priority.source=online", "priority.signal=entropy", "priority.target=history"),
        *("priority.min_ess=0.5", "priority.guard=auto", "stream.experiences=4"),
        *("training.steps_per_round=20",),
    )
    aims.append(0.0)
    rounds = execute("train", keys, tmp_path)["rounds"]
    assert [r["guard"]["uniform"] for r in rounds] == [True, False, False]
    assert [r["guard"]["staleness"] is None for r in rounds] == [True, False, False]
