"""Steps of an updater on global batches of chosen sizes, each rank its part, for tests."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from distcl.config import Config
from distcl.data.stream import create_stream
from distcl.distributed.runtime import Runtime
from distcl.models import create_model
from distcl.training.build import assemble
from distcl.types import Batch, Ids
from tests.small import small

# (current, history) samples of each step; with 2 and 3 ranks some parts are uneven, some empty
SIZES = ((7, 5), (1, 4), (6, 1), (1, 1), (4, None), (6, 6), (2, 9))
KEYS = ("run.precision=fp64", "continual_learning.importance_weighting=false")


def exact(*overrides: str) -> Config:
    return small(*KEYS, *overrides)


def dense_model(*overrides: str) -> nn.Module:
    """The model of a configuration, with its first weights, float64, in this process."""
    config = exact(*overrides)
    spec = create_stream(config.stream, config.run.seed).spec
    return create_model(config.model, spec, config.run.seed).double()


def batches(
    sizes: Sequence[tuple[int, int | None]] = SIZES, rank: int = 0, world: int = 1
) -> Iterator[tuple[Batch, Batch | None]]:
    """Yield this rank's parts of (current, history): samples of the last and first experience."""
    config = exact()
    stream = create_stream(config.stream, config.run.seed)

    def part(ids: Ids) -> Batch:
        size, extra = divmod(len(ids), world)
        first = rank * size + min(rank, extra)
        batch = stream.read(ids[first : first + size + (rank < extra)])
        return replace(batch.to(torch.device("cpu"), torch.float64), total=len(ids))

    used = 0
    for now, past in sizes:
        current = stream.experiences[-1].train[used : used + now]
        history = None if past is None else stream.experiences[0].train[used : used + past]
        yield part(current), None if history is None else part(history)
        used += 10


def train(cases: dict[str, tuple[str, ...]], out: Path) -> dict[str, dict[str, Any]]:
    """Take the steps for every case, on this rank; return the final weights of each.

    Asserts that ``fwd_bwd`` leaves weights and buffers as they were, to the last bit.
    """
    runtime = Runtime(exact().run)
    finals = {}
    for case, overrides in cases.items():
        config = exact(*overrides)
        stream = create_stream(config.stream, config.run.seed)
        parts = assemble(config, runtime, stream, out)
        module = runtime.strategy.unwrap(parts.model)
        parts.model.train()
        for batch, hist_batch in batches(SIZES, runtime.rank, runtime.world_size):
            before = {n: v.clone() for n, v in module.state_dict().items()}
            result = parts.updater.fwd_bwd(batch, hist_batch)
            assert all(torch.equal(before[n], v) for n, v in module.state_dict().items())
            assert result.losses.shape == result.ids.shape
            parts.optimizer.step()
            parts.optimizer.zero_grad(set_to_none=True)
        finals[case] = {n: p.detach().numpy().copy() for n, p in module.named_parameters()}
    return finals
