"""``training.accept = "improves"``: after a round taken back, everything is as it was before it."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map_only

from distcl.data.stream import create_stream
from distcl.distributed.runtime import Runtime
from distcl.training.build import assemble
from distcl.training.trainer import ContinuousTrainer
from distcl.types import DataSpec
from tests.faults.test_resume import go, outcome
from tests.small import small
from tests.spawn import run_ranks

HARMFUL = 0.6
"""A learning rate at which a round makes the model forget."""
KEYS = (
    f"model.name={__name__}:normalized",
    "model.options={}",
    "training.accept=improves",
    "training.pretrain_epochs=5",
    "training.batch_size=40",
    "stream.experiences=4",
    "run.precision=fp64",
)
CASES = {
    "adam": ("optimizer.name=adam", "optimizer.lr=0.01"),
    "lwf": ("continual_learning.update_mode=lwf", "optimizer.momentum=0.9"),
    "si": ("continual_learning.update_mode=si", "optimizer.momentum=0.9"),
    "der": ("continual_learning.update_mode=der", "priority.options={}"),
    "kfac": ("continual_learning.update_mode=kfac_online", "continual_learning.kfac_every=1"),
    "ema": ("training.ema=0.9", "optimizer.momentum=0.9"),
    "online": (
        "continual_learning.update_mode=er",
        "priority.source=online",
        "priority.signal=loss",
        "priority.refresh_steps=2",
    ),
}


def normalized(spec: DataSpec) -> nn.Module:
    """A net with running statistics, floating and counted."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, spec.classes)
    )


def _state(trainer: ContinuousTrainer) -> dict[str, Any]:
    """Everything that a later round depends on, copied."""
    parts = trainer.parts
    module = parts.runtime.strategy.unwrap(parts.model)
    optimizer = parts.forward.partition.optimizer_state(parts.optimizer)
    ledger = parts.loader.ledger_state()
    state = {
        "model": dict(module.state_dict()),
        "anchor": {k: v for k, v in parts.anchor.state_dict().items() if k != "replaced"},
        "average": parts.average.state_dict()["other"],
        "optimizer": [optimizer.slices, optimizer.plain],
        # kfac_online's W*, which every round begins with anew, tells nothing
        "updater": {k: v for k, v in parts.updater.state_dict().items() if k != "committed"},
        "table": None if ledger is None else ledger["table"]["scores"],
        "history": trainer.history.ids(),
    }
    return copy.deepcopy(tree_map_only(torch.Tensor, torch.Tensor.clone, state))


def _same(a: Any, b: Any) -> bool:
    left, right = tree_leaves(a), tree_leaves(b)
    return len(left) == len(right) and all(
        torch.equal(torch.as_tensor(x).nan_to_num(-1.0), torch.as_tensor(y).nan_to_num(-1.0))
        for x, y in zip(left, right, strict=True)
        if x is not None
    )


def _back(out: Path) -> dict[str, list[str]]:
    """What differs after a round taken back, by case."""
    found = {}
    runtime = Runtime(small(*KEYS).run)
    for case, keys in CASES.items():
        config = small(*KEYS, *keys)
        stream = create_stream(config.stream, config.run.seed, config.data)
        trainer = ContinuousTrainer(assemble(config, runtime, stream, out), config)
        first, second, third, _ = stream.experiences
        trainer.pretrain(first)
        assert trainer.run_round(second, "test", [second])["accepted"] is True, case
        lrs, trainer.loop.base_lrs = trainer.loop.base_lrs, [HARMFUL]
        trainer.evaluate(stream.experiences, seen=2)
        before = _state(trainer)
        if before["table"] is not None:  # that round weighs other samples
            trainer.parts.loader.weigh(2, third.train, trainer.history.ids(), True)
            before = _state(trainer)
        report = trainer.run_round(third, "test", [first])
        assert report["accepted"] is False, case
        after = _state(trainer)
        found[case] = [k for k in before if not _same(before[k], after[k])]
        trainer.loop.base_lrs = lrs
        trainer.run_round(third, "test", [third])  # of the same samples
    runtime.close()
    return found


@pytest.mark.parametrize("world", [1, 3])
def test_nothing_is_left_of_a_round_taken_back(world: int, tmp_path: Path) -> None:
    for found in run_ranks(world, _back, tmp_path):
        assert found == {case: [] for case in CASES}


def test_a_round_is_taken_back_also_after_a_resume_at_another_number_of_ranks(
    tmp_path: Path,
) -> None:
    """The optimizer and the anchor of its start, too, are in the checkpoints within a round."""
    keys = (
        "training.accept=improves",
        "optimizer.name=adam",
        "optimizer.lr=0.05",
        "training.pretrain_epochs=10",
        "training.epochs=4",
        "stream.experiences=4",
        "run.precision=fp64",
        "continual_learning.mix_historic_data=false",
    )
    assert run_ranks(1, go, "train", keys, tmp_path / "whole", 0, "never") == ["done"]
    polls = (41, 2)  # the first one falls into round 2
    for world, count in zip((3, 2), polls, strict=True):
        resume = "never" if world == 3 else "auto"
        assert (
            run_ranks(world, go, "train", keys, tmp_path / "cut", count, resume)
            == ["preempted"] * world
        )
    assert run_ranks(2, go, "train", keys, tmp_path / "cut", 0, "auto") == ["done"] * 2
    whole, cut = outcome(tmp_path / "whole"), outcome(tmp_path / "cut")
    assert cut["digests"] == whole["digests"]
    rounds = json.loads((tmp_path / "whole" / "summary.json").read_text())["rounds"]
    assert [r["accepted"] for r in rounds] == [True, False, False]
    assert cut["accuracy"] == whole["accuracy"]
    final = "checkpoints/final.safetensors"
    weights = load_file(tmp_path / "cut" / final)
    for name, value in load_file(tmp_path / "whole" / final).items():
        torch.testing.assert_close(weights[name], value, rtol=0, atol=1e-9)
