"""A fixed global batch on two ranks against one."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np

from benchmarks.micro.measure import on_ranks, seconds_of
from benchmarks.micro.rows import Row, times_faster
from benchmarks.micro.setting import bare_of, config_of, steps_of, stream_of, trainer_of
from distcl.distributed.runtime import Runtime

BATCH = 256
STEP = "benchmarks.micro.scaling:step"


def measure(quick: bool) -> list[Row]:
    """Train a convolutional net, steps of well over 20 ms, on one rank, on two, and again."""
    steps, repeats = (4, 3) if quick else (10, 3)
    ranks, turns = (1, 2), 1 if quick else 2
    found = [[on_ranks(r, STEP, steps, repeats) for r in ranks] for _ in range(turns)]
    (one, _), (two, plain) = np.mean(found, axis=0).tolist()
    name = f"training step at 2 ranks, global batch {BATCH}"
    unit = f"s, of 1 rank ({1e3 * one:.0f} ms a step)"
    return [times_faster(name, two, one, unit, ">= 1.8", limit=plain)]


def step(steps: int, repeats: int) -> list[float]:
    """Return the median seconds of a step, and of one of a bare PyTorch loop. Collective."""
    runtime = Runtime()
    config = config_of(training={"batch_size": BATCH})
    stream = stream_of(config, 8_000)
    with tempfile.TemporaryDirectory() as out:
        trainer = trainer_of(config, runtime, stream, Path(out))
    bare = bare_of(runtime, stream, trainer.parts.model, steps, BATCH)
    found = seconds_of(steps_of(trainer, steps), bare, repeats=repeats)
    runtime.close()
    return [seconds / steps for seconds in found]
