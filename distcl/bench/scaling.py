"""``distcl bench scaling``: a fixed global batch on two ranks against one."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from distcl.bench.measure import on_ranks, seconds_of
from distcl.bench.rows import Row
from distcl.bench.setting import config_of, steps_of, stream_of, trainer_of
from distcl.runtime import Runtime

BATCH = 256


def bench(quick: bool) -> Iterator[Row]:
    """Train a convolutional net whose steps take well over 20 ms."""
    steps, repeats = (3, 3) if quick else (8, 7)
    one = on_ranks(1, f"{__name__}:measure", steps, repeats) / steps
    two = on_ranks(2, f"{__name__}:measure", steps, repeats) / steps
    yield Row(
        f"training step at 2 ranks, global batch {BATCH}",
        two,
        one,
        target=1.8,
        limit=one / 2,
        note="against 1 rank; limit: half the time",
    )


def measure(steps: int, repeats: int) -> float:
    """Return the median seconds of ``steps`` steps. Collective."""
    torch.set_num_threads(1)
    runtime = Runtime()
    config = config_of(training={"batch_size": BATCH}, run={"poll_steps": steps})
    stream = stream_of(config, 2_000)
    with tempfile.TemporaryDirectory() as out:
        trainer = trainer_of(config, runtime, stream, Path(out))
        (seconds,) = seconds_of(steps_of(trainer, steps), repeats=repeats)
    runtime.close()
    return seconds
