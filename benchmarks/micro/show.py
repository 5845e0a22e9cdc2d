"""What ``distcl bench`` prints and writes."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from benchmarks.micro import chosen, measure
from benchmarks.micro.rows import Row

_PIPED = 160  # columns, where there is no terminal


def show(names: Sequence[str], quick: bool, file: Path | None) -> None:
    """Measure what is named, print a table of each, and write all rows to ``file``, as JSON."""
    terminal = Console()
    console = Console(width=None if terminal.is_terminal else _PIPED)
    rows: list[Row] = []
    for name in chosen(names):
        begun = time.perf_counter()
        found = measure(name, quick)
        console.print(_table(found), f"{name}: {time.perf_counter() - begun:.0f} s\n")
        rows += found
        if file is not None:
            text = json.dumps([row.as_json() for row in rows], indent=1)
            file.write_text(text + "\n", encoding="utf-8")


def _table(rows: Sequence[Row]) -> Table:
    table = Table(box=None, pad_edge=False)
    for title in ("", "ours", "theirs", "", "ratio", "target", "", "of limit"):
        table.add_column(title, justify="left" if title == "" else "right")
    for row in rows:
        verdict = {True: "reached", False: "MISSED", None: ""}[row.passed]
        figures = [
            "" if value is None else format(value, form)
            for value, form in (
                (row.ours, ",.4g"),
                (row.theirs, ",.4g"),
                (row.ratio, ".3f"),
                (row.of_limit, ".0%"),
            )
        ]
        ours, theirs, ratio, share = figures
        table.add_row(escape(row.name), ours, theirs, row.unit, ratio, row.target, verdict, share)
    return table
