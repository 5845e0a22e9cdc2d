"""Commands that train or watch."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Literal

from rich.console import Console

from distcl import api
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
    needed_config,
)

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
        path = needed_config(command, config, file)

        from distcl.cli.display import open_display, show_summary

        console = Console(stderr=as_json)
        display = None if quiet or launch_rank() else open_display(console)

        def tell(message: str) -> None:
            if display is not None:
                display.close()
            complain(message)

        try:
            summary = api.start(
                command,
                path,
                out,
                resume,
                sets or [],
                allow_changed=allow_changed or [],
                overwrite=overwrite,
                progress=display,
                tell=tell,
            )
        finally:
            if display is not None:
                display.close()
        if launch_rank() == 0:
            if as_json:
                print(json.dumps(summary, indent=2))
            elif not quiet:
                show_summary(console, summary)
                where = f"everything is in {summary['folder']}"
                console.print(where, markup=False, highlight=False)

    execute.__doc__ = does
    return execute


COMMANDS = {
    "run": _command(
        "run", "Watch the stream and start a round of training whenever drift is detected."
    ),
    "train": _command("train", "Train one round per experience, without a detector."),
    "detect": _command("detect", "Watch the stream and report drift, without rounds of training."),
}
