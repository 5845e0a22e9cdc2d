"""How a model and its optimizer are spread over ranks: one module a strategy."""

from __future__ import annotations

from distcl.config import ParallelConfig, RunConfig, TrainingConfig
from distcl.parallel.strategy import MakeOptimizer, Strategy

__all__ = ["MakeOptimizer", "Strategy", "create_strategy"]


def create_strategy(run: RunConfig, parallel: ParallelConfig, training: TrainingConfig) -> Strategy:
    """Return the strategy of ``parallel.strategy``; it joins the process group. Collective.

    Raises UsageError or ConfigError if it is not installed, or if a launcher or a DeepSpeed file
    asks for something else.
    """
    if parallel.strategy == "ddp":
        from distcl.parallel.ddp import DDP

        return DDP(run, parallel)
    if parallel.strategy == "fsdp2":
        from distcl.parallel.fsdp2 import FSDP2

        return FSDP2(run, parallel)
    from distcl.parallel.zero import Zero

    return Zero(run, parallel, training)


# Who owns which slice of the weights, one module per layout.
