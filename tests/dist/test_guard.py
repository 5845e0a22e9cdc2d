"""Two ranks judge a round alike, and as one process does: figures, doubts, and what follows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from distcl import Runtime
from distcl.priority.population import Dealer
from distcl.sampling.staleness import Freshness
from distcl.sampling.sampler import Part
from distcl.types import frozen, pack_ids
from tests.small import execute
from tests.spawn import run_ranks

KEYS = (
    "run.precision=fp64",
    "stream.experiences=5",
    "continual_learning.update_mode=er",
    "priority.target=history",
    "priority.guard=auto",
    "training.steps_per_round=24",
)
SOURCES = {
    "online": ("priority.source=online", "priority.signal=entropy", "priority.min_ess=0.5"),
    "score": ("priority.signal=loss", "continual_learning.importance_alpha=6.0"),
}


def _told(summary: dict[str, Any]) -> list[Any]:
    return [(r["draws_sha256"], r["guard"]["uniform"]) for r in summary["rounds"]]


@pytest.mark.parametrize("source", SOURCES)
def test_ranks_agree_with_each_other_and_with_one_process(source: str, tmp_path: Path) -> None:
    keys = (*KEYS, *SOURCES[source])
    one = run_ranks(1, execute, "train", keys, tmp_path / "1")[0]
    both = run_ranks(2, execute, "train", keys, tmp_path / "2")
    assert [r["guard"] for r in both[0]["rounds"]] == [r["guard"] for r in both[1]["rounds"]]
    assert _told(both[0]) == _told(one)
    for ours, theirs in zip(both[0]["rounds"], one["rounds"], strict=True):
        for name in ("aim", "staleness"):
            assert ours["guard"][name] == pytest.approx(theirs["guard"][name], abs=1e-6)
        for part, stats in theirs["priority"].items():
            assert ours["priority"][part] == pytest.approx(stats, rel=1e-6)
    assert any(r["guard"]["staleness"] is not None for r in one["rounds"])
    assert any(r["guard"]["aim"] is not None for r in one["rounds"])
    if source == "score":
        assert any(r["guard"]["uniform"] for r in one["rounds"])  # its weights are too uneven


def look_at_uneven_parts() -> tuple[float | None, list[tuple[float, float]]]:
    """Look twice at weights that are large on rank 0 only; return the correlation and my pairs."""
    runtime = Runtime()
    rng, number = np.random.default_rng(runtime.rank), (70_000, 60_000)[runtime.rank]
    ids, weights = pack_ids(runtime.rank, np.arange(number)), rng.random(number)
    fresh, pairs = Freshness(runtime, 2), list[tuple[float, float]]()
    for _ in range(2):
        at = rng.integers(0, number, 40 - runtime.rank)
        losses = weights[at] + rng.random(len(at))
        groups = [Part(ids, frozen(weights), draws=1)]  # anew in each step, as plans have them
        fresh.take(torch.from_numpy(ids[at]), torch.from_numpy(losses), groups)
        mean = weights.mean()
        pairs += zip((weights[at] / mean).tolist(), losses.tolist(), strict=True)
    correlation = fresh.correlation
    runtime.close()
    return correlation, pairs


@pytest.mark.timeout(60)
def test_looks_at_parts_of_unlike_size_do_not_wait_for_each_other() -> None:
    (ours, mine), (theirs, others) = run_ranks(2, look_at_uneven_parts)
    expected = spearmanr(*np.array(mine + others).T).statistic
    assert ours == theirs == pytest.approx(expected, abs=1e-12)


def look_at_lanes(lanes: int) -> tuple[float | None, float | None]:
    """Look at two groups of unlike scale, whole and by lanes; return both correlations."""
    runtime = Runtime()
    rng = np.random.default_rng(0)
    current, history = pack_ids(1, np.arange(901)), pack_ids(0, np.arange(57))
    weights = 1000 * rng.random(901), rng.random(57)
    dealer = Dealer.over(runtime, lanes, lambda ids, n: (ids & 0xFFFF) ** 2 % 7 * n // 7)
    groups = []
    for ids, some in zip((current, history), weights, strict=True):
        mine = dealer.deal(ids)
        groups.append(Part(mine.ids, mine.pick(ids, some), mine, draws=len(ids)))
    whole = [Part(ids, w, draws=len(ids)) for ids, w in zip((current, history), weights, strict=True)]
    loss = {i: w / m.mean() for p, m in zip(whole, weights, strict=True) for i, w in zip(p.ids, m)}
    found = []
    for parts in (whole, groups):
        fresh = Freshness(runtime, 8, parts)
        for part in parts:
            mine = part.ids if parts is groups else part.ids[runtime.rank :: runtime.world_size]
            losses = torch.tensor([loss[i] for i in mine])
            fresh.take(torch.from_numpy(mine), losses, parts)
        again = Freshness(runtime)
        again.load_state_dict(fresh.state_dict())
        assert again.correlation == fresh.correlation
        found.append(fresh.correlation)
    runtime.close()
    return found[0], found[1]


@pytest.mark.parametrize("world", [1, 2, 3])
def test_staleness_over_lanes_is_that_of_whole_data(world: int) -> None:
    for whole, lanes in run_ranks(world, look_at_lanes, 5):
        assert whole == pytest.approx(1.0, abs=1e-12)
        assert lanes == pytest.approx(1.0, abs=1e-12)
