"""Weights and optimizer state leave one layout and go on in another, or in the same bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from distcl.distributed.runtime import Runtime
from distcl.parallel.partition import Partition, create_partition
from tests.layouts import LAYOUTS, available, each, fresh_runtime, gathered, layout_params, tensors
from tests.models import tangled
from tests.spawn import run_ranks

OPTIMIZERS = {
    "adam": lambda params: torch.optim.Adam(params, lr=0.05),
    "momentum": lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.9),
}
State = dict[str, Any]


def _save(runtime: Runtime, partition: Partition, optimizer: torch.optim.Optimizer) -> State:
    """Return whole weights and optimizer state, as a checkpoint puts them together. Collective."""
    model = tensors(tangled(0))
    mine = partition.optimizer_state(optimizer)
    ranks = runtime.gather_objects((mine.slices, mine.plain, partition.ranges()))
    slices: dict[str, dict[str, torch.Tensor]] = {}
    for parts, _, ranges in ranks:
        for key, named in parts.items():
            for name, value in named.items():
                whole = torch.full((model[name].numel(),), float("nan"))
                whole = slices.setdefault(key, {}).setdefault(name, whole)
                whole[slice(*ranges[name])] = value.cpu()
    plain = {n: p for _, plain, _ in ranks for n, p in plain.items()}
    return {"weights": gathered(partition, list(model)), "slices": slices, "plain": plain}


def _load(partition: Partition, optimizer: torch.optim.Optimizer, state: State) -> None:
    def weights(name: str, start: int, stop: int) -> torch.Tensor:
        return torch.from_numpy(state["weights"][name]).reshape(-1)[start:stop]

    partition.load(weights)
    fetch = {
        key: (lambda name, start, stop, named=named: named[name][start:stop])
        for key, named in state["slices"].items()
    }
    partition.load_optimizer_state(optimizer, fetch, state["plain"])


def _train(runtime: Runtime, model: Any, optimizer: Any, steps: range) -> list[float]:
    x = torch.randn(5, 6, 7, generator=torch.Generator().manual_seed(3))
    losses = []
    for step in steps:
        loss = model(x[step].to(runtime.device) + runtime.rank).square().mean()
        runtime.strategy.backward(loss)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(loss.detach()))
    return losses


def _resume(layout: str, folder: Path, kind: str, of_ddp: dict[str, Any]) -> dict[str, Any]:
    runtime = fresh_runtime(layout, folder=folder)

    def build() -> tuple[Any, Any, Partition]:
        model, optimizer = runtime.prepare_training(tangled(0), OPTIMIZERS[kind])
        return model, optimizer, create_partition(runtime, model)

    model, optimizer, partition = build()
    _train(runtime, model, optimizer, range(3))
    partition.sync_buffers()
    state = _save(runtime, partition, optimizer)
    whole = {k: not any(v.isnan().any() for v in n.values()) for k, n in state["slices"].items()}
    result = {"on": _train(runtime, model, optimizer, range(3, 5)), "whole": whole}
    of_ddp.setdefault(kind, state)  # ddp comes first
    for name, saved in (("same", state), ("from ddp", of_ddp[kind])):
        model, optimizer, partition = build()
        _load(partition, optimizer, saved)
        result[name] = _train(runtime, model, optimizer, range(3, 5))
        result[f"{name} weights"] = gathered(partition, list(tensors(tangled(0))))
    return result


def _all(folder: Path, layouts: list[str]) -> dict[str, Any]:
    of_ddp: dict[str, Any] = {}
    return {kind: each(layouts, _resume, folder, kind, of_ddp) for kind in OPTIMIZERS}


NAMES = [name for name in LAYOUTS if name != "zero3 resident"]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: Any) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("resume")
    return run_ranks(2, _all, folder, available(NAMES), timeout=150)


@pytest.mark.parametrize("kind", list(OPTIMIZERS))
@layout_params(NAMES)
def test_training_goes_on_bit_for_bit_in_the_same_layout_and_closely_from_ddp(
    layout: str, kind: str, ranks: list[Any]
) -> None:
    for rank in ranks:
        found, ddp = rank[kind][layout], rank[kind]["ddp"]
        assert found["same"] == found["on"]
        np.testing.assert_allclose(found["from ddp"], ddp["on"], rtol=0, atol=1e-6)
        keys = {"adam": {"exp_avg", "exp_avg_sq"}, "momentum": {"momentum_buffer"}}[kind]
        assert found["whole"] == dict.fromkeys(keys, True)
