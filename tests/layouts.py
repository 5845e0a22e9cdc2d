"""The layouts of weights, for tests: several in one process, one after another.

A process joins its group once; everything else that a strategy sets up is made anew.
"""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from distcl.config import ParallelConfig, RunConfig, TrainingConfig
from distcl.distributed.runtime import Runtime
from distcl.parallel.partition import Partition
from tests.spawn import preload

preload("tests.warm")
DEEPSPEED = importlib.util.find_spec("deepspeed") is not None
WITHOUT = "DeepSpeed is not installed; type: pip install 'distcl[deepspeed]'"

ZERO3: dict[str, Any] = {"stage": 3, "reduce_bucket_size": 10_000}
LAYOUTS: dict[str, dict[str, Any]] = {
    "ddp": {"strategy": "ddp"},
    "fsdp2": {"strategy": "fsdp2"},
    "fsdp2 in units": {"strategy": "fsdp2", "fsdp_unit": 30},
    "zero1": {"strategy": "zero1"},
    "zero2": {"strategy": "zero2"},
    "zero3": {"strategy": "zero3", "threshold": 0},
    "zero3 resident": {"strategy": "zero3", "threshold": 100_000},
    "zero3 mixed": {"strategy": "zero3", "threshold": 20},
    "fsdp2 offloaded": {"strategy": "fsdp2", "fsdp_unit": 30, "offload_optimizer": True},
    "zero1 offloaded": {"strategy": "zero1", "offload_optimizer": True},
    "zero2 offloaded": {"strategy": "zero2", "offload_optimizer": True},
    "zero3 offloaded": {"strategy": "zero3", "threshold": 20, "offload_optimizer": True},
}


def available(names: list[str]) -> list[str]:
    """Leave out what needs DeepSpeed where it is not installed."""
    return [n for n in names if DEEPSPEED or "zero" not in n]


def layout_params(names: list[str]) -> pytest.MarkDecorator:
    """Parametrize ``layout``; what needs DeepSpeed is skipped where it is not installed."""

    def param(name: str) -> Any:
        return pytest.param(
            name, marks=pytest.mark.skipif("zero" in name and not DEEPSPEED, reason=WITHOUT)
        )

    return pytest.mark.parametrize("layout", [param(name) for name in names])


def fresh_runtime(
    layout: str,
    precision: str = "fp32",
    training: TrainingConfig | None = None,
    folder: Any = None,
    **parallel: Any,
) -> Runtime:
    """Return a runtime of this process for a layout; ``folder`` takes DeepSpeed's file."""
    from accelerate.state import AcceleratorState, PartialState

    _forget_introductions()
    AcceleratorState._reset_state()
    PartialState._reset_state()
    os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)
    keys = {**LAYOUTS[layout], **parallel}
    threshold = keys.pop("threshold", None)
    if threshold is not None:
        zero = {**ZERO3, "stage3_param_persistence_threshold": threshold}
        path = folder / f"{threshold}-{os.environ.get('RANK', 0)}.json"
        path.write_text(json.dumps({"zero_optimization": zero}))
        keys["deepspeed_config"] = str(path)
    return Runtime(RunConfig(precision=precision), ParallelConfig(**keys), training)


def _forget_introductions() -> None:
    """Let the ranks introduce themselves anew; what they said before would look like old clocks."""
    if dist.is_initialized():
        dist.barrier()
        if dist.get_rank() == 0:
            store = dist.distributed_c10d._get_default_store()
            for key in ("go", "all", *map(str, range(1, dist.get_world_size()))):
                store.delete_key(f"distcl/peers/{key}")
        dist.barrier()


def cut(partition: Partition, runtime: Runtime, dense: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Return this rank's slices of whole tensors, the same on every rank. Collective."""
    exact = {n: t.to(torch.float32 if t.is_floating_point() else torch.int64).to(runtime.device)
             for n, t in dense.items()}  # fmt: skip
    mine = {n: t if runtime.is_main else torch.zeros_like(t) for n, t in exact.items()}
    return partition.reduce_owned(mine)


def tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    both = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: value.detach() for name, value in both.items()}


def gathered(partition: Partition, names: list[str]) -> dict[str, Any]:
    """Return whole weights and buffers as numpy arrays. Collective."""
    return {name: partition.gather(name).float().cpu().numpy() for name in names}


def each(layouts: list[str], scenario: Callable[..., Any], *args: Any) -> dict[str, Any]:
    """Run a scenario under each layout, in this rank; what raises ends the run."""
    return {layout: scenario(layout, *args) for layout in layouts}
