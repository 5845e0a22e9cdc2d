"""What a user brings, at three ranks: it trains as at one, or is refused on all of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distcl.data.stream import create_stream
from distcl.distributed.runtime import Runtime
from distcl.errors import ConfigError, UsageError
from distcl.job import run_rounds
from distcl.training.build import assemble
from distcl.training.trainer import ContinuousTrainer
from tests import theirs
from tests.small import small
from tests.spawn import run_ranks

ALWAYS = (
    "model.options={}",
    "stream.experiences=2",
    "stream.samples_per_experience=77",
    "training.batch_size=19",  # the last batch has one sample: two ranks have none
    "optimizer.momentum=0.9",
    "priority.signal=loss",
    "priority.correction=0.7",
    "tracking.kind=none",
    "run.precision=fp64",
)
TRAIN = {
    "unused": ("model.name=tests.theirs:Unused",),
    "branching": ("model.name=tests.theirs:Branching",),
    "branching in parts": ("model.name=tests.theirs:Branching", "training.accumulate=2"),
    "experts": ("model.name=tests.theirs:Experts",),
    "experts in parts": ("model.name=tests.theirs:Experts", "training.accumulate=2"),
    "ewc": ("model.name=tests.theirs:Branching", "continual_learning.update_mode=ewc_online"),
    "lazy": ("model.name=tests.theirs:Lazy",),
    "logits": ("model.name=tests.theirs:Returning", "model.options.how=dict"),
    "two heads": ("model.name=tests.theirs:TwoHeads", "model.loss=tests.theirs:first_loss"),
    "unit inputs": ("model.name=tests.theirs:UnitInputs",),
    "one process unmapped": (
        "model.name=tests.theirs:Unmappable",
        "continual_learning.update_mode=ewc_online",
    ),
}
REFUSED = {
    "rank 1": ("model.name=tests.theirs:Broken", "model.options.rank=1"),
    "off": ("model.name=tests.theirs:Unused", "parallel.find_unused_parameters=false"),
    "complex": ("model.name=tests.theirs:ComplexBuffer",),
    "norm": ("model.name=tests.theirs:Norm", "training.batch_size=73"),  # 77: parts of 2, 1 and 1
}


def _config(*keys: str) -> Any:
    return small(*ALWAYS, *keys)


def _parts(runtime: Runtime, config: Any, out: Path) -> Any:
    runtime.strategy.parallel = config.parallel
    return assemble(config, runtime, create_stream(config.stream, 0), out)


def _train(out: Path) -> dict[str, Any]:
    config = _config()
    runtime = Runtime(config.run, config.parallel, config.training)
    result: dict[str, Any] = {}
    for name, keys in TRAIN.items():
        config = _config(*keys)
        trainer = ContinuousTrainer(_parts(runtime, config, out), config)
        run_rounds(trainer)
        module = runtime.strategy.unwrap(trainer.parts.model)
        result[name] = (
            [r["draws_sha256"] for r in trainer.rounds],
            {n: p.detach().numpy().copy() for n, p in module.named_parameters()},
        )
    return result


def _refuse(out: Path) -> dict[str, Any]:
    result: dict[str, Any] = {}
    runtime = Runtime(_config().run, _config().parallel, _config().training)
    for name, keys in REFUSED.items():
        config = _config(*keys)
        try:
            trainer = ContinuousTrainer(_parts(runtime, config, out), config)
            run_rounds(trainer)
        except Exception as error:
            result[name] = type(error).__name__, str(error)
    return result


@pytest.fixture(scope="module")
def trained(tmp_path_factory: Any) -> dict[int, list[Any]]:
    out = tmp_path_factory.mktemp("trained")
    return {world: run_ranks(world, _train, out, timeout=150) for world in (1, 3)}


@pytest.mark.parametrize("name", TRAIN)
def test_three_ranks_train_what_one_trains(name: str, trained: dict[int, list[Any]]) -> None:
    draws, weights = trained[1][0][name]
    for rank in trained[3]:
        found, others = rank[name]
        assert found == draws
        for parameter, value in weights.items():
            np.testing.assert_allclose(others[parameter], value, rtol=0, atol=1e-9)


def test_what_is_wrong_on_one_rank_is_told_on_all(tmp_path: Path) -> None:
    ranks = run_ranks(3, _refuse, tmp_path)
    assert [set(found) for found in ranks] == [set(REFUSED)] * 3
    kind, text = ranks[1]["rank 1"]
    assert (kind, text) == ("ZeroDivisionError", "their own mistake")
    for rank in (0, 2):
        kind, text = ranks[rank]["rank 1"]
        assert kind == "PeerFailure"
        assert text.startswith("rank 1: ZeroDivisionError: their own mistake (in your code: ")
        assert f"{theirs.__file__}, line " in text
    for found in ranks:
        assert found["off"][0] == UsageError.__name__
        assert "no gradient reaches never.weight, never.bias; set it to 'auto'" in found["off"][1]
        assert "buffer 'filter' is complex64" in found["complex"][1]
        assert found["norm"][0] == ConfigError.__name__
        assert "step 2 has a batch of 4; on 3 ranks, rank 1 would train on one" in found["norm"][1]
