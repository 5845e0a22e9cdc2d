"""Measurements of distcl beside the alternative, in one run: ``distcl bench NAME…``.

A benchmark is a module with ``measure(quick) -> list[Row]``, named in ``BENCHMARKS``.
"""

from __future__ import annotations

from importlib import import_module

from distcl.bench.rows import Row
from distcl.errors import UsageError
from distcl.registry import nearest

BENCHMARKS = {
    "anchor": "theta_star as owned slices against a full replica: memory, refresh, swaps",
    "shards": "reading shards: the archive itself, the webdataset library, and distcl",
}


def measure(names: list[str], quick: bool) -> list[Row]:
    """Run benchmarks by name, ``all`` for every one, and return their rows in order.

    ``quick``: smaller sizes, for a look in a minute. Raises UsageError for an unknown name or a
    library that is not installed.
    """
    for name in names:
        if name not in {*BENCHMARKS, "all"}:
            known = ", ".join(BENCHMARKS)
            raise UsageError(
                f"unknown benchmark '{name}'{nearest(name, BENCHMARKS)}; known: {known}, all"
            )
    chosen = BENCHMARKS if "all" in names else dict.fromkeys(names)
    rows: list[Row] = []
    for name in chosen:
        rows += import_module(f"distcl.bench.{name}").measure(quick)
    return rows
