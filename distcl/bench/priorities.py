"""``distcl bench priorities``: what the scoring pass costs beside plain inference."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from distcl.bench.measure import on_ranks, seconds_of
from distcl.bench.rows import Row
from distcl.bench.setting import config_of, stream_of, trainer_of
from distcl.data.loader import iterate_chunks
from distcl.priority.cache import fingerprint
from distcl.runtime import Runtime
from distcl.updaters.base import Updater

CHUNK = 512


def bench(quick: bool) -> Iterator[Row]:
    """Score 20,000 (``quick``: 2,000) images of 28 x 28."""
    samples, repeats = (1_024, 3) if quick else (20_000, 7)
    one = on_ranks(1, f"{__name__}:measure", samples, repeats)
    yield Row(
        "scoring, history seen before",
        one["seen"],
        one["once"],
        better="less",
        target=1.05,
        limit=one["once"],
        note="against one plain inference pass over the same chunks",
    )
    yield Row(
        "scoring, new data",
        one["new"],
        one["twice"],
        better="less",
        target=1.02,
        limit=one["twice"],
        note="against two plain inference passes",
    )
    two = on_ranks(2, f"{__name__}:measure", samples, repeats)
    yield Row(
        "scoring at 2 ranks, new data",
        two["new"],
        one["new"],
        target=1.85,
        limit=one["new"] * two["once"] / one["once"],
        note="against 1 rank; limit: as plain inference scales with both cores busy",
    )


def measure(samples: int, repeats: int) -> dict[str, float]:
    """Return median seconds of passes: once and twice plain, scored seen and new. Collective."""
    torch.set_num_threads(1)
    runtime = Runtime()
    config = config_of(
        continual_learning={"importance_weighting": True},
        priority={"score_batch": CHUNK},
        stream={"drift": "none", "experiences": 1},
    )
    stream = stream_of(config, samples)
    with tempfile.TemporaryDirectory() as out:
        trainer = trainer_of(config, runtime, stream, Path(out))
    parts, ids = trainer.parts, stream.experiences[0].train
    with torch.no_grad():  # else theta_star equals the weights, and the cache would serve both
        for parameter in parts.forward.module.parameters():
            parameter.add_(1e-3)
    scorer, module = parts.scorer, parts.forward.module
    mine = parts.forward.mine(ids, CHUNK)

    def plain() -> None:
        module.eval()
        with torch.inference_mode():
            found = [
                Updater._unreduced_criterion(parts.updater, module(batch.x), batch.y)
                for batch in iterate_chunks(stream, mine, CHUNK)
            ]
            torch.cat(found).sum().item()
        module.train()
        runtime.barrier()

    def twice() -> None:
        plain()
        plain()

    def new() -> None:
        scorer.cache.clear()
        scorer.score(stream, ids)
        runtime.barrier()

    known = fingerprint(parts.anchor.theta_star, runtime)

    def seen() -> None:
        scorer.score(stream, ids)
        runtime.barrier()

    scorer.cache.put(known, ids, torch.zeros(len(ids)))
    once, fast = seconds_of(plain, seen, repeats=repeats)
    double, full = seconds_of(twice, new, repeats=repeats)
    runtime.close()
    return {"once": once, "twice": double, "seen": fast, "new": full}
