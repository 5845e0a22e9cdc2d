"""What benchmarks train: images made of random numbers, a small convolutional net, one round."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.micro.measure import Work
from distcl.config import Config
from distcl.data.sources.arrays import ArraySource
from distcl.data.stream import DriftStream
from distcl.distributed.runtime import Runtime
from distcl.priority.round_weights import RoundWeights
from distcl.training.build import assemble
from distcl.training.stage import Stage
from distcl.training.trainer import ContinuousTrainer

CNN: dict[str, Any] = {"name": "cnn", "options": {"channels": [16, 32, 64]}}
BATCH = 64


def config_of(**sections: dict[str, Any]) -> Config:
    """Return a configuration of two experiences without drift; sections as in TOML."""
    given = {
        "stream": {"drift": "none", "experiences": 2},
        "model": CNN,
        "training": {"batch_size": BATCH},
        "run": {"poll_steps": 1000},
        **sections,
    }
    return Config.model_validate(given, strict=True)


def stream_of(config: Config, samples: int) -> DriftStream:
    """Return a stream of ``samples`` images [1, 28, 28] of 10 classes, the same on every rank."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((samples, 1, 28, 28), dtype=np.float32)
    y = np.arange(samples) % 10
    held_out = ArraySource(x[:100], y[:100])
    return DriftStream(ArraySource(x, y), held_out, config.stream, config.run.seed)


def trainer_of(
    config: Config, runtime: Runtime, stream: DriftStream, out: Path
) -> ContinuousTrainer:
    """Return a trainer on that stream. Collective."""
    return ContinuousTrainer(assemble(config, runtime, stream, out), config)


def steps_of(trainer: ContinuousTrainer, steps: int) -> Work:
    """Return the work of ``steps`` steps on the first experience, drawn uniformly.

    They are not the first of a round, whose operations are counted. Updaters that take history
    batches get them, of the second experience.
    """
    parts, number = trainer.parts, 0
    first, second = parts.stream.experiences
    history = parts.updater.uses_hist_batch
    past = second.train if history else np.empty(0, dtype=np.int64)

    def train() -> None:
        nonlocal number
        number += 1
        parts.loader.rebuild(number, first.train, past, RoundWeights(), history)
        stage = Stage(number, "bench", first, steps, report={"flops": None})
        trainer.loop.run(stage)

    return train


def bare_of(
    runtime: Runtime, stream: DriftStream, like: nn.Module, steps: int, batch_size: int
) -> Work:
    """Return the work of a plain loop over the same samples: index, forward, backward, step."""
    inner = copy.deepcopy(runtime.strategy.unwrap(like))
    model = nn.parallel.DistributedDataParallel(inner) if runtime.world_size > 1 else inner
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    criterion = nn.CrossEntropyLoss()
    batch = stream.read(stream.experiences[0].train)
    x, y, n, each = batch.x, batch.y, len(batch), batch_size // runtime.world_size

    def train() -> None:
        order = torch.from_numpy(np.random.default_rng(0).permutation(n))
        for step in range(steps):
            begin = (step * batch_size + runtime.rank * each) % n
            rows = order[begin : begin + each]
            optimizer.zero_grad(set_to_none=True)
            criterion(model(x[rows]), y[rows]).backward()
            optimizer.step()

    return train
