"""Priorities on real ranks against a dense reference in one process."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import distcl.distributed.runtime
from distcl import Anchor, Batch, DistributedWeightedSampler, Runtime, compute_sample_priorities
from distcl.errors import ConfigError, DivergenceError
from distcl.parallel.inference import ShardedForward
from distcl.parallel.partition import create_partition
from distcl.priority.scoring import Scorer
from distcl.priority.signals import create_signal
from distcl.types import Ids, Outputs
from tests.models import awkward, frozen_names
from tests.spawn import run_ranks

N = 101
criterion = nn.CrossEntropyLoss(reduction="none")


def _data(seed: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(N, 7, generator=g), torch.randint(0, 3, (N,), generator=g)


class TreeSource:
    """Samples of several sensors, with ids that are not positions."""

    def __init__(self) -> None:
        self.x, self.y = _data()

    def __len__(self) -> int:
        return N

    def read(self, ids: Ids) -> Batch:
        rows = torch.from_numpy((ids - 1000) // 3)
        x = {"left": self.x[rows, :4], "right": [self.x[rows, 4:]]}
        return Batch(torch.from_numpy(ids), x, self.y[rows], len(ids))


class TreeModel(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: dict[str, Any]) -> torch.Tensor:
        return self.inner(torch.cat([x["left"], x["right"][0]], dim=1))


def _pair(runtime: Runtime, tree: bool) -> tuple[nn.Module, Anchor]:
    """A fixed, different pair of weights and theta_star; buffers that differ between ranks."""

    def build(seed: int) -> nn.Module:
        model = awkward(seed)
        model.norm.running_mean.add_(0.5 * (runtime.rank - (runtime.world_size - 1) / 2))
        return TreeModel(model) if tree else model

    model = runtime.prepare(build(seed=1))
    partition = create_partition(runtime, model)
    partition.sync_buffers()
    anchor = Anchor(partition)
    runtime.strategy.unwrap(model).load_state_dict(build(seed=0).state_dict())
    return model, anchor


def _score(tree: bool) -> dict[str, Any]:
    runtime = Runtime()
    model, anchor = _pair(runtime, tree)
    ids = 1000 + 3 * np.random.default_rng(0).permutation(N)
    source: Any = TreeSource() if tree else torch.utils.data.TensorDataset(*_data())
    if not tree:
        ids = (ids - 1000) // 3
    model.train()
    ids, priorities = compute_sample_priorities(
        model,
        anchor,
        source,
        criterion,
        runtime=runtime,
        ids=ids,
        alpha=0.7,
        min_score=0.05,
        batch_size=8,
    )
    sampler = DistributedWeightedSampler(
        16, rank=runtime.rank, world_size=runtime.world_size, seed=3
    )
    sampler.set_weights(ids, priorities)
    return {
        "ids": ids,
        "priorities": priorities,
        "digest": sampler.plan_digest(),
        "mine": [i for part in sampler for i in part],
        "training": model.training and all(m.training for m in model.modules()),
    }


def _dense(tree: bool) -> np.ndarray:
    """clamp(L(w) - L(theta_star), 0.05) ** 0.7 in eval mode, by position.

    Frozen parameters are no part of theta_star: what they are now, they are in both.
    """
    x, y = _data()
    now, anchored = awkward(0).eval(), awkward(1).eval()
    frozen = {n: p for n, p in now.named_parameters() if n in frozen_names(now)}
    anchored.load_state_dict(frozen, strict=False)
    with torch.no_grad():
        losses = [criterion(model(x), y) for model in (now, anchored)]
    return ((losses[0] - losses[1]).clamp(min=0.05) ** 0.7).numpy()


@pytest.mark.parametrize("tree", [False, True])
def test_priorities_equal_a_dense_reference_at_any_world_size(tree: bool) -> None:
    reference = _dense(tree)
    assert reference.std() > 0.1
    digests = set()
    for world in (1, 2, 3):
        results = run_ranks(world, _score, tree)
        for result in results:
            rows = (result["ids"] - 1000) // 3 if tree else result["ids"]
            np.testing.assert_allclose(result["priorities"], reference[rows], rtol=0, atol=1e-6)
            assert result["training"]
            digests.add(result["digest"])
        assert sum(len(r["mine"]) for r in results) == N
    assert len(digests) == 1


class Bad:
    """A signal that goes wrong in a way of its own."""

    needs_anchor = False
    needs_logits = False

    def __init__(self, how: str = "nan") -> None:
        self.how = how

    def score(self, batch: Batch, now: Outputs, anchor: Outputs | None) -> torch.Tensor:
        if self.how == "shape":
            return now.loss[:, None]
        scores = now.loss.abs() + 1
        scores[batch.ids == 42] = {"nan": float("nan"), "negative": -1.0}[self.how]
        return scores


def _scorer(signal: Any) -> Scorer:
    runtime = Runtime()
    model, anchor = _pair(runtime, tree=False)
    partition = create_partition(runtime, model)
    return Scorer(ShardedForward(runtime, model, partition, criterion), anchor, signal, 16)


def test_a_signal_that_is_not_finite_negative_or_of_the_wrong_shape_is_named() -> None:
    from distcl.data.loader import as_source

    source, ids = as_source(torch.utils.data.TensorDataset(*_data())), np.arange(N)
    for how, message in {
        "nan": "the score of signal 'Bad' of sample id 42 is nan, on rank 0",
        "negative": "the score of signal 'Bad' of sample id 42 is -1.0",
        "shape": r"signal 'Bad' returned \(16, 1\); it must return one score per sample",
    }.items():
        signal = create_signal("tests.dist.test_scoring:Bad", {"how": how})
        error = DivergenceError if how == "nan" else ConfigError
        with pytest.raises(error, match=message):
            _scorer(signal).score(source, ids)


def test_a_loss_that_is_not_finite_while_scoring_is_a_divergence() -> None:
    from distcl.data.loader import as_source

    x, y = _data()
    x[17] = float("nan")
    source = as_source(torch.utils.data.TensorDataset(x, y))
    with pytest.raises(DivergenceError, match="the loss of sample id 17 is nan"):
        _scorer(create_signal("loss_delta")).score(source, np.arange(N))


def test_a_signal_without_the_protocol_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="signal 'builtins:dict' has no 'needs_anchor'"):
        create_signal("builtins:dict")


def _gathered_in_pieces(n: int, each: int) -> list[Any]:
    runtime = Runtime()
    distcl.distributed.runtime._GATHERED = 3
    rows = torch.arange(2 * n).reshape(n, 2)
    mine = rows[runtime.rank * each : (runtime.rank + 1) * each]
    gathered = runtime.all_gather(mine, n, each).tolist()
    runtime.close()
    return gathered


@pytest.mark.parametrize(("n", "each"), [(17, 6), (17, 8), (8, 7), (5, 9), (9, 3)])
def test_what_is_gathered_in_pieces_is_in_order(n, each):
    """Ranks with all of their rows, with some, and with none."""
    for found in run_ranks(3, _gathered_in_pieces, n, each):
        assert found == torch.arange(2 * n).reshape(n, 2).tolist()
