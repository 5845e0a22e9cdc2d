"""What commands share: options of the same meaning, and how they print."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from distcl import registry
from distcl.config import StreamConfig
from distcl.config.load import load_config
from distcl.config.paths import expanded, reachable
from distcl.distributed.environment import rank_of
from distcl.errors import UsageError

ConfigArgument = Annotated[
    Path | None,
    typer.Argument(metavar="CONFIG", help="A TOML file.", show_default=False, parser=expanded),
]
ConfigOption = Annotated[
    Path | None,
    typer.Option("--config", metavar="FILE", help="The same as CONFIG.", parser=expanded),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="SECTION.KEY=VALUE",
        help="Set one key; a TOML value, else a bare string. Repeatable.",
        show_default=False,
    ),
]
Out = Annotated[
    Path | None,
    typer.Option(
        "--out",
        metavar="DIR",
        help="The run folder. Default: runs/NAME-OF-CONFIG, then -2, -3, …; the last of them with "
        "--resume auto.",
        parser=expanded,
    ),
]
Resume = Annotated[
    str,
    typer.Option(
        "--resume",
        metavar="auto|PATH|never",
        help="auto: go on from the newest good checkpoint in the run folder, if any; never: begin "
        "anew, in a folder that holds no run.",
    ),
]
AllowChanged = Annotated[
    list[str] | None,
    typer.Option(
        "--allow-changed",
        metavar="SECTION.KEY",
        help="Resume although this key, or data, differs from the checkpoint's. Repeatable.",
        show_default=False,
    ),
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace the run that the folder holds.")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")]
Json = Annotated[
    bool, typer.Option("--json", help="Print the summary as JSON, and nothing else, on stdout.")
]


def one_config(argument: Path | None, option: Path | None) -> Path | None:
    """Return the configuration's file, given as an argument, as an option, or not at all."""
    if argument and option and argument != option:
        raise UsageError(f"two configurations are given, {argument} and --config {option}")
    return argument or option


def needed_config(command: str, argument: Path | None, option: Path | None) -> Path:
    """Return :func:`one_config`; raises UsageError if there is none."""
    path = one_config(argument, option)
    if path is None:
        raise UsageError(f"distcl {command} needs a CONFIG; 'distcl init' writes one")
    return path


def named_stream(source: str, sets: list[str]) -> StreamConfig | None:
    """Return the stream that SOURCE names: a configuration's, or one of a registered source.

    That one has a single experience and no drift, unless ``sets`` say otherwise. None: SOURCE is
    neither.
    """
    path = reachable(source)
    if source.endswith(".toml") and not path.is_dir():
        return load_config(path, sets).stream
    named = source in {part.name for part in registry.parts("source")}
    if named and path.exists():
        raise UsageError(f"'{source}' is a source and also here as a file: ./{source} is the file")
    if named or (":" in source and not path.exists()):
        plain = ("stream.drift=none", "stream.experiences=1")
        return load_config(None, [*plain, *sets, f"stream.source={source}"]).stream
    return None


def say(text: str) -> None:
    """Print a result on stdout, by rank 0 only."""
    if launch_rank() == 0:
        print(text)


def complain(text: str) -> None:
    """Tell the user what went wrong, on stderr."""
    print(f"distcl: {text}", file=sys.stderr, flush=True)


def launch_rank(environ: Mapping[str, str] = os.environ) -> int:
    """Return this process's rank as its launcher tells it; 0 without a launcher."""
    return rank_of(environ)
