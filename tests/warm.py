"""What ranks under DeepSpeed import first; see ``tests.spawn.preload``."""

import contextlib
from pathlib import Path

from distcl.errors import UsageError
from distcl.parallel.zero import load_deepspeed

with contextlib.suppress(UsageError):
    if not Path("/dev/nvidia0").exists():  # else it would touch CUDA before the ranks fork
        load_deepspeed()
