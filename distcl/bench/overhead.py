"""``distcl bench overhead``: what a step and a method cost beside the plainest loop."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import nn

from distcl.bench.measure import Work, on_ranks, seconds_of
from distcl.bench.rows import Row
from distcl.bench.setting import config_of, steps_of, stream_of, trainer_of
from distcl.data.streams import DriftStream
from distcl.runtime import Runtime

BATCH = 64


def bench(quick: bool) -> Iterator[Row]:
    """Train a small convolutional net, 40 (``quick``: 10) steps at a time."""
    steps, repeats = (10, 3) if quick else (40, 7)
    for ranks in (1,) if quick else (1, 2):
        found = on_ranks(ranks, f"{__name__}:steps", steps, repeats)
        yield Row(
            f"training step, importance off, {ranks} ranks" if ranks > 1 else "training step, off",
            found["base"] / steps,
            found["bare"] / steps,
            better="less",
            target=1.03,
            limit=found["bare"] / steps,
            note="against a bare PyTorch loop" + (" with DDP" if ranks > 1 else ""),
        )
    yield Row(
        "EWC step",
        found["ewc_online"] / steps,
        found["base"] / steps,
        better="less",
        target=1.05,
        note="against the plain step",
    )


def steps(steps: int, repeats: int) -> dict[str, float]:
    """Return median seconds of ``steps`` steps: bare, and by each method. Collective."""
    torch.set_num_threads(1)
    runtime = Runtime()
    works: dict[str, Work] = {}
    with tempfile.TemporaryDirectory() as out:
        for mode in ("base", "ewc_online"):
            config = config_of(
                training={"batch_size": BATCH},
                continual_learning={"update_mode": mode},
                run={"poll_steps": steps},
            )
            stream = stream_of(config, 4_000)
            trainer = trainer_of(config, runtime, stream, Path(out))
            works[mode] = steps_of(trainer, steps)
            works[mode]()
            trainer.parts.updater.cl_postprocessing(stream, stream.experiences[0].train)
        works["bare"] = _bare(runtime, stream, trainer.parts.model, steps)
        found = dict(zip(works, seconds_of(*works.values(), repeats=repeats), strict=True))
    runtime.close()
    return found


def _bare(runtime: Runtime, stream: DriftStream, like: nn.Module, steps: int) -> Work:
    """Return the work of a plain loop over the same samples: index, forward, backward, step."""
    inner = copy.deepcopy(runtime.unwrap(like))
    model = nn.parallel.DistributedDataParallel(inner) if runtime.world_size > 1 else inner
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    criterion = nn.CrossEntropyLoss()
    batch = stream.read(stream.experiences[0].train)
    x, y, n, each = batch.x, batch.y, len(batch), BATCH // runtime.world_size

    def train() -> None:
        order = torch.from_numpy(np.random.default_rng(0).permutation(n))
        for step in range(steps):
            begin = (step * BATCH + runtime.rank * each) % n
            rows = order[begin : begin + each]
            loss = criterion(model(x[rows]), y[rows])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()

    return train
