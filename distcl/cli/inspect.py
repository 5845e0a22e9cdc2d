"""Commands that look at what runs left behind."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import typer

from distcl.cli.common import Json, Overrides, Quiet, complain, launch_rank, named_stream, say
from distcl.config.paths import expanded
from distcl.errors import UsageError
from distcl.reporting.figures import words_of
from distcl.reporting.run_folder import protect


def evaluate_run(
    path: Annotated[Path, typer.Argument(metavar="RUN_OR_CHECKPOINT", parser=expanded)],
    as_json: Json = False,
) -> None:
    """Evaluate a run's weights, or a checkpoint's, on every experience of its stream."""
    from distcl.checkpoint.export import evaluate

    result = evaluate(path, complain if launch_rank() == 0 else lambda text: None)
    if as_json:
        say(json.dumps(result, indent=2))
        return
    for metric, row in {result["metric"]: result["accuracy"], **result["scores"]}.items():
        say(f"{words_of(metric).name} of {result['weights']}")
        for k, value in enumerate(row):
            say(f"  experience {k + 1}  {value:.4f}")
        say(f"  average       {sum(row) / len(row):.4f}")


def predict(
    path: Annotated[Path, typer.Argument(metavar="RUN_OR_CHECKPOINT", parser=expanded)],
    out: Annotated[
        Path,
        typer.Option(
            "--out", metavar="FILE", help="The file to write, .npz or .parquet.", parser=expanded
        ),
    ],
    data: Annotated[
        str,
        typer.Option(
            "--data",
            metavar="SOURCE",
            help="Other data than the run's: a config (.toml), or the name of a source, configured "
            "with --set stream.KEY=VALUE.",
            show_default=False,
        ),
    ] = "",
    sets: Overrides = None,
    what: Annotated[
        Literal["logits", "probs", "labels", "embedding"],
        typer.Option(
            help="Outputs as they are, probabilities of the classes, classes, or the input of the "
            "linear layer that runs last."
        ),
    ] = "logits",
    quiet: Quiet = False,
) -> None:
    """Write what a run's weights, or a checkpoint's, say of every held-out sample, in a file.

    Its arrays, or columns: ids, experience (from 1), outputs, and y.
    """
    if sets and not data:
        raise UsageError("--set describes --data SOURCE, which is not given")
    stream = named_stream(data, sets or []) if data else None
    if data and stream is None:
        raise UsageError(
            f"--data '{data}' is neither a config (.toml) nor a source; an .npz is --data arrays "
            "--set stream.path=FILE"
        )
    protect(out)
    from distcl.checkpoint.predictions import write_predictions

    warn = complain if launch_rank() == 0 else lambda text: None
    rows, weights = write_predictions(path, out, what, stream, warn)
    if not quiet:
        say(f"{out}: {what} of {rows:,} samples, by {weights}")


checkpoint = typer.Typer(help="Look at, verify and export checkpoints.")
CheckpointArgument = Annotated[
    Path, typer.Argument(metavar="PATH", help="A checkpoint, or a run folder.", parser=expanded)
]


@checkpoint.command("inspect")
def inspect_checkpoint(path: CheckpointArgument) -> None:
    """Say what a checkpoint, or the newest of a run, holds."""
    from distcl.checkpoint.export import describe_checkpoint

    for key, value in describe_checkpoint(path).items():
        if isinstance(value, dict):
            for name, size in value.items():
                say(f"{name:<24} {size:,} bytes")
        else:
            say(f"{key:<24} {value}")


@checkpoint.command("verify")
def verify_checkpoint(path: CheckpointArgument) -> None:
    """Check every file of a checkpoint, or of all of a run; exit 5 if one does not match."""
    from distcl.checkpoint.export import verify_all

    for checked, files in verify_all(path).items():
        say(f"{checked}: {files} files are as they were written")


@checkpoint.command("export")
def export_checkpoint(
    path: CheckpointArgument,
    to: Annotated[
        Path, typer.Option("--to", metavar="DIR", help="Where to write.", parser=expanded)
    ] = Path("export"),
) -> None:
    """Write the weights as one safetensors file and config.toml, readable without distcl.

    Of a model with adapters it is a folder that peft loads.
    """
    from distcl.checkpoint.export import export

    protect(to / "config.toml")
    for file in export(path, to, complain):
        say(f"wrote {file}")


def report(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN…", help="Run folders.", parser=expanded)
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="FILE",
            help="Default: report.html, of one run in its folder.",
            parser=expanded,
        ),
    ] = None,
    png: Annotated[
        Path | None,
        typer.Option(
            "--png", metavar="DIR", help="Write each plot as a PNG file, too.", parser=expanded
        ),
    ] = None,
) -> None:
    """Write report.html: what a run kept and forgot, or how several compare. No network."""
    from distcl.reporting.page import write_report

    if launch_rank() != 0:
        return
    file = out or (runs[0] if len(runs) == 1 else Path()) / "report.html"
    protect(file)
    pictures = write_report(runs, file, png)
    say(f"wrote {file}" + (f" and {len(pictures)} PNG files in {png}" if png else ""))


def status(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.", parser=expanded)],
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
) -> None:
    """Say how far a run is: its state, last round, rate and time left."""
    from distcl.reporting.status import read_status

    found = read_status(folder)
    say(json.dumps(asdict(found), indent=2) if as_json else str(found))
