"""Saved weights reach every layout at three ranks, whole or not at all; each reads its own part."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from distcl.checkpoint import reader
from distcl.checkpoint.reader import load_weights
from distcl.errors import CheckpointError
from distcl.models.weights import WeightsFile
from distcl.parallel.anchor import Anchor
from distcl.parallel.partition import create_partition
from tests.layouts import available, each, fresh_runtime, gathered, layout_params
from tests.spawn import run_ranks

NAMES = ["ddp", "fsdp2", "zero1", "zero2", "zero3"]


class Rotary(nn.Module):
    """A buffer that is not saved, one that is, sizes that three ranks do not divide."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first = nn.Linear(7, 110)
        self.norm = nn.BatchNorm1d(110)
        self.mix = nn.Linear(110, 110)
        self.head = nn.Linear(110, 3)
        self.register_buffer("inv_freq", 10_000 ** -(torch.arange(110) / 110), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.mix(self.norm(self.first(x)) * self.inv_freq)))


def _file(state: dict[str, torch.Tensor], path: Path) -> Path:
    save_file({name: value.contiguous() for name, value in state.items()}, path)
    return path


def _other(folder: Path) -> dict[str, Path]:
    """Files of models that are not quite this one."""
    state = Rotary(1).state_dict()
    steps = state["norm.num_batches_tracked"]
    changed = {
        "shape": {"first.weight": torch.zeros(7, 110)},
        "kind": {"norm.num_batches_tracked": steps.float()},
        "surplus": {"tail": torch.zeros(3)},
        "lacks": {"head.bias": None},
        "buffer": {"inv_freq": torch.ones(110)},
    }
    return {
        name: _file(
            {n: t for n, t in (state | change).items() if t is not None},
            folder / f"{name}.safetensors",
        )
        for name, change in changed.items()
    }


def _load(layout: str, folder: Path) -> dict[str, Any]:
    runtime = fresh_runtime(layout, folder=folder)
    model, _ = runtime.prepare_training(Rotary(0), lambda p: torch.optim.Adam(p, lr=0.1))
    partition = create_partition(runtime, model)
    module, names = runtime.strategy.unwrap(model), list(partition.specs())
    found: dict[str, Any] = {
        "specs": {n: (list(s.shape), s.kind) for n, s in partition.specs().items()},
        "refused": {},
    }
    before = gathered(partition, names)
    for name in ("shape", "kind", "surplus", "lacks", "buffer"):
        with pytest.raises(CheckpointError) as caught:
            load_weights(partition, folder / f"{name}.safetensors")
        found["refused"][name] = str(caught.value)
    after = gathered(partition, names)
    found["untouched"] = all(np.array_equal(before[n], after[n]) for n in names)

    elements = []

    class Counted(WeightsFile):
        def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
            part = super().read(name, start, stop)
            elements.append(part.numel())
            return part

    reader.WeightsFile = Counted  # type: ignore[misc]
    load_weights(partition, folder / "right.safetensors")
    reader.WeightsFile = WeightsFile  # type: ignore[misc]
    found["elements"] = sum(elements)
    found["weights"] = gathered(partition, names)
    anchor = Anchor(partition)
    anchor.theta_star = {n: torch.zeros_like(v) for n, v in anchor.theta_star.items()}
    x = torch.randn(4, 7, device=runtime.device)
    with anchor.swapped_in(), partition.inference():
        model.eval()
        found["swapped"] = float(model(x).abs().sum()), module.inv_freq.clone().numpy()
    partition.sync_buffers()
    found["inv_freq"] = module.inv_freq.numpy()
    return found


def _all(folder: Path, layouts: list[str]) -> dict[str, Any]:
    return each(layouts, _load, folder)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: Any) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("load")
    _file(Rotary(1).state_dict(), folder / "right.safetensors")
    _other(folder)
    return run_ranks(3, _all, folder, available(NAMES), timeout=300)


@layout_params(NAMES)
def test_weights_are_loaded_whole_or_refused_with_the_difference(layout: str, ranks: Any) -> None:
    own, right = Rotary(0), Rotary(1).state_dict()
    for found in (rank[layout] for rank in ranks):
        kinds = {n: "float" if t.is_floating_point() else "int" for n, t in right.items()}
        assert found["specs"] == {n: (list(t.shape), kinds[n]) for n, t in right.items()}
        told = found["refused"]
        assert "'first.weight' has shape [7, 110], the model's has [110, 7]" in told["shape"]
        assert "'norm.num_batches_tracked' is float, the model's is int" in told["kind"]
        assert "has 'tail', which the model has not" in told["surplus"]
        assert "lacks 'head.bias' of the model" in told["lacks"]
        assert "has 'inv_freq', which the model has not" in told["buffer"]
        assert found["untouched"]
        for name, value in found["weights"].items():
            assert np.array_equal(value, right[name].float().numpy()), name
        assert found["swapped"][0] == 0
        for value in (found["swapped"][1], found["inv_freq"]):
            assert np.array_equal(value, own.inv_freq.numpy())


@layout_params(["fsdp2", "zero3"])
def test_a_rank_reads_its_own_part_of_the_weights(layout: str, ranks: Any) -> None:
    model = Rotary(0)
    whole = sum(p.numel() for p in model.parameters())
    buffers = sum(t.numel() for t in model.norm.buffers())
    read = [rank[layout]["elements"] - buffers for rank in ranks]
    assert sum(read) == whole
    assert max(read) < whole / 3 + 110 * 4 + 110  # a row of each, where rows are not divided
