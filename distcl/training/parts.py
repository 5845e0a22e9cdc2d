"""What a trainer works with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from distcl.data.replay_buffer import ReplayBuffer
from distcl.distributed.runtime import Runtime
from distcl.parallel.anchor import Anchor
from distcl.parallel.average import WeightAverage
from distcl.parallel.inference import ShardedForward
from distcl.priority.scoring import Scorer
from distcl.sampling.round_loader import RoundLoader
from distcl.tracking.tracker import Tracker
from distcl.training.callbacks import Callbacks
from distcl.training.round_report import RoundRecorder
from distcl.training.scores import Score
from distcl.types import Progress, Stream
from distcl.updaters import Updater


@dataclass(frozen=True, slots=True)
class Parts:
    """What a trainer works with, built by ``training.build.assemble`` from a configuration."""

    runtime: Runtime
    stream: Stream
    history: ReplayBuffer
    model: nn.Module
    optimizer: torch.optim.Optimizer
    anchor: Anchor
    average: WeightAverage
    forward: ShardedForward
    scorer: Scorer
    updater: Updater
    loader: RoundLoader
    tracker: Tracker
    recorder: RoundRecorder
    progress: Progress
    scores: Mapping[str, Score]
    """By the names that they are told by; the first leads."""
    callbacks: Callbacks
