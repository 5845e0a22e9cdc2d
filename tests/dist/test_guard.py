"""Two ranks judge a round alike, and as one process does: figures, doubts, and what follows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from distcl import Runtime
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
    fresh, pairs = Freshness(runtime), list[tuple[float, float]]()
    fresh.begin(2)
    for _ in range(2):
        at = rng.integers(0, number, 40 - runtime.rank)
        losses = weights[at] + rng.random(len(at))
        groups = [Part(ids, frozen(weights), 1)]  # anew in each step, as plans have them
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
