"""Commands before a run: configurations, parts, and the state of this machine."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Annotated

import typer

from distcl import registry
from distcl.cli.common import ConfigArgument, ConfigOption, Overrides, launch_rank, one_config, say
from distcl.config.load import load_with_origins, to_toml
from distcl.config.paths import expanded
from distcl.errors import UsageError


def show_config(
    config: ConfigArgument = None,
    file: ConfigOption = None,
    sets: Overrides = None,
    origins: Annotated[
        bool, typer.Option("--origins", help="Say where each value came from.")
    ] = False,
    reference: Annotated[
        bool, typer.Option("--reference", help="Print docs/CONFIG.md: every key there is.")
    ] = False,
) -> None:
    """Print the configuration in force: defaults, CONFIG, environment and --set together."""
    if reference:
        from distcl.config.reference import reference as reference_text

        say(reference_text().rstrip())
        return
    loaded, found = load_with_origins(one_config(config, file), sets or [])
    say(to_toml(loaded, found if origins else None).rstrip())


def init(
    path: Annotated[Path, typer.Argument(metavar="PATH", parser=expanded)] = Path("distcl.toml"),
    force: Annotated[bool, typer.Option("--force", help="Overwrite an existing file.")] = False,
    every: Annotated[
        bool, typer.Option("--all", help="Every key, not the common ones only.")
    ] = False,
) -> None:
    """Write a configuration: keys described, what is recommended set."""
    from distcl.config.reference import template

    if launch_rank() != 0:
        return
    try:
        with path.open("w" if force else "x", encoding="utf-8") as stream:
            stream.write(template(every))
    except FileExistsError:
        raise UsageError(f"{path} exists; --force overwrites it") from None
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror}") from None
    say(f"wrote {path}; train with: distcl run {path}")


def doctor() -> None:
    """Say what this machine can do and what is misconfigured; exit 1 if something is broken.

    Under a launcher also what the processes can do together: folder, clocks, network.
    """
    from distcl.distributed.doctor import examine, in_a_group

    findings = examine()
    if in_a_group(findings):
        from distcl.distributed.doctor import examine_group

        findings += examine_group(findings)
    for finding in findings:
        say(f"{finding.level:<8} {finding.topic:<18} {finding.text}")
    if any(finding.level == "broken" for finding in findings):
        raise typer.Exit(1)


def list_parts(
    kind: Annotated[str, typer.Argument(metavar="[KIND]", help="Parts of one kind.")] = "",
    name: Annotated[
        str, typer.Argument(metavar="[NAME]", help="One part: what it is, and its options.")
    ] = "",
) -> None:
    """Print every registered part, with a line of description."""
    kinds = registry.kinds()
    if kind and kind not in kinds:
        near = registry.nearest(kind, kinds)
        raise UsageError(f"there is no kind '{kind}'{near}; there are {', '.join(kinds)}")
    if name:
        doc = inspect.getdoc(registry.resolve(kind, name)) or ""
        say(doc.replace("``", ""))
        for option, default in registry.options_of(kind, name) if kind == "source" else ():
            say(f"  {option:<20} {default or 'must be given'}")
        return
    for each in [kind] if kind else kinds:
        say(f"{each}")
        for part in registry.parts(each):
            say(f"  {part.name:<16} {part.description}")
