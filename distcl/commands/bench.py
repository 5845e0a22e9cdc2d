"""``distcl bench``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from distcl.commands.common import launch_rank, say
from distcl.errors import UsageError

_PIPED = 160  # columns, where there is no terminal


def bench(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="NAME…", help="anchor, shards, or all.")
    ] = None,
    file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the figures, too.")
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Small sizes: a look in a minute.")
    ] = False,
) -> None:
    """Measure parts of distcl on this machine, the alternative beside each in the same run."""
    from distcl.bench import BENCHMARKS, measure

    if launch_rank() != 0:
        return
    if not names:
        for name, description in BENCHMARKS.items():
            say(f"{name:<8} {description}")
        return
    if file is not None and not file.parent.is_dir():
        raise UsageError(f"--json {file}: the folder '{file.parent}' does not exist")
    rows = measure(names, quick)
    table = Table(box=None, pad_edge=False)
    for title in ("", "ours", "theirs", "", "ratio", "target", ""):
        table.add_column(title, justify="left" if title == "" else "right")
    for row in rows:
        verdict = {True: "reached", False: "MISSED", None: ""}[row.passed]
        theirs = "" if row.theirs is None else f"{row.theirs:,.4g}"
        table.add_row(
            row.name, f"{row.ours:,.4g}", theirs, row.unit, f"{row.ratio:.3f}", row.target, verdict
        )
    console = Console()
    Console(width=None if console.is_terminal else _PIPED).print(table)
    if file is not None:
        file.write_text(json.dumps([r.as_json() for r in rows], indent=1) + "\n", encoding="utf-8")
