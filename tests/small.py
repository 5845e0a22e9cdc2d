"""A small job for tests: digits, rotated, a few steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from distcl import load_config
from distcl.config import Config

SMALL = (
    "stream.experiences=3",
    "stream.samples_per_experience=301",
    "model.options.hidden=[16]",
    "optimizer.lr=0.2",
    "training.batch_size=50",
    "training.epochs=2",
    "training.pretrain_epochs=2",
    "continual_learning.importance_weighting=true",
    "priority.score_batch=64",
    "run.report=false",
)


def small(*overrides: str) -> Config:
    return load_config(None, overrides=[*SMALL, *overrides], environ={})


def execute(command: str, overrides: tuple[str, ...], out: Path) -> dict[str, Any]:
    """Run a whole job in this process (one of the ranks); return its summary."""
    from distcl.job import execute as run

    return run(command, small(*overrides), out)
