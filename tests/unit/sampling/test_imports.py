"""What the sampler loads: torch, numpy and what they load themselves."""

from __future__ import annotations

import subprocess
import sys

ASKED = """
import sys
import torch, numpy
before = set(sys.modules)
import distcl.sampling.global_view
from distcl import DistributedWeightedSampler, GlobalView
new = {name.partition(".")[0] for name in set(sys.modules) - before} - sys.stdlib_module_names
print(*sorted(new))
"""


def test_the_sampler_needs_torch_and_numpy_alone() -> None:
    loaded = subprocess.run(
        [sys.executable, "-c", ASKED], capture_output=True, text=True, check=True
    ).stdout.split()
    others = {name for name in loaded if not name.startswith("_sysconfigdata")}  # the stdlib's
    assert others <= {"distcl", "torch", "torchgen", "numpy"}
