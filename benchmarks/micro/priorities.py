"""What the scoring pass costs beside plain inference over the same chunks."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from benchmarks.micro.measure import CPU, on_ranks, seconds_of
from benchmarks.micro.rows import Row, compared, times_faster
from benchmarks.micro.setting import config_of, stream_of, trainer_of
from distcl.data.loader import iterate_chunks
from distcl.distributed.runtime import Runtime
from distcl.priority.loss_cache import weights_checksum
from distcl.types import Ids

CHUNK = 512
PASSES = "benchmarks.micro.priorities:passes"


def measure(quick: bool) -> list[Row]:
    """Score 2,048 images, 8 (``quick``: 5) times: many short turns, since noise is slow."""
    samples, repeats = 2_048, 5 if quick else 8
    one, two = (on_ranks(ranks, PASSES, samples, repeats) for ranks in (1, 2))
    unit = "CPU s, of one plain inference pass"
    rows = [
        compared(
            "scoring, seen before", one["seen"], one["once"], unit, "<= 1.05", 1.0, one["once"]
        )
    ]
    unit = "CPU s, of two plain inference passes"
    rows.append(
        compared("scoring, new data", one["new"], one["twice"], unit, "<= 1.02", 1.0, one["twice"])
    )
    # both cores busy are slower than one alone: plain inference, shared out, shows by how much
    unit = "s, of 1 rank (two plain passes, the other rank idle)"
    rows.append(
        times_faster("scoring at 2 ranks", two["new"], two["alone"], unit, ">= 1.85", two["twice"])
    )
    return rows


def passes(samples: int, repeats: int) -> dict[str, float]:
    """Return median seconds: one and two plain passes, and scoring of seen and new data.

    Plain passes read the same chunks, each rank its own; ``alone``: rank 0 all of them, twice. On
    one rank these are seconds of the process. Collective.
    """
    runtime = Runtime()
    config = config_of(
        continual_learning={"importance_weighting": True},
        priority={"score_batch": CHUNK},
        stream={"drift": "none", "experiences": 1},
    )
    stream = stream_of(config, samples)
    with tempfile.TemporaryDirectory() as out:
        parts = trainer_of(config, runtime, stream, Path(out)).parts
    ids, scorer, module = stream.experiences[0].train, parts.scorer, parts.forward.module
    with torch.no_grad():  # theta_star is to differ from the weights
        for parameter in module.parameters():
            parameter.add_(1e-3)
    mine = parts.forward.mine(ids, CHUNK)

    def plain(what: Ids) -> None:
        module.eval()
        with torch.inference_mode():
            found = [
                parts.forward.criterion(module(batch.x), batch.y)
                for batch in iterate_chunks(stream, what, CHUNK)
            ]
            torch.cat([torch.zeros(1), *found]).sum().item()
        module.train()

    def once() -> None:
        plain(mine)
        runtime.barrier()

    def twice() -> None:
        once()
        once()

    def alone() -> None:
        for _ in range(2):
            plain(ids if runtime.is_main else ids[:0])
        runtime.barrier()

    def seen() -> None:
        scorer.score(stream, ids)
        runtime.barrier()

    def new() -> None:
        scorer.cache.clear()
        seen()

    scorer.cache.put(
        weights_checksum(parts.anchor.theta_star, parts.forward.partition, runtime),
        ids,
        torch.zeros(len(ids)),
    )
    found: dict[str, float] = {}
    if runtime.world_size == 1:
        pair = seconds_of(once, seen, repeats=repeats, clock=CPU)  # before the cache is cleared
        found["once"], found["seen"] = pair
        found["twice"], found["new"] = seconds_of(twice, new, repeats=repeats, clock=CPU)
    else:
        three = seconds_of(twice, new, alone, repeats=repeats)
        found = dict(zip(("twice", "new", "alone"), three, strict=True))
    runtime.close()
    return found
