"""Commands that train or watch."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from rich.console import Console

from distcl.cli.common import (
    AllowChanged,
    ConfigArgument,
    ConfigOption,
    Json,
    Out,
    Overrides,
    Overwrite,
    Quiet,
    Resume,
    complain,
    launch_rank,
    one_config,
)
from distcl.config.load import load_with_origins
from distcl.errors import UsageError

Command = Literal["run", "train", "detect"]


def _command(command: Command, does: str) -> Callable[..., None]:
    """Return a command of the command line; ``does``: what it says of itself."""

    def execute(
        config: ConfigArgument = None,
        file: ConfigOption = None,
        sets: Overrides = None,
        out: Out = None,
        resume: Resume = "never",
        allow_changed: AllowChanged = None,
        overwrite: Overwrite = False,
        quiet: Quiet = False,
        as_json: Json = False,
    ) -> None:
        path = one_config(config, file)
        if path is None:
            raise UsageError(f"distcl {command} needs a CONFIG; 'distcl init' writes one")
        _execute(command, path, sets, out, resume, allow_changed, overwrite, quiet, as_json)

    execute.__doc__ = does
    return execute


COMMANDS = {
    "run": _command(
        "run", "Watch the stream and start a round of training whenever drift is detected."
    ),
    "train": _command("train", "Train one round per experience, without a detector."),
    "detect": _command("detect", "Watch the stream and report drift, without rounds of training."),
}


def _execute(
    command: Command,
    path: Path,
    sets: list[str] | None,
    out: Path | None,
    resume: str,
    allow_changed: list[str] | None,
    overwrite: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    config, _ = load_with_origins(path, sets or [])
    folder = out or Path(config.run.out or f"runs/{path.stem}")
    numbered = not (out or config.run.out)
    config = config.model_copy(update={"run": config.run.model_copy(update={"out": str(folder)})})

    from distcl import job
    from distcl.cli.display import open_display, show_summary

    console = Console(stderr=as_json)
    display = None if quiet or launch_rank() else open_display(console)

    def tell(message: str) -> None:
        if display is not None:
            display.close()
        complain(message)

    try:
        summary = job.execute(
            command,
            config,
            folder,
            display,
            tell,
            resume,
            allow_changed or [],
            overwrite,
            numbered,
        )
    finally:
        if display is not None:
            display.close()
    if launch_rank() == 0:
        if as_json:
            print(json.dumps(summary, indent=2))
        elif not quiet:
            show_summary(console, summary)
            console.print(f"everything is in {summary['folder']}", markup=False, highlight=False)
