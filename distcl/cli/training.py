"""Commands that train or watch."""

from __future__ import annotations

import json
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


def run_command(
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
    """Watch the stream and start a round of training whenever drift is detected."""
    _execute("run", config, file, sets, out, resume, allow_changed, overwrite, quiet, as_json)


def train_command(
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
    """Train one round per experience, without a detector."""
    _execute("train", config, file, sets, out, resume, allow_changed, overwrite, quiet, as_json)


def detect_command(
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
    """Watch the stream and report drift, without rounds of training."""
    _execute("detect", config, file, sets, out, resume, allow_changed, overwrite, quiet, as_json)


def _execute(
    command: Literal["run", "train", "detect"],
    argument: Path | None,
    option: Path | None,
    sets: list[str] | None,
    out: Path | None,
    resume: str,
    allow_changed: list[str] | None,
    overwrite: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    path = one_config(argument, option)
    if path is None:
        raise UsageError(f"distcl {command} needs a CONFIG; 'distcl init' writes one")
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
