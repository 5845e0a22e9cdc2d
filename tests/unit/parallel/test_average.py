"""The mean of the weights, restored on another number of ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from distcl.distributed.runtime import Runtime
from distcl.parallel.average import WeightAverage
from distcl.parallel.partition import create_partition
from distcl.parallel.sliced_state import SavedSlices


def test_slices_are_put_together_and_buffers_are_the_mean_of_those_of_the_ranks() -> None:
    runtime = Runtime()
    model = runtime.prepare(nn.Sequential(nn.Linear(3, 4, bias=False), nn.BatchNorm1d(4)))
    partition = create_partition(runtime, model)
    whole = {n: torch.arange(t.numel()) + 0.5 for n, t in partition.trainable().items()}
    ranges: list[dict[str, list[int]]] = []
    states: list[Any] = []
    for rank, cut in enumerate((slice(0, 1), slice(1, None), slice(0, 0))):  # uneven parts
        held = {n: t[cut] for n, t in whole.items() if t[cut].numel()}
        ranges.append({n: list(range(len(whole[n])))[cut][:1] for n in held})
        ranges[-1] = {n: [a, a + held[n].numel()] for n, (a,) in ranges[-1].items()}
        buffers = {n: torch.full_like(b, float(3**rank)) for n, b in partition.moving().items()}
        other = {"weights": held, "buffers": buffers}
        states.append({"steps": 5, "shown": False, "other": other, "kept": None})
    average = WeightAverage(partition, 0.9)
    average.load_slices(SavedSlices(Path("c"), states, ranges, partition.ranges(), 0, 1))
    found = average.state_dict()
    assert (found["steps"], found["shown"], found["kept"]) == (5, False, None)
    assert found["other"]["weights"].keys() == whole.keys()
    for name, value in whole.items():
        assert torch.equal(found["other"]["weights"][name], value), name
    assert {n.rpartition(".")[2] for n in found["other"]["buffers"]} == {
        "running_mean",
        "running_var",
    }
    for value in found["other"]["buffers"].values():
        assert torch.allclose(value, torch.full_like(value, 13 / 3))
