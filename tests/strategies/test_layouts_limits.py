"""What a layout may not do: allocate the whole model, give a rank more than its share, or hang
when one rank raises inside a swap."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from distcl.errors import DataError, DistclError, UsageError
from distcl.parallel.anchor import Anchor
from distcl.parallel.partition import create_partition
from distcl.types import DataSpec
from tests.layouts import available, each, fresh_runtime, layout_params, tensors
from tests.models import frozen_names, tangled
from tests.spawn import exit_codes, run_ranks
from tests.theirs import Scalar

NAMES = ["fsdp2 in units", "zero1", "zero2", "zero3", "zero3 mixed"]


class Allocations(TorchDispatchMode):
    """Notes the elements of every tensor that is made, views left out."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        held = {_pointer(t) for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for made in tree_leaves(out):
            if isinstance(made, torch.Tensor) and _pointer(made) not in held:
                size = made.untyped_storage().nbytes() // made.element_size()
                self.largest = max(self.largest, size)
        return out


def _pointer(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage().data_ptr())


def _square() -> nn.Module:
    torch.manual_seed(0)
    layers = [m for _ in range(6) for m in (nn.Linear(40, 40), nn.Tanh())]
    return nn.Sequential(*layers)


def _allocations(layout: str, folder: Path) -> dict[str, int]:
    runtime = fresh_runtime(layout, folder=folder)
    model, _ = runtime.prepare_training(_square(), lambda params: torch.optim.SGD(params, lr=0.1))
    partition: Any = create_partition(runtime, model)
    anchor = Anchor(partition)
    partition.owned = None  # whose cost is that of all parameters: not for gathering one
    with Allocations() as one:  # that what is made is seen
        partition.gather("0.weight")
    assert one.largest == 1600
    del partition.owned
    with Allocations() as made:
        anchor.refresh()
        with anchor.swapped_in():
            pass
    return {"largest": made.largest, "owned": sum(len(v) for v in anchor.theta_star.values())}


def _owned(layout: str, folder: Path) -> dict[str, int]:
    runtime = fresh_runtime(layout, folder=folder)
    model, _ = runtime.prepare_training(tangled(0), lambda params: torch.optim.SGD(params, lr=0.1))
    return {n: len(v) for n, v in create_partition(runtime, model).owned().items()}


def _layouts(folder: Path, layouts: list[str], traced: bool) -> dict[str, Any]:
    found: dict[str, Any] = {"owned": each(layouts, _owned, folder)}
    return found | ({"made": each(layouts, _allocations, folder)} if traced else {})


@pytest.fixture(scope="module")
def pair(tmp_path_factory: Any) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("pair")
    return run_ranks(2, _layouts, folder, available(NAMES), True, timeout=150)


@pytest.fixture(scope="module")
def four(tmp_path_factory: Any) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("four")
    return run_ranks(4, _layouts, folder, available(NAMES), False, timeout=150)


@layout_params(NAMES)
def test_owned_counts_add_up_to_what_can_change(
    layout: str, pair: list[Any], four: list[Any]
) -> None:
    frozen = frozen_names(tangled(0))
    dense = {n: t for n, t in tensors(tangled(0)).items() if n not in frozen}
    total = sum(t.numel() for t in dense.values())
    rows = sum(t.numel() // len(t) if t.ndim else 1 for t in dense.values())
    for ranks in (pair, four):
        counts = [rank["owned"][layout] for rank in ranks]
        for name, tensor in dense.items():
            assert sum(c.get(name, 0) for c in counts) == tensor.numel()
        padding = {"fsdp2": rows, "zero3": len(dense)}.get(layout.split()[0], 4 * len(ranks))
        assert max(sum(c.values()) for c in counts) <= -(-total // len(ranks)) + padding


@layout_params(["fsdp2 in units", "zero3", "zero3 mixed"])
def test_refresh_and_swap_never_allocate_the_whole_model(layout: str, pair: list[Any]) -> None:
    total = sum(p.numel() for p in _square().parameters())
    for rank in pair:
        found = rank["made"][layout]
        assert found["owned"] <= total / 2 + 20
        assert found["largest"] <= 1600  # one parameter of twelve


def _raises(layout: str, folder: Path) -> None:
    runtime = fresh_runtime(layout, folder=folder)

    def tell(text: str) -> None:
        with (folder / f"{layout} told").open("a") as told:
            told.write(f"rank {runtime.rank}: {text}\n")

    assert runtime.relay is not None
    runtime.relay.tell = lambda cause: tell(cause.message)
    try:
        with runtime.guard():
            model, _ = runtime.prepare_training(
                tangled(0), lambda params: torch.optim.SGD(params, lr=0.1)
            )
            module, partition = (
                runtime.strategy.unwrap(model).eval(),
                create_partition(runtime, model),
            )
            with Anchor(partition).swapped_in(), partition.inference():
                for k in range(100_000):
                    if runtime.rank == 1 and k == 3:
                        raise DataError("shard 7 is torn")
                    module(torch.ones(2, 7))
    except DistclError as error:
        if runtime.is_main:
            tell(str(error))
        os._exit(error.exit_code)


@layout_params(["fsdp2 in units", "zero2", "zero3"])
def test_an_exception_inside_a_swap_on_one_rank_ends_all(layout: str, tmp_path: Path) -> None:
    assert exit_codes(2, _raises, layout, tmp_path) == [3, 3]
    told = (tmp_path / f"{layout} told").read_text()
    assert told.count("\n") == 1
    assert told.startswith("rank 0: ")
    assert "shard 7 is torn" in told


def _scalar(layout: str, folder: Path) -> str:
    runtime = fresh_runtime(layout, folder=folder)
    model = Scalar(DataSpec((7,), 3))
    with pytest.raises(UsageError) as caught:
        runtime.prepare_training(model, lambda params: torch.optim.SGD(params, lr=0.1))
    return str(caught.value)


def test_a_scalar_parameter_is_refused_by_name(tmp_path: Path) -> None:
    names = available(["fsdp2", "zero1", "zero2", "zero3"])
    [told] = run_ranks(1, each, names, _scalar, tmp_path)
    for name in names:
        wanted = f"'{name}' cannot shard the scalar parameter 't'; give it shape (1,), or use 'ddp'"
        assert wanted in told[name]
