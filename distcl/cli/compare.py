"""``distcl compare``: several variants of a configuration over the same seeds, and a verdict."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from distcl.cli.common import ConfigArgument, ConfigOption, Overrides, Quiet, needed_config, say
from distcl.config.load import load_config
from distcl.config.paths import expanded
from distcl.errors import UsageError

AS_GIVEN = "as given"
"""Name of the configuration without any ``--vs``."""

_SHOWN = ("average_accuracy", "average_forgetting")  # on a terminal; the page has every figure


def compare(
    config: ConfigArgument = None,
    file: ConfigOption = None,
    vs: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME:] SECTION.KEY=VALUE[; …]",
            help="A variant: the keys in which it differs, and what it is called. Repeatable.",
            show_default=False,
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Pairs of runs.")] = 10,
    first_seed: Annotated[int, typer.Option(min=0, help="Seeds go up from here.")] = 0,
    equal: Annotated[
        Literal["compute", "steps", "samples"],
        typer.Option(
            help="What all variants spend alike: compute (a forward of a sample is 1, forward and "
            "backward 3, scoring included), steps, or samples trained on. Who needs less of it "
            "gets more steps."
        ),
    ] = "compute",
    command: Annotated[
        Literal["train", "run"], typer.Option(help="train: one round per experience; run: on drift")
    ] = "train",
    jobs: Annotated[
        int, typer.Option(min=0, help="Runs at a time; 0: as cores or GPUs allow.")
    ] = 0,
    sets: Overrides = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Its folder. Default: runs/NAME-OF-CONFIG-compare, then -2, -3, ….",
            parser=expanded,
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace runs of another configuration there.")
    ] = False,
    quiet: Quiet = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the result as JSON, and nothing else, on stdout.")
    ] = False,
) -> None:
    """Say which variant learns better at equal cost: paired seeds, intervals, a verdict.

    Interrupted, the same command goes on. The result is in DIR/compare.json and DIR/report.html.
    """
    path = needed_config("compare", config, file)
    if not vs:
        raise UsageError("distcl compare needs a variant, --vs SECTION.KEY=VALUE")

    from distcl.reporting import comparison as comparing
    from distcl.reporting.page import write_comparison
    from distcl.reporting.verdict import as_json as plain
    from distcl.reporting.verdict import conclude, difference_table, table, write_json

    variants = [comparing.Variant(AS_GIVEN), *map(comparing.parse_variant, vs)]
    called = [variant.name for variant in dict.fromkeys(variants)]
    for name in called:
        if called.count(name) > 1:
            raise UsageError(f"--vs: two variants are called '{name}'")
    overrides = tuple(sets or [])
    for variant in variants:  # refuse it here, not in the middle
        load_config(path, [*overrides, *variant.overrides])
    plan = comparing.Plan(
        config=path,
        variants=tuple(dict.fromkeys(variants)),
        seeds=tuple(range(first_seed, first_seed + seeds)),
        out=out or Path(f"runs/{path.stem}-compare"),
        overrides=overrides,
        command=command,
        equal=equal,
        jobs=jobs,
        overwrite=overwrite,
    )
    if out is None and not overwrite:
        plan = comparing.with_folder(plan)

    def tell(text: str) -> None:
        if not quiet:
            print(text, file=sys.stderr if as_json else sys.stdout, flush=True)

    result = conclude(plan, comparing.run_plan(plan, tell))
    write_json(result, plan.out / "compare.json")
    write_comparison(result, plan.out / "report.html")
    if as_json:
        say(json.dumps(plain(result), indent=2, allow_nan=False))
        return
    if not quiet:
        names = {arm.variant.name: _letter(k) for k, arm in enumerate(result.arms)}
        print()
        for name, letter in names.items():
            print(f"{letter}  {name}")
        _print(*table(result.groups, _SHOWN), names)
        _print(*difference_table(result), names)
    say(result.verdict)
    tell(f"everything is in {plan.out}")


def _letter(k: int) -> str:
    return chr(ord("A") + k) if k < 26 else f"V{k + 1}"


def _print(header: list[str], rows: list[list[str]], names: dict[str, str]) -> None:
    """Print a table; its first column, names of variants, by their letters."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    shown = Table(box=box.SIMPLE_HEAD, padding=(0, 1))
    for k, name in enumerate(header):
        shown.add_column(name, justify="right" if k else "left")
    for name, *cells in rows:
        shown.add_row(names[name], *cells)
    Console().print(shown, markup=False, highlight=False)
