"""The command line: parse, call, print. No logic of a run is here, and no import of torch."""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from time import sleep
from typing import Annotated, Any, Literal, NoReturn

import typer
from rich.console import Console

from distcl import __version__, registry
from distcl.config_load import load_with_origins, to_toml
from distcl.errors import DataError, DistclError, UsageError
from distcl.launchers import rank_of

app = typer.Typer(
    help="Distributed continual learning with prioritized sampling.",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

RANK_0_FIRST = 2.0
"""Seconds that another rank waits before it exits on an error: a launcher ends all processes as
soon as one is gone, and rank 0 must have told why."""

_PARSER_ERROR: Any = typer.BadParameter.__mro__[1]  # typer's UsageError, which it does not export

ConfigArgument = Annotated[
    Path | None, typer.Argument(metavar="CONFIG", help="A TOML file.", show_default=False)
]
ConfigOption = Annotated[
    Path | None, typer.Option("--config", metavar="FILE", help="The same as CONFIG.")
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
    typer.Option("--out", metavar="DIR", help="The run folder. Default: runs/NAME-OF-CONFIG."),
]
Resume = Annotated[
    str,
    typer.Option(
        "--resume",
        metavar="auto|PATH|never",
        help="auto: go on from the newest good checkpoint in the run folder, if any; never: begin "
        "anew and replace it.",
    ),
]
AllowChanged = Annotated[
    list[str] | None,
    typer.Option(
        "--allow-changed",
        metavar="SECTION.KEY",
        help="Resume although this key differs from the checkpoint's. Repeatable.",
        show_default=False,
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")]
Json = Annotated[
    bool, typer.Option("--json", help="Print the summary as JSON, and nothing else, on stdout.")
]
_SOURCE_HELP = (
    "An .npz, a folder of class folders of images, archives, a Hugging Face dataset on disk, a "
    "config (.toml), or the name of a source, configured with --set stream.KEY=VALUE."
)
_MOST_PROBLEMS = 20


def main() -> NoReturn:
    """Run the command line and exit. Under a launcher, only rank 0 prints."""
    try:
        code = app(standalone_mode=False)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:  # the outermost place: whatever it is becomes an exit code
        fail(error)
    sys.exit(code or 0)


def fail(error: Exception) -> NoReturn:
    """End this process on an error: rank 0 prints one or two lines, every rank its exit code.

    With DISTCL_DEBUG=1 every rank prints the traceback too.
    """
    code = 1
    if isinstance(error, DistclError):
        code, text = error.exit_code, str(error)
    elif isinstance(error, _PARSER_ERROR):
        command = error.ctx.command_path if error.ctx else "distcl"
        code, text = 2, f"{error.format_message().rstrip('.')}; see '{command} --help'"
    else:
        first = str(error).strip().partition("\n")[0]
        text = f"internal error: {type(error).__name__}: {first}\n"
        text += "set DISTCL_DEBUG=1 for the traceback"
    if os.environ.get("DISTCL_DEBUG", "") not in ("", "0"):
        traceback.print_exception(error)
    if launch_rank() == 0:
        complain(text)
    else:
        sleep(RANK_0_FIRST)
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_initialized():
        sys.stdout.flush()
        os._exit(code)  # threads of a broken process group could abort a tidy exit
    sys.exit(code)


def complain(text: str) -> None:
    """Tell the user what went wrong, on stderr."""
    print(f"distcl: {text}", file=sys.stderr, flush=True)


def launch_rank(environ: Mapping[str, str] = os.environ) -> int:
    """Return this process's rank as its launcher tells it; 0 without a launcher."""
    return rank_of(environ)


# -- commands -----------------------------------------------------------------------------------


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        say(f"distcl {__version__}")
        raise typer.Exit()
    if context.invoked_subcommand is None:
        say(context.get_help())


@app.command()
def run(
    config: ConfigArgument = None,
    file: ConfigOption = None,
    sets: Overrides = None,
    out: Out = None,
    resume: Resume = "never",
    allow_changed: AllowChanged = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Watch the stream and start a round of training whenever drift is detected."""
    _execute("run", config, file, sets, out, resume, allow_changed, quiet, as_json)


@app.command()
def train(
    config: ConfigArgument = None,
    file: ConfigOption = None,
    sets: Overrides = None,
    out: Out = None,
    resume: Resume = "never",
    allow_changed: AllowChanged = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Train one round per experience, without a detector."""
    _execute("train", config, file, sets, out, resume, allow_changed, quiet, as_json)


@app.command()
def detect(
    config: ConfigArgument = None,
    file: ConfigOption = None,
    sets: Overrides = None,
    out: Out = None,
    resume: Resume = "never",
    allow_changed: AllowChanged = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Watch the stream and report drift, without rounds of training."""
    _execute("detect", config, file, sets, out, resume, allow_changed, quiet, as_json)


@app.command("eval")
def evaluate(
    path: Annotated[Path, typer.Argument(metavar="RUN_OR_CHECKPOINT")],
    as_json: Json = False,
) -> None:
    """Evaluate a run's weights, or a checkpoint's, on every experience of its stream."""
    from distcl.artifacts import evaluate as evaluate_weights

    result = evaluate_weights(path)
    if as_json:
        say(json.dumps(result, indent=2))
        return
    say(f"{result['metric']} of {result['weights']}")
    for k, value in enumerate(result["accuracy"]):
        say(f"  experience {k}  {value:.4f}")
    say(f"  average       {result['average_accuracy']:.4f}")


checkpoint = typer.Typer(help="Look at, verify and export checkpoints.")
app.add_typer(checkpoint, name="checkpoint")
CheckpointArgument = Annotated[Path, typer.Argument(metavar="PATH", help="A checkpoint's folder.")]


@checkpoint.command("inspect")
def inspect_checkpoint(path: CheckpointArgument) -> None:
    """Say what a checkpoint holds."""
    from distcl.artifacts import describe

    for key, value in describe(path).items():
        if isinstance(value, dict):
            for name, size in value.items():
                say(f"{name:<24} {size:,} bytes")
        else:
            say(f"{key:<24} {value}")


@checkpoint.command("verify")
def verify_checkpoint(path: CheckpointArgument) -> None:
    """Check every file of a checkpoint against its manifest; exit 5 if one does not match."""
    from distcl.checkpoint import verify

    say(f"{path}: {len(verify(path)['files'])} files are as they were written")


@checkpoint.command("export")
def export_checkpoint(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="A checkpoint, or a run folder.")],
    to: Annotated[Path, typer.Option("--to", metavar="DIR", help="Where to write.")] = Path(
        "export"
    ),
) -> None:
    """Write the weights as one safetensors file and config.toml, readable without distcl."""
    from distcl.artifacts import export

    for file in export(path, to):
        say(f"wrote {file}")


@app.command("config")
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
        from distcl.config_text import reference as reference_text

        say(reference_text().rstrip())
        return
    loaded, found = load_with_origins(_one_config(config, file), sets or [])
    say(to_toml(loaded, found if origins else None).rstrip())


@app.command()
def init(
    path: Annotated[Path, typer.Argument(metavar="PATH")] = Path("distcl.toml"),
    force: Annotated[bool, typer.Option("--force", help="Overwrite an existing file.")] = False,
) -> None:
    """Write a configuration in which every key is described and stands at its default."""
    from distcl.config_text import template

    if launch_rank() != 0:
        return
    try:
        with path.open("w" if force else "x", encoding="utf-8") as stream:
            stream.write(template())
    except FileExistsError:
        raise UsageError(f"{path} exists; --force overwrites it") from None
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror}") from None
    say(f"wrote {path}; train with: distcl run {path}")


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN…", help="Run folders.")],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", metavar="FILE", help="Default: report.html, of one run in its folder."
        ),
    ] = None,
    png: Annotated[
        Path | None,
        typer.Option("--png", metavar="DIR", help="Write each plot as a PNG file, too."),
    ] = None,
) -> None:
    """Write report.html: what a run kept and forgot, or how several compare. No network."""
    from distcl.report import write_report

    if launch_rank() != 0:
        return
    file = out or (runs[0] if len(runs) == 1 else Path()) / "report.html"
    pictures = write_report(runs, file, png)
    say(f"wrote {file}" + (f" and {len(pictures)} PNG files in {png}" if png else ""))


@app.command()
def status(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
) -> None:
    """Say how far a run is: its state, last round, rate and time left."""
    from distcl.status import read_status

    found = read_status(folder)
    say(json.dumps(asdict(found), indent=2) if as_json else str(found))


@app.command()
def doctor() -> None:
    """Say what this machine can do and what is misconfigured; exit 1 if something is broken.

    Under a launcher also what the processes can do together: folder, clocks, network.
    """
    from distcl.doctor import examine, in_a_group

    findings = examine()
    if in_a_group(findings):
        from distcl.doctor_group import examine_group

        findings += examine_group(findings)
    for finding in findings:
        say(f"{finding.level:<8} {finding.topic:<18} {finding.text}")
    if any(finding.level == "broken" for finding in findings):
        raise typer.Exit(1)


@app.command("list")
def list_parts() -> None:
    """Print every registered part, with a line of description."""
    for kind in registry.kinds():
        say(f"{kind}")
        for part in registry.parts(kind):
            say(f"  {part.name:<16} {part.description}")


@app.command()
def shard(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help=_SOURCE_HELP)],
    dest: Annotated[
        Path | None, typer.Argument(metavar="DEST", help="The folder to write.", show_default=False)
    ] = None,
    per_shard: Annotated[int, typer.Option(min=1, help="Samples of a shard.")] = 10_000,
    max_mb: Annotated[
        float, typer.Option(min=0, help="Close a shard before it grows beyond; 0: no limit.")
    ] = 0.0,
    workers: Annotated[int, typer.Option(min=0, help="Processes; 0: this one.")] = 0,
    label: Annotated[
        str, typer.Option(help="Of archives: the member with the label, cls or json:FIELD.")
    ] = "cls",
    sets: Overrides = None,
    append: Annotated[
        bool, typer.Option("--append", help="Add to the shards of DEST, each when it is whole.")
    ] = False,
    index_only: Annotated[
        bool, typer.Option("--index-only", help="SOURCE has shards: write index and shards.json.")
    ] = False,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="With --index-only: mark bad samples, and go on.")
    ] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="SOURCE has shards: read and check everything.")
    ] = False,
    quiet: Quiet = False,
) -> None:
    """Write WebDataset shards with an index; or index, or check, the shards of a folder."""
    if launch_rank() != 0:
        return
    if (dest is None) != (index_only or verify) or (index_only and verify):
        raise UsageError("give SOURCE and DEST, or one folder with --index-only or --verify")
    if skip_bad and not index_only:
        raise UsageError("--skip-bad goes with --index-only")
    from distcl.data import index, samples, writing
    from distcl.display import counting

    if dest is None:
        folder = Path(source)
        with counting("checking" if verify else "indexing", quiet) as tell:
            if verify:
                manifest, problems = index.verify_folder(folder, tell)
            else:
                manifest, problems = index.index_folder(folder, label, skip_bad, tell)
        for problem in problems[:_MOST_PROBLEMS]:
            complain(problem)
        if problems and verify:
            raise DataError(f"{len(problems)} faults in '{folder}'")
    else:
        folder, stream = dest, None
        if source.endswith(".toml"):
            stream = load_with_origins(Path(source), sets or [])[0].stream
        elif ":" in source or source in {part.name for part in registry.parts("source")}:
            named = [*(sets or []), f"stream.source={source}"]
            stream = load_with_origins(None, named)[0].stream
        made = samples.open_samples(source, label, stream)
        with counting("writing", quiet, sum(made.sizes.values())) as tell:
            size = int(max_mb * 1e6)
            if append:
                manifest = writing.append_shards(made, folder, per_shard, size, tell)
            else:
                manifest = writing.write_shards(made, folder, per_shard, size, workers, tell)
    if not quiet:
        found = manifest.shards
        say(
            f"{folder}: {len(found)} shards, {sum(s.samples for s in found):,} samples, "
            f"{sum(s.bytes for s in found) / 1e6:,.1f} MB"
        )


@app.command()
def launch(
    config: ConfigArgument = None,
    file: ConfigOption = None,
    command: Annotated[
        Literal["run", "train", "detect"], typer.Option(help="What the job does.")
    ] = "run",
    nodes: Annotated[int, typer.Option(min=1, help="Nodes.")] = 1,
    gpus: Annotated[int, typer.Option(min=0, help="GPUs of each node; 0: CPUs only.")] = 0,
    processes: Annotated[
        int, typer.Option(min=0, help="Processes on each node; 0: one per GPU, or one.")
    ] = 0,
    cpus: Annotated[int, typer.Option(min=0, help="Cores of each process.")] = 0,
    time: Annotated[str, typer.Option(help="Time limit, as 4:00:00.")] = "",
    partition: Annotated[str, typer.Option(help="Partition.")] = "",
    account: Annotated[str, typer.Option(help="Account.")] = "",
    name: Annotated[str, typer.Option(help="Name of the job. Default: of the run folder.")] = "",
    via: Annotated[
        Literal["auto", "srun", "torchrun", "accelerate"],
        typer.Option(help="What starts the processes; auto: torchrun on one node, srun on more."),
    ] = "auto",
    setup: Annotated[
        str, typer.Option(metavar="FILE", help="Shell commands for the job to begin with.")
    ] = "",
    sbatch: Annotated[
        list[str] | None,
        typer.Option(metavar="OPTION", help="Any other option, as --qos=debug. Repeatable."),
    ] = None,
    sets: Overrides = None,
    out: Out = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the command and the script, submit nothing.")
    ] = False,
) -> None:
    """Submit a job to SLURM that trains, saves when it must stop, and requeues itself."""
    from distcl.submit import Submission, submit

    path = _one_config(config, file)
    if path is None:
        raise UsageError("distcl launch needs a CONFIG; 'distcl init' writes one")
    loaded, _ = load_with_origins(path, sets or [])  # refuse it here, not hours later
    arguments = [command, str(path)]
    for one in sets or []:
        arguments += ["--set", one]
    job = Submission(
        arguments=arguments,
        out=out or Path(loaded.run.out or f"runs/{path.stem}"),
        nodes=nodes,
        gpus=gpus,
        processes=processes,
        cpus=cpus,
        time=time,
        partition=partition,
        account=account,
        name=name,
        via=via,
        setup=setup,
        options=sbatch or (),
    )
    if dry_run:
        say(f"{job}\n\n{job.script.read_text(encoding='utf-8').rstrip()}")
        return
    say(f"submitted job {submit(job)}; its output: {job.out}/slurm-*.out")


def say(text: str) -> None:
    """Print a result on stdout, by rank 0 only."""
    if launch_rank() == 0:
        print(text)


def _one_config(argument: Path | None, option: Path | None) -> Path | None:
    if argument and option and argument != option:
        raise UsageError(f"two configurations are given, {argument} and --config {option}")
    return argument or option


def _execute(
    command: Literal["run", "train", "detect"],
    argument: Path | None,
    option: Path | None,
    sets: list[str] | None,
    out: Path | None,
    resume: str,
    allow_changed: list[str] | None,
    quiet: bool,
    as_json: bool,
) -> None:
    path = _one_config(argument, option)
    if path is None:
        raise UsageError(f"distcl {command} needs a CONFIG; 'distcl init' writes one")
    config, _ = load_with_origins(path, sets or [])
    folder = out or Path(config.run.out or f"runs/{path.stem}")
    config = config.model_copy(update={"run": config.run.model_copy(update={"out": str(folder)})})

    from distcl import job
    from distcl.display import open_display, show_summary

    console = Console(stderr=as_json)
    display = None if quiet or launch_rank() else open_display(console)

    def tell(message: str) -> None:
        if display is not None:
            display.close()
        complain(message)

    try:
        summary = job.execute(command, config, folder, display, tell, resume, allow_changed or [])
    finally:
        if display is not None:
            display.close()
    if launch_rank() == 0:
        if as_json:
            print(json.dumps(summary, indent=2))
        elif not quiet:
            show_summary(console, summary)
            console.print(f"everything is in {folder}", markup=False, highlight=False)
