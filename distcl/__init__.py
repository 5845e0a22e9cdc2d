"""distcl: distributed continual learning with prioritized sampling.

The public names are imported on first use, so that ``import distcl`` stays light.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "Anchor": "distcl.anchor",
    "Batch": "distcl.types",
    "ContinuousTrainer": "distcl.trainer",
    "DistributedWeightedSampler": "distcl.priority.sampler",
    "Monitor": "distcl.monitor",
    "Runtime": "distcl.runtime",
    "compute_sample_priorities": "distcl.priority.scoring",
    "create_updater": "distcl.updaters",
    "load_config": "distcl.config_load",
    "register": "distcl.registry",
}

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'distcl' has no attribute '{name}'")
    return getattr(importlib.import_module(_PUBLIC[name]), name)
