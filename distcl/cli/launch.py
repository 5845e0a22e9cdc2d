"""``distcl launch``: submit one of the job scripts of ``launch/slurm`` to SLURM.

The scripts run as they are; what a user asks for becomes options of ``sbatch``, which override
the script's own. Nothing is generated, so what is submitted can be read, and typed by hand.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import typer

from distcl.cli.common import ConfigArgument, ConfigOption, Out, Overrides, needed_config, say
from distcl.config.load import load_config
from distcl.config.paths import expanded
from distcl.errors import UsageError
from distcl.reporting.run_folder import make_numbered, next_numbered

Via = Literal["auto", "srun", "torchrun", "accelerate"]

_SCRIPTS = {
    "srun": "multi_node.sbatch",
    "torchrun": "multi_node_torchrun.sbatch",
    "accelerate": "multi_node_accelerate.sbatch",
}


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
        Via,
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
    path = needed_config("launch", config, file)
    loaded = load_config(path, sets or [])  # refuse it here, not hours later
    folder = out or Path(loaded.run.out or f"runs/{path.stem}")
    if not (out or loaded.run.out):
        folder = next_numbered(folder) if dry_run else make_numbered(folder)
    job = submission(
        [command, str(path), *(word for one in sets or [] for word in ("--set", one))],
        folder,
        via,
        processes=processes,
        cpus=cpus,
        setup=setup and str(expanded(setup)),
        options=sbatch or (),
        asked={
            "nodes": nodes,
            "gpus-per-node": gpus,
            "time": time,
            "partition": partition,
            "account": account,
            "job-name": name,
        },
    )
    if dry_run:
        say(f"{job}\n\n{job.script.read_text(encoding='utf-8').rstrip()}")
        return
    say(f"submitted job {submit(job)}; its output: {job.out}/slurm-*.out")


@dataclass(frozen=True, slots=True)
class Submission:
    """A job for SLURM: the sbatch command, as words, and what the script reads from variables."""

    script: Path
    command: list[str]
    environment: dict[str, str]
    out: Path

    def __str__(self) -> str:
        settings = [f"{name}={shlex.quote(value)}" for name, value in self.environment.items()]
        return " ".join([*settings, shlex.join(self.command)])


def submission(
    arguments: Sequence[str],
    out: Path,
    via: Via = "auto",
    processes: int = 0,
    cpus: int = 0,
    setup: str = "",
    options: Sequence[str] = (),
    asked: Mapping[str, str | int] | None = None,
) -> Submission:
    """Return the job that runs ``distcl`` with ``arguments``, as ``["train", "a.toml"]``.

    ``processes``: of a node; 0: one per GPU, or one. ``cpus``: of a process. ``setup``: a file of
    shell commands. ``asked``: options of sbatch by name, empty or 0: as in the script. ``options``:
    further ones, as ``"--qos=debug"``. The script is torchrun's on one node, srun's on several,
    unless ``via`` says else.
    """
    asked = {"nodes": 1, "gpus-per-node": 0, "job-name": "", **(asked or {})}
    # Of srun a task is a process, of the others a node.
    srun = via == "srun" or (via == "auto" and asked["nodes"] != 1)
    script = _SCRIPTS["srun" if via == "auto" else via]
    if asked["nodes"] == 1 and via in ("auto", "torchrun"):
        script = "single_node.sbatch"
    each = processes or int(asked["gpus-per-node"]) or 1
    asked |= {
        "ntasks-per-node": each if srun else 1,
        "cpus-per-task": cpus * (1 if srun else each),
        "job-name": asked["job-name"] or out.name,
        "output": str(out / "slurm-%j.out"),
    }
    words = [f"--{name}={value}" for name, value in asked.items() if value]
    path = scripts_folder() / script
    environment = {"PYTHON": sys.executable}
    if processes and not srun:
        environment["PROCESSES"] = str(processes)
    if setup:
        environment["JOB_SETUP"] = setup
    command = ["sbatch", "--parsable", *words, *options, str(path), *arguments, "--out", str(out)]
    return Submission(path, command, environment, out)


def scripts_folder() -> Path:
    """Return the folder of the job scripts: of the checkout, or as installed."""
    checkout = Path(__file__).parents[2] / "launch" / "slurm"
    installed = Path(sysconfig.get_path("data")) / "share" / "distcl" / "launch" / "slurm"
    for folder in (checkout, installed):
        if folder.is_dir():
            return folder
    raise UsageError(f"the job scripts are in neither {checkout} nor {installed}")


def submit(job: Submission) -> str:
    """Make the run folder, submit the job, return its id. Raises UsageError if SLURM refuses."""
    try:
        job.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"the run folder '{job.out}' cannot be made: {error.strerror}") from error
    # a job's variables, where this runs inside one, would become the new job's
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_"))}
    inherited |= {k: v for k, v in os.environ.items() if k in ("SLURM_CONF", "SLURM_CLUSTERS")}
    try:
        done = subprocess.run(
            job.command,
            env=inherited | job.environment,
            capture_output=True,
            text=True,
            check=False,
        )
    except FileNotFoundError:
        raise UsageError(
            "sbatch is not on the PATH: submit from a login node of a SLURM cluster, or look at "
            "the job with --dry-run"
        ) from None
    found = re.match(r"\d+", done.stdout)
    if done.returncode or found is None:
        raise UsageError(f"SLURM refused the job: {done.stderr.strip() or done.stdout.strip()}")
    return found[0]
