"""``distcl bench``."""

from __future__ import annotations

import importlib
import json
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from distcl.cli.common import launch_rank, say
from distcl.errors import UsageError

_PIPED = 160  # columns, where there is no terminal
_CHECKOUT = Path(__file__).resolve().parents[2]


def bench(
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="NAME…", help="all, or some of those that it lists without one."),
    ] = None,
    file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the figures, too.")
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Small sizes: a look in a minute.")
    ] = False,
) -> None:
    """Measure parts of distcl on this machine, the alternative beside each in the same run."""
    if launch_rank() != 0:
        return
    micro = _benchmarks()
    if not names:
        for name, description in micro.BENCHMARKS.items():
            say(f"{name:<10} {description}")
        return
    if file is not None and not file.parent.is_dir():
        raise UsageError(f"--json {file}: the folder '{file.parent}' does not exist")
    terminal = Console()
    console = Console(width=None if terminal.is_terminal else _PIPED)
    rows: list[Any] = []
    for name in micro.chosen(names):
        begun = time.perf_counter()
        found = micro.measure(name, quick)
        console.print(_table(found), f"{name}: {time.perf_counter() - begun:.0f} s\n")
        rows += found
        if file is not None:
            text = json.dumps([row.as_json() for row in rows], indent=1)
            file.write_text(text + "\n", encoding="utf-8")


def _benchmarks() -> Any:
    """Import ``benchmarks.micro`` of the checkout that this package is in."""
    if not (_CHECKOUT / "benchmarks" / "micro").is_dir():
        raise UsageError(
            f"distcl bench needs a checkout of the repository: beside '{_CHECKOUT / 'distcl'}' "
            "there is no folder benchmarks/micro"
        )
    sys.path.insert(0, str(_CHECKOUT))
    return importlib.import_module("benchmarks.micro")


def _table(rows: list[Any]) -> Table:
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
