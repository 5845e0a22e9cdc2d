"""distcl: distributed continual learning with prioritized sampling.

``distcl.train``, ``distcl.run`` and ``distcl.detect`` are the commands of these names; they take a
configuration (a file, a dict, a Config) and, in place of names in it, objects: a model, a list of
datasets, a loss, … ``distcl.open_run`` opens what a run has left: its figures, plots and model.
``help(distcl.train)`` has the arguments, docs/EXTENDING.md an example.

The public names are imported on first use, so that ``import distcl`` stays light.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the table below, for those that read types
    from distcl.api import detect as detect
    from distcl.api import run as run
    from distcl.api import train as train
    from distcl.config import Config as Config
    from distcl.config.load import load_config as load_config
    from distcl.distributed.runtime import Runtime as Runtime
    from distcl.monitoring.monitor import Monitor as Monitor
    from distcl.parallel.anchor import Anchor as Anchor
    from distcl.priority.scoring import compute_sample_priorities as compute_sample_priorities
    from distcl.registry import register as register
    from distcl.results import open_run as open_run
    from distcl.sampling.sampler import DistributedWeightedSampler as DistributedWeightedSampler
    from distcl.training.callbacks import Callback as Callback
    from distcl.training.trainer import ContinuousTrainer as ContinuousTrainer
    from distcl.types import Batch as Batch
    from distcl.updaters import create_updater as create_updater

__version__ = "0.1.0"

_PUBLIC = {
    "Anchor": "distcl.parallel.anchor",
    "Batch": "distcl.types",
    "Callback": "distcl.training.callbacks",
    "Config": "distcl.config",
    "ContinuousTrainer": "distcl.training.trainer",
    "DistributedWeightedSampler": "distcl.sampling.sampler",
    "GlobalView": "distcl.sampling.global_view",
    "Monitor": "distcl.monitoring.monitor",
    "Runtime": "distcl.distributed.runtime",
    "compute_sample_priorities": "distcl.priority.scoring",
    "create_updater": "distcl.updaters",
    "detect": "distcl.api",
    "load_config": "distcl.config.load",
    "open_run": "distcl.results",
    "register": "distcl.registry",
    "run": "distcl.api",
    "train": "distcl.api",
}

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'distcl' has no attribute '{name}'")
    return getattr(importlib.import_module(_PUBLIC[name]), name)
