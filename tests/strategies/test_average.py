"""The mean of a round's weights, under every layout, beside its definition."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from distcl.data.stream import create_stream
from distcl.training.build import assemble
from distcl.training.trainer import ContinuousTrainer
from distcl.types import DataSpec
from tests.faults.test_resume import go, outcome
from tests.layouts import available, each, fresh_runtime, gathered, layout_params
from tests.small import small
from tests.spawn import run_ranks

NAMES = ["ddp", "fsdp2", "zero1", "zero2", "zero3", "zero2 offloaded"]
WORLD = 3
KEYS = (
    "stream.samples_per_experience=310",
    "training.epochs=1",
    "training.pretrain_epochs=1",
    "optimizer.momentum=0.9",
)
MEANS = {"ema": ("training.ema=0.8",), "swa": ("training.swa=true",)}


class Normed(nn.Module):
    """Two layers with statistics between them."""

    def __init__(self, spec: DataSpec) -> None:
        super().__init__()
        self.flat = nn.Flatten()
        self.first, self.norm, self.last = nn.Linear(64, 17), nn.BatchNorm1d(17), nn.Linear(17, 10)

    def forward(self, x: torch.Tensor) -> Any:
        return self.last(self.norm(self.first(self.flat(x))).relu())


MODEL = f"model.name={__name__}:Normed"


def _rounds(layout: str, folder: Path, *keys: str) -> dict[str, Any]:
    """Two rounds; the weights after each step, and those that are used after a round."""
    config = small(*KEYS, *keys, "model.options={}", MODEL)
    runtime = fresh_runtime(layout, training=config.training, folder=folder)
    stream = create_stream(config.stream, config.run.seed)
    trainer = ContinuousTrainer(assemble(config, runtime, stream, folder), config)
    average, partition = trainer.parts.average, trainer.parts.forward.partition
    names = [n for n, spec in partition.specs().items() if spec.kind == "float"]
    steps: list[dict[str, Any]] = []
    update = average.update

    def noting() -> None:
        update()
        kept = {n: b.clone() for n, b in partition.moving().items()}
        partition.sync_buffers()  # what a rank has seen is its own
        steps.append(gathered(partition, names))
        for name, buffer in partition.moving().items():
            buffer.copy_(kept[name])

    average.update = noting  # type: ignore[method-assign]
    result = []
    trainer.pretrain(stream.experiences[0])
    for experience in [None, *stream.experiences[1:]]:
        if experience is not None:
            trainer.run_round(experience, "scheduled")
        used = gathered(partition, names)
        held = sum(t.numel() for t in average.state_dict()["other"]["weights"].values())
        average.hide()
        result.append({"steps": [*steps], "used": used, "raw": gathered(partition, names)})
        result[-1]["held"] = held
        average.show()
        steps.clear()
    return {"rounds": result, "numel": sum(p.size for p in used.values())}


def _layouts(folder: Path, layouts: list[str], *keys: str) -> dict[str, Any]:
    return each(layouts, _rounds, folder, *keys)


@pytest.fixture(scope="module", params=[*MEANS])
def ranks(request: Any, tmp_path_factory: Any) -> tuple[str, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp(request.param)
    keys = MEANS[request.param]
    return request.param, run_ranks(WORLD, _layouts, folder, available(NAMES), *keys, timeout=170)


@layout_params(NAMES)
def test_a_round_ends_with_the_mean_and_the_next_goes_on_from_the_last(
    layout: str, ranks: tuple[str, list[dict[str, Any]]]
) -> None:
    kind, every = ranks
    for rank in every:
        for found in rank[layout]["rounds"]:
            steps = found["steps"]
            weights = np.array([0.8 ** (len(steps) - k) for k in range(1, len(steps) + 1)])
            weights = np.ones(len(steps)) if kind == "swa" else weights
            for name, used in found["used"].items():
                values = np.stack([step[name] for step in steps]).astype(np.float64)
                mean = np.tensordot(weights / weights.sum(), values, 1)
                np.testing.assert_allclose(used, mean, rtol=0, atol=2e-6, err_msg=name)
                np.testing.assert_allclose(found["raw"][name], values[-1], rtol=0, atol=1e-6)
                if name != "first.bias":  # which BatchNorm takes away
                    assert np.abs(used - values[-1]).max() > 1e-5, name
    for k in range(3):
        held = [rank[layout]["rounds"][k]["held"] for rank in every]
        whole = 64 * 17 + 17 + 17 + 17 + 17 * 10 + 10
        assert sum(held) == whole
        assert max(held) <= whole / WORLD * 1.3


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_a_job_that_is_cut_goes_on_bit_for_bit(strategy: str, tmp_path: Path) -> None:
    keys = (*KEYS, *MEANS["ema"], f"parallel.strategy={strategy}", "training.accept=improves")
    cut, whole = tmp_path / "cut", tmp_path / "whole"

    def run(out: Path, world: int = WORLD, polls: int = 0, resume: str = "never") -> list[str]:
        return run_ranks(world, go, "train", keys, out, polls, resume, timeout=150)

    assert run(cut, polls=5) == ["preempted"] * WORLD
    assert run(cut, resume="auto") == ["done"] * WORLD
    assert run(whole) == ["done"] * WORLD
    assert outcome(cut) == outcome(whole)


def test_it_goes_on_with_fewer_ranks(tmp_path: Path) -> None:
    keys = (*KEYS, *MEANS["ema"], "run.precision=fp64")
    cut, whole = tmp_path / "cut", tmp_path / "whole"
    assert run_ranks(3, go, "train", keys, cut, 5, "never") == ["preempted"] * 3
    assert run_ranks(2, go, "train", keys, cut, 0, "auto") == ["done"] * 2
    assert run_ranks(1, go, "train", keys, whole, 0, "never") == ["done"]
    ours, theirs = (load_file(out / "checkpoints" / "final.safetensors") for out in (cut, whole))
    for name, value in theirs.items():
        assert torch.allclose(ours[name].double(), value.double(), atol=1e-6), name
