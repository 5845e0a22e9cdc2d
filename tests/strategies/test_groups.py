"""Groups of parameters with rates of their own, under every layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from distcl.config.load import load_config
from distcl.data.stream import create_stream
from distcl.errors import ConfigError
from distcl.models import create_model
from distcl.training.build import assemble
from distcl.training.trainer import ContinuousTrainer
from tests.faults.test_resume import go, outcome
from tests.layouts import available, each, fresh_runtime, gathered, layout_params
from tests.small import SMALL, execute
from tests.spawn import run_ranks

NAMES = ["ddp", "fsdp2", "zero1", "zero2", "zero3"]
WORLD = 3
GROUPS = (
    'optimizer.groups=[{pattern = "*.bias", lr = 0.2, weight_decay = 0.0}, '
    '{pattern = "body.0.*", lr = 0.01}]'
)
KEYS = (
    "model.options.hidden=[30,20]",
    GROUPS,
    "optimizer.lr=0.05",
    "optimizer.weight_decay=0.01",
    "optimizer.decay=cosine",
    "optimizer.min_lr=0.01",
    "training.epochs=1",
    "training.pretrain_epochs=1",
)
EWC = ("continual_learning.update_mode=ewc_online", "continual_learning.ewc_lambda=300.0")


def _config(*more: str) -> Any:
    return load_config(None, [*SMALL, *KEYS, *more], environ={})


def _job(layout: str, folder: Path, *more: str) -> dict[str, Any]:
    config = _config(*EWC, "continual_learning.importance_weighting=false", *more)
    precision = config.run.precision
    runtime = fresh_runtime(layout, precision, training=config.training, folder=folder)
    stream = create_stream(config.stream, config.run.seed)
    trainer = ContinuousTrainer(assemble(config, runtime, stream, folder), config)
    names = [name for group in trainer.parts.optimizer.param_groups for name in group["names"]]
    trainer.pretrain(stream.experiences[0])
    for experience in stream.experiences[1:]:
        trainer.run_round(experience, "scheduled")
    return {"names": names, "weights": gathered(trainer.parts.forward.partition, names)}


def _dense(folder: Path) -> dict[str, Any]:
    """A round of ours without a penalty, and the same batches by plain torch."""
    more = ("run.precision=fp64", "continual_learning.importance_weighting=false")
    config = _config(*more)
    runtime = fresh_runtime("ddp", "fp64", training=config.training, folder=folder)
    stream = create_stream(config.stream, config.run.seed)
    trainer = ContinuousTrainer(assemble(config, runtime, stream, folder), config)
    taken: list[Any] = []
    whole = trainer.parts.updater.fwd_bwd

    def noting(batch: Any, history: Any) -> Any:
        taken.append(batch.ids.numpy().copy())
        return whole(batch, history)

    trainer.parts.updater.fwd_bwd = noting  # type: ignore[method-assign]
    trainer.run_round(stream.experiences[1], "scheduled")
    dense = create_model(config.model, stream.spec, config.run.seed).double()
    for k, ids in enumerate(taken):
        batch = stream.read(ids)
        dense.zero_grad()
        torch.nn.functional.cross_entropy(dense(batch.x.double()), batch.y).backward()
        decay = (1 + np.cos(np.pi * k / len(taken))) / 2
        with torch.no_grad():
            for name, p in dense.named_parameters():
                lr, weight_decay = 0.05, 0.01
                if name.endswith(".bias"):
                    lr, weight_decay = 0.2, 0.0
                elif name.startswith("body.0."):
                    lr = 0.01
                p -= lr * (0.2 + 0.8 * decay) * (p.grad + weight_decay * p)
    wanted = {name: p.detach().numpy() for name, p in dense.named_parameters()}
    return {"wanted": wanted, "found": gathered(trainer.parts.forward.partition, [*wanted])}


def test_a_round_equals_plain_torch_with_a_rate_for_each_parameter(tmp_path: Path) -> None:
    result = run_ranks(1, _dense, tmp_path)[0]
    for name, value in result["wanted"].items():
        np.testing.assert_allclose(result["found"][name], value, rtol=0, atol=1e-7, err_msg=name)


def _jobs(folder: Path, layouts: list[str]) -> dict[str, Any]:
    return each(layouts, _job, folder)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: Any) -> list[dict[str, Any]]:
    return run_ranks(WORLD, _jobs, tmp_path_factory.mktemp("groups"), available(NAMES), timeout=170)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: Any) -> dict[str, Any]:
    return run_ranks(1, _jobs, tmp_path_factory.mktemp("alone"), ["ddp"])[0]["ddp"]


@layout_params(NAMES)
def test_every_layout_trains_them_as_one_process_does(
    layout: str, ranks: list[Any], alone: dict[str, Any]
) -> None:
    assert len(alone["names"]) == 6
    for rank in ranks:
        assert rank[layout]["names"] == alone["names"]
        for name, value in alone["weights"].items():
            np.testing.assert_allclose(rank[layout]["weights"][name], value, rtol=0, atol=2e-5)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_a_job_with_groups_that_is_cut_goes_on_bit_for_bit(strategy: str, tmp_path: Path) -> None:
    keys = (*KEYS, "optimizer.momentum=0.9", f"parallel.strategy={strategy}", *EWC)
    cut, whole = tmp_path / "cut", tmp_path / "whole"

    def run(out: Path, polls: int = 0, resume: str = "never") -> list[str]:
        return run_ranks(WORLD, go, "train", keys, out, polls, resume, timeout=150)

    assert run(cut, polls=5) == ["preempted"] * WORLD
    assert run(cut, resume="auto") == ["done"] * WORLD
    assert run(whole) == ["done"] * WORLD
    assert outcome(cut) == outcome(whole)


def test_a_layer_of_two_rates_is_refused_to_kfac(tmp_path: Path) -> None:
    keys = (*KEYS, "continual_learning.update_mode=kfac_online")
    with pytest.raises(ConfigError, match=r"optimizer\.groups: layer 'body\.0' .*kfac_online"):
        execute("train", keys, tmp_path)
    execute("train", (*keys, "continual_learning.penalty_step=explicit"), tmp_path / "explicit")
