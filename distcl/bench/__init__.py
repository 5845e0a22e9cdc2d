"""Benchmarks: what distcl does beside what else would do it, in one run on one machine.

A benchmark is a function ``(quick: bool) -> Iterator[Row]`` and a line in ``BENCHMARKS``.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable, Iterator, Sequence

from distcl.bench.rows import Row
from distcl.errors import UsageError

BENCHMARKS: dict[str, str] = {
    "priorities": "the scoring pass against plain inference, and its scaling",
    "sampler": "drawing an epoch against torch's WeightedRandomSampler: time and memory",
    "anchor": "theta_star as owned slices against a full replica: time and memory",
    "overhead": "a training step against a bare PyTorch loop; methods; rounds; start-up",
    "shards": "reading shards against the tar itself and the webdataset library",
    "scaling": "training on two ranks against one",
}
"""name -> one line; each is ``distcl.bench.NAME.bench``."""


def chosen(names: Sequence[str]) -> list[str]:
    """Return the benchmarks meant by ``names``, each once; ``all`` means every one.

    Raises UsageError for a name that there is not.
    """
    for name in names:
        if name != "all" and name not in BENCHMARKS:
            near = difflib.get_close_matches(name, [*BENCHMARKS, "all"], 1)
            hint = f"; did you mean '{near[0]}'?" if near else ""
            raise UsageError(f"no benchmark '{name}'{hint}. Known: {', '.join(BENCHMARKS)}, all")
    return [name for name in BENCHMARKS if name in names or "all" in names]


def run(name: str, quick: bool) -> Iterator[Row]:
    """Run one benchmark and yield its rows as they are measured. ``quick``: small, in seconds."""
    module = importlib.import_module(f"distcl.bench.{name}")
    bench: Callable[[bool], Iterator[Row]] = module.bench
    yield from bench(quick)
