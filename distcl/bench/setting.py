"""What benchmarks train: images made of random numbers, a small convolutional net, one round."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from distcl.assembly import assemble
from distcl.bench.measure import Work
from distcl.config import Config
from distcl.data.arrays import ArraySource
from distcl.data.streams import DriftStream
from distcl.priority.weights import RoundWeights
from distcl.runtime import Runtime
from distcl.steps import Stage
from distcl.trainer import ContinuousTrainer, Parts
from distcl.types import Ids

CNN: dict[str, Any] = {"name": "cnn"}


def config_of(**sections: dict[str, Any]) -> Config:
    """Return a configuration of two experiences without drift; sections as in TOML."""
    stream = {"drift": "none", "experiences": 2}
    given = {"stream": stream, "model": CNN, **sections}
    return Config.model_validate(given, strict=True)


def stream_of(config: Config, samples: int, shape: tuple[int, ...] = (1, 28, 28)) -> DriftStream:
    """Return a stream of ``samples`` images with 10 classes, the same on every rank."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((samples, *shape), dtype=np.float32)
    y = np.arange(samples) % 10
    return DriftStream(
        ArraySource(x, y), ArraySource(x[:100], y[:100]), config.stream, config.run.seed
    )


def trainer_of(
    config: Config, runtime: Runtime, stream: DriftStream, out: Path
) -> ContinuousTrainer:
    """Return a trainer that tracks nothing. Collective."""
    return ContinuousTrainer(assemble(config, runtime, stream, out), config)


def steps_of(
    trainer: ContinuousTrainer,
    steps: int,
    weights: RoundWeights | None = None,
    history: bool = False,
) -> Work:
    """Return the work of ``steps`` training steps on the first experience, without priorities."""
    parts: Parts = trainer.parts
    first = parts.stream.experiences[0]
    past: Ids = parts.stream.experiences[1].train if history else np.empty(0, dtype=np.int64)
    number = 0

    def train() -> None:
        nonlocal number
        number += 1
        parts.feed.rebuild(number, first.train, past, weights or RoundWeights(), history)
        trainer.loop.run(Stage(number, "bench", first, steps), "bench")

    return train
