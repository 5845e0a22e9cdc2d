"""What ranks under DeepSpeed import first; see ``tests.spawn.preload``."""

from distcl.errors import UsageError
from distcl.strategies.zero import load_deepspeed

try:
    load_deepspeed()
    from transformers.integrations import HfDeepSpeedConfig  # noqa: F401
except (UsageError, ImportError):
    pass
