"""``distcl bench``: finds ``benchmarks/micro`` of the checkout that this package is in."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from distcl.cli.common import launch_rank, say
from distcl.errors import UsageError

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
    if not (_CHECKOUT / "benchmarks" / "micro").is_dir():
        raise UsageError(
            f"distcl bench needs a checkout of the repository: beside '{_CHECKOUT / 'distcl'}' "
            "there is no folder benchmarks/micro"
        )
    sys.path.insert(0, str(_CHECKOUT))
    micro: Any = importlib.import_module("benchmarks.micro")
    if not names:
        for name, description in micro.BENCHMARKS.items():
            say(f"{name:<10} {description}")
        return
    if file is not None and not file.parent.is_dir():
        raise UsageError(f"--json {file}: the folder '{file.parent}' does not exist")
    importlib.import_module("benchmarks.micro.show").show(names, quick, file)
