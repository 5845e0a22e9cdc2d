"""``distcl bench``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from distcl.bench import BENCHMARKS, chosen, run
from distcl.bench.rows import Row

_HELP = "; ".join(f"{name}: {text}" for name, text in BENCHMARKS.items())


def bench(
    names: Annotated[list[str], typer.Argument(metavar="NAME…", help=f"all, or {_HELP}.")],
    to: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the rows as JSON.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Small sizes: seconds, rough.")] = False,
) -> None:
    """Measure what distcl does beside what else would do it, and against its targets."""
    console = Console()
    rows: list[Row] = []
    for name in chosen(names):
        table = _table(name)
        for row in run(name, quick):
            rows.append(row)
            table.add_row(*_cells(row))
        console.print(table)
        if to is not None:
            text = json.dumps([row.as_object() for row in rows], indent=1)
            to.write_text(text + "\n", encoding="utf-8")


def _table(name: str) -> Table:
    table = Table(title=f"{name}: {BENCHMARKS[name]}", title_justify="left")
    table.add_column("what", overflow="fold")
    for column in ("ours", "theirs", "ratio", "target", "of limit"):
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _cells(row: Row) -> list[str]:
    mark = {True: "[green]", False: "[red]", None: ""}[row.passed]
    ratio = "" if row.ratio is None else f"{mark}{row.ratio:.3g}"
    share = "" if row.of_limit is None else f"{row.of_limit:.0%}"
    return [
        f"{row.name} [dim]({row.note})" if row.note else row.name,
        _amount(row.ours, row.unit),
        _amount(row.theirs, row.unit),
        ratio,
        row.goal or "",
        share,
    ]


def _amount(value: float | None, unit: str) -> str:
    if value is None:
        return ""
    if unit == "s":
        return f"{value:.3g} s" if value >= 1 else f"{1e3 * value:.3g} ms"
    if unit == "bytes":
        return f"{value / 2**20:,.1f} MiB" if value >= 2**20 else f"{value:.3g} B"
    return f"{value:,.0f}{unit.removeprefix('samples')}"
