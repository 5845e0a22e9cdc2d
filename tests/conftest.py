"""Settings that all tests share."""

import os

from hypothesis import settings

os.environ.setdefault("OMP_NUM_THREADS", "1")  # small tensors, and as many processes as cores

settings.register_profile("distcl", deadline=None)  # a busy machine is not a failure
settings.load_profile("distcl")
