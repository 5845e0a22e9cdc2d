"""distcl: distributed continual learning with prioritized sampling.

``distcl.train``, ``distcl.run`` and ``distcl.detect`` are the commands of these names.

The public names are imported on first use, so that ``import distcl`` stays light.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "Anchor": "distcl.parallel.anchor",
    "Batch": "distcl.types",
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
    "register": "distcl.registry",
    "run": "distcl.api",
    "train": "distcl.api",
}

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'distcl' has no attribute '{name}'")
    return getattr(importlib.import_module(_PUBLIC[name]), name)
