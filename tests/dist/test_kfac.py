"""K-FAC on real ranks: one rank's factors and weights, cut into layers, each with its owner."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from distcl.config import RunConfig
from distcl.data.stream import create_stream
from distcl.training.build import assemble
from distcl.parallel import ddp
from distcl.parallel.partition import create_partition
from distcl.distributed.runtime import Runtime
from distcl.training.trainer import ContinuousTrainer
from distcl.updaters.kfac import KFACOnline
from tests.models import awkward
from tests.small import small
from tests.spawn import run_ranks

KFAC = (
    "continual_learning.update_mode=kfac_online",
    "continual_learning.kfac_every=3",
    "continual_learning.kfac_lambda=30",
    "model.name=cnn",
    "model.options={channels = [4, 6, 8]}",
    "training.epochs=1",
)


def _run(overrides: tuple[str, ...], out: Path, rounds: int = 2) -> dict[str, Any]:
    """Pretrain and run rounds; 301 samples in batches of 50 leave ranks without samples."""
    config = small(*KFAC, *overrides)
    runtime = Runtime(config.run, config.parallel)
    stream = create_stream(config.stream, config.run.seed)
    trainer = ContinuousTrainer(assemble(config, runtime, stream, out), config)
    updater = trainer.parts.updater
    assert isinstance(updater, KFACOnline)
    trainer.pretrain(stream.experiences[0])
    for experience in stream.experiences[1 : rounds + 1]:
        trainer.run_round(experience, "scheduled")
        trainer.evaluate(stream.experiences, seen=experience.index + 1)
    module = runtime.strategy.unwrap(trainer.parts.model)
    return {
        "weights": {n: p.detach().numpy() for n, p in module.named_parameters()},
        "factors": {n: (c.a.numpy(), c.g.numpy()) for n, c in updater.curvature.items()},
        "owners": updater.owners,
        "rank": runtime.rank,
    }


def test_two_and_three_ranks_equal_one_and_hold_their_share(tmp_path: Path) -> None:
    exact = ("run.precision=fp64",)
    one = run_ranks(1, _run, exact, tmp_path)[0]
    total = sum(a.size + g.size for a, g in one["factors"].values())
    largest = max(a.size + g.size for a, g in one["factors"].values())
    for world in (2, 3):
        results = run_ranks(world, _run, exact, tmp_path)
        held = [sum(a.size + g.size for a, g in r["factors"].values()) for r in results]
        assert sum(held) == total
        assert max(held) <= max(total / world, largest)
        for result in results:
            assert result["owners"] == results[0]["owners"]
            assert all(result["owners"][n] == result["rank"] for n in result["factors"])
            for name, value in one["weights"].items():
                np.testing.assert_allclose(result["weights"][name], value, rtol=0, atol=1e-10)
            for name, factors in result["factors"].items():
                for actual, expected in zip(factors, one["factors"][name], strict=True):
                    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-10)


def test_bf16_and_fp32_factors_are_those_of_fp64_but_for_rounding(tmp_path: Path) -> None:
    first_step = "continual_learning.kfac_every=1000"  # of the same weights in all three
    exact, half, single = (
        run_ranks(1, _run, (first_step, f"run.precision={precision}"), tmp_path, 0)[0]["factors"]
        for precision in ("fp64", "bf16", "fp32")
    )
    for name, factors in exact.items():
        for i, expected in enumerate(factors):
            scale = np.abs(expected).max()
            np.testing.assert_allclose(single[name][i], expected, rtol=0, atol=1e-5 * scale)
            np.testing.assert_allclose(half[name][i], expected, rtol=0, atol=0.03 * scale)


def _full_grads(bucket: int) -> dict[str, Any]:
    ddp.BUCKET_ELEMENTS = bucket
    runtime = Runtime(RunConfig(precision="fp64"))
    model = runtime.prepare(awkward())
    partition = create_partition(runtime, model)
    module = runtime.strategy.unwrap(model)
    parameters = {n: p for n, p in module.named_parameters() if p.requires_grad}
    x = torch.randn(6, 7, generator=torch.Generator().manual_seed(3)).double()
    model(x).square().mean().backward()
    parameters["scale"].grad = None
    owners = {name: i % runtime.world_size for i, name in enumerate(parameters)}
    mine = {n: 10 * p.detach() for n, p in parameters.items() if owners[n] == runtime.rank}
    partition.add_full_grads_(mine, owners)
    return {n: p.grad.numpy() for n, p in parameters.items() if p.grad is not None}


@pytest.mark.parametrize(("world", "bucket"), [(1, 1 << 20), (2, 1 << 20), (3, 12)])
def test_whole_gradients_reach_every_rank_once(world: int, bucket: int) -> None:
    model = awkward().double()
    x = torch.randn(6, 7, generator=torch.Generator().manual_seed(3)).double()
    model(x).square().mean().backward()
    model.scale.grad = torch.zeros_like(model.scale)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    for grads in run_ranks(world, _full_grads, bucket):
        assert grads.keys() == trained.keys()
        for name, p in trained.items():
            expected = (p.grad + 10 * p).detach().numpy()
            np.testing.assert_allclose(grads[name], expected, rtol=0, atol=1e-14)
