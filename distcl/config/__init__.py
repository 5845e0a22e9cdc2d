"""The configuration: one pydantic model per TOML section. Loading lives in ``load.py``."""

from __future__ import annotations

from typing import Any

from pydantic import model_validator

from distcl.config.base import Section
from distcl.config.continual import (
    ContinualLearningConfig,
    DetectorConfig,
    MonitorConfig,
    PriorityConfig,
)
from distcl.config.learning import ModelConfig, OptimizerConfig, RunConfig, TrainingConfig
from distcl.config.stream import StreamConfig
from distcl.config.system import CheckpointConfig, DataConfig, ParallelConfig, TrackingConfig

__all__ = [
    "CheckpointConfig",
    "Config",
    "ContinualLearningConfig",
    "DataConfig",
    "DetectorConfig",
    "ModelConfig",
    "MonitorConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "PriorityConfig",
    "RunConfig",
    "Section",
    "StreamConfig",
    "TrackingConfig",
    "TrainingConfig",
]


class Config(Section):
    """A whole configuration file."""

    run: RunConfig = RunConfig()
    stream: StreamConfig = StreamConfig()
    model: ModelConfig = ModelConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    training: TrainingConfig = TrainingConfig()
    continual_learning: ContinualLearningConfig = ContinualLearningConfig()
    priority: PriorityConfig = PriorityConfig()
    monitor: MonitorConfig = MonitorConfig()
    detector: DetectorConfig = DetectorConfig()
    parallel: ParallelConfig = ParallelConfig()
    data: DataConfig = DataConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    tracking: TrackingConfig = TrackingConfig()

    def replace(self, **values: Any) -> Config:
        """Return a copy in which keys have other values: ``replace(**{"optimizer.lr": 0.1})``.

        Raises ConfigError, as for a file, naming a key that there is not or a value that it is not
        to have.
        """
        from distcl.config.load import load_config

        return load_config(self, values)

    @model_validator(mode="after")
    def _combinations(self) -> Config:
        if self.run.precision == "fp64" and self.parallel.strategy != "ddp":
            raise ValueError("run.precision = 'fp64' works with parallel.strategy = 'ddp' only")
        return self
