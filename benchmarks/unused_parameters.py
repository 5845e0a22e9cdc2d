"""What it costs a step under ddp to look for unused parameters, and a start to settle its buckets.

    python benchmarks/unused_parameters.py [--ranks 3] [--turns 12]

Perceptrons of several sizes, a batch of 32, gloo; with the search and without, in turns. Prints,
for each, the CPU milliseconds of rank 0 for a step (median over turns) and of the settling.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from tests.spawn import run_ranks

SIZES = ((64, 3, 30), (256, 20, 10), (1024, 6, 3))
"""Width, layers, steps of a turn."""


def measure(width: int, depth: int, steps: int, turns: int) -> dict[str, float]:
    """Return milliseconds by what they are of. Collective."""
    import torch
    from torch import nn

    from distcl.config import ParallelConfig, RunConfig
    from distcl.distributed.runtime import Runtime

    x, made, taken = torch.randn(32, width), {}, {}
    runtime = Runtime(RunConfig())
    for search in (False, True):
        runtime.strategy.parallel = ParallelConfig(find_unused_parameters=search)
        layers = [m for _ in range(depth) for m in (nn.Linear(width, width), nn.ReLU())]
        made[search] = runtime.prepare_training(
            nn.Sequential(*layers), lambda params: torch.optim.SGD(params, lr=0.01)
        )
        begun = time.process_time()
        runtime.strategy.settle(made[search][0], x[:2])
        taken[search], taken[f"settle {search}"] = [], [time.process_time() - begun]
    for search, (model, optimizer) in [*made.items()] * turns:
        begun = time.process_time()
        for _ in range(steps):
            runtime.strategy.backward(model(x).square().mean())
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        taken[search].append((time.process_time() - begun) / steps)
    return {str(key): 1000 * statistics.median(seconds) for key, seconds in taken.items()}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=3)
    parser.add_argument("--turns", type=int, default=12)
    options = parser.parse_args()
    for width, depth, steps in SIZES:
        found = run_ranks(options.ranks, measure, width, depth, steps, options.turns, timeout=600)[
            0
        ]
        print(
            f"{options.ranks} ranks, {depth} layers of {width}: a step {found['False']:.2f} ms, "
            f"with the search {found['True']:.2f} ms; settling {found['settle False']:.2f} ms"
        )


if __name__ == "__main__":
    main()
