"""Which candidates are kept, and by which rank."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare
from torch import nn

from distcl import Anchor, Runtime
from distcl.config import PriorityConfig
from distcl.data.ids import part_of
from distcl.data.loader import as_source
from distcl.losses import mse
from distcl.parallel.inference import ShardedForward
from distcl.parallel.partition import create_partition
from distcl.priority.round_weights import Shape
from distcl.priority.scoring import Scorer
from distcl.priority.signals import create_signal
from distcl.sampling.candidates import Chooser, deal_kept
from distcl.types import Batch


@given(st.lists(st.integers(0, 4), max_size=40), st.integers(5, 7))
def test_samples_are_dealt_evenly_and_stay_where_they_are_if_they_can(
    owners: list[int], world: int
) -> None:
    owner = np.array(owners, dtype=np.int64)
    taker = deal_kept(owner, world)
    quota = [hi - lo for lo, hi in (part_of(len(owner), r, world) for r in range(world))]
    has = np.bincount(owner, minlength=world)
    assert np.bincount(taker, minlength=world).tolist() == quota
    assert int((taker == owner).sum()) == int(np.minimum(has, quota).sum())


def _chooser(scores: np.ndarray, of: int, alpha: float = 1.0) -> tuple[Chooser, Batch, np.ndarray]:
    """Candidates of one batch whose loss, hence score, is what it should be."""
    runtime = Runtime()
    model = runtime.prepare(nn.Identity())
    x = torch.from_numpy(np.sqrt(scores)).float()[:, None]
    source = as_source(torch.utils.data.TensorDataset(x, torch.zeros(len(x), 1)))
    partition = create_partition(runtime, model)
    forward = ShardedForward(runtime, model, partition, mse)
    scorer = Scorer(forward, Anchor(partition), create_signal("loss"), 8)
    ids = np.arange(len(x))
    shape = Shape(PriorityConfig(), alpha)
    return Chooser(scorer, source, shape, of, seed=5, stream=1), source.read(ids), ids


def test_one_of_two_is_kept_in_proportion_to_the_weights() -> None:
    scores = np.array([1.0, 2.0, 3.0, 6.0])
    chooser, batch, ids = _chooser(scores, of=4)
    steps = 4000
    kept = [k for _, [(_, k)] in chooser.choose(1, [(batch, [(0, ids)])] * steps)]
    assert all(len(k) == 1 for k in kept)
    counts = np.bincount(np.concatenate(kept), minlength=4)
    assert chisquare(counts, scores / scores.sum() * steps).pvalue > 1e-3
    assert chooser.forwards == 4 * steps


def test_pairs_are_kept_as_often_as_draws_without_replacement_say() -> None:
    w = np.array([1.0, 2.0, 3.0, 6.0])
    chooser, batch, ids = _chooser(w, of=2)
    steps = 4000
    pairs = np.zeros((4, 4))
    for part, [(_, kept)] in chooser.choose(1, [(batch, [(0, ids)])] * steps):
        assert sorted(part.ids.tolist()) == sorted(kept.tolist())
        assert part.total == 2
        pairs[tuple(kept)] += 1
    p = w / w.sum()
    expected = np.array([[p[i] * p[j] / (1 - p[i]) for j in range(4)] for i in range(4)])
    off = ~np.eye(4, dtype=bool)
    assert pairs[~off].sum() == 0
    assert chisquare(pairs[off], expected[off] * steps).pvalue > 1e-3


def test_the_choice_depends_on_round_and_step_and_nothing_else() -> None:
    scores = np.random.default_rng(0).random(64)

    def kept(round_index: int) -> list[list[int]]:
        chooser, batch, ids = _chooser(scores, of=2)
        return [
            k.tolist() for _, [(_, k)] in chooser.choose(round_index, [(batch, [(0, ids)])] * 3)
        ]

    assert kept(1) == kept(1)
    assert kept(1) != kept(2)
    assert len({tuple(k) for k in kept(1)}) == 3


def test_statistics_are_of_all_candidates() -> None:
    scores = np.random.default_rng(1).random(32).astype(np.float32)
    chooser, batch, ids = _chooser(scores, of=2, alpha=2.0)
    list(chooser.choose(1, [(batch, [(0, ids)])] * 2))
    found = chooser.statistics()
    priority = scores.astype(np.float64) ** 2
    assert found["n"] == 64
    for key in ("min", "max", "mean", "std"):
        assert found[key] == pytest.approx(getattr(priority, key)(), rel=1e-4)
    ess = priority.sum() ** 2 / np.square(priority).sum() / 32
    assert found["ess_fraction"] == pytest.approx(ess, rel=1e-4)
