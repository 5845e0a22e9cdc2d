"""Measurements of distcl beside the alternative, in one run: ``distcl bench NAME…``.

A benchmark is a module with ``measure(quick) -> list[Row]``, named in ``BENCHMARKS``.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from benchmarks.micro.rows import Row, skipped
from distcl.errors import UsageError
from distcl.registry import nearest

ROOT = Path(__file__).parents[2]
"""The checkout. Processes that import benchmarks start there."""
BENCHMARKS = {
    "priorities": "the scoring pass against plain inference, on one rank and two",
    "sampler": "drawing an epoch by weights against torch's WeightedRandomSampler",
    "anchor": "theta_star as owned slices against a full replica: memory, refresh, swaps",
    "shards": "reading shards: the archive itself, the webdataset library, and distcl",
    "overhead": "a training step, methods, a round and start-up against the plainest code",
    "recipe": "steps of the recommended recipe against the same with uniform replay",
    "lm": "steps and scoring of language models against torch and transformers",
    "scaling": "training on two ranks against one",
    "cost": "a cost model of a round against measurements, and what it says of 1,024 ranks",
    "peers": "a drift job against the published loop, written out plainly",
}


def chosen(names: Sequence[str]) -> list[str]:
    """Return the benchmarks that are meant, each once; ``all`` is every one.

    Raises UsageError for an unknown name.
    """
    for name in names:
        if name not in {*BENCHMARKS, "all"}:
            known = ", ".join(BENCHMARKS)
            raise UsageError(
                f"unknown benchmark '{name}'{nearest(name, BENCHMARKS)}; known: {known}, all"
            )
    return list(BENCHMARKS if "all" in names else dict.fromkeys(names))


def measure(name: str, quick: bool) -> list[Row]:
    """Run one benchmark and return its rows. ``quick``: smaller sizes, for a look in a minute.

    Where a library or data that it needs are not there, the row says so.
    """
    try:
        rows: list[Row] = import_module(f"benchmarks.micro.{name}").measure(quick)
    except UsageError as error:
        return [skipped(name, str(error))]
    return rows
