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
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import typer

from distcl.cli.common import ConfigArgument, ConfigOption, Out, Overrides, one_config, say
from distcl.config.load import load_with_origins
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
    path = one_config(config, file)
    if path is None:
        raise UsageError("distcl launch needs a CONFIG; 'distcl init' writes one")
    loaded, _ = load_with_origins(path, sets or [])  # refuse it here, not hours later
    folder = out or Path(loaded.run.out or f"runs/{path.stem}")
    if not (out or loaded.run.out):
        folder = next_numbered(folder) if dry_run else make_numbered(folder)
    job = Submission(
        arguments=[command, str(path), *(word for one in sets or [] for word in ("--set", one))],
        out=folder,
        nodes=nodes,
        gpus=gpus,
        processes=processes,
        cpus=cpus,
        time=time,
        partition=partition,
        account=account,
        name=name,
        via=via,
        setup=setup and str(expanded(setup)),
        options=sbatch or (),
    )
    if dry_run:
        say(f"{job}\n\n{job.script.read_text(encoding='utf-8').rstrip()}")
        return
    say(f"submitted job {submit(job)}; its output: {job.out}/slurm-*.out")


@dataclass(frozen=True, slots=True)
class Submission:
    """A job for SLURM.

    ``arguments``: of distcl, as ``["train", "a.toml"]``. ``gpus``, ``processes``: of one node; 0
    processes: one per GPU, or one. ``cpus``: of one process. ``options``: further ones of sbatch,
    as ``"--qos=debug"``. Empty or 0: as in the script.
    """

    arguments: Sequence[str]
    out: Path
    nodes: int = 1
    gpus: int = 0
    processes: int = 0
    cpus: int = 0
    time: str = ""
    partition: str = ""
    account: str = ""
    name: str = ""
    via: Via = "auto"
    setup: str = ""
    options: Sequence[str] = field(default=())

    @property
    def script(self) -> Path:
        """The script that fits: torchrun on one node, srun on several, unless ``via`` says else."""
        name = _SCRIPTS["srun" if self.via == "auto" else self.via]
        if self.nodes == 1 and self.via in ("auto", "torchrun"):
            name = "single_node.sbatch"
        return scripts_folder() / name

    @property
    def environment(self) -> dict[str, str]:
        """What the script reads from its environment: this Python, processes, the setup file."""
        found = {"PYTHON": sys.executable}
        if self.processes and self.script.name != _SCRIPTS["srun"]:
            found["PROCESSES"] = str(self.processes)
        if self.setup:
            found["JOB_SETUP"] = self.setup
        return found

    @property
    def command(self) -> list[str]:
        """The sbatch command, as words."""
        processes = self.processes or self.gpus or 1
        each = self.script.name == _SCRIPTS["srun"]  # a task is a process, else a node
        asked = {
            "nodes": self.nodes,
            "ntasks-per-node": processes if each else 1,
            "gpus-per-node": self.gpus,
            "cpus-per-task": self.cpus * (1 if each else processes),
            "time": self.time,
            "partition": self.partition,
            "account": self.account,
            "job-name": self.name or self.out.name,
            "output": self.out / "slurm-%j.out",
        }
        words = [f"--{name}={value}" for name, value in asked.items() if value]
        rest = [*self.arguments, "--out", str(self.out)]
        return ["sbatch", "--parsable", *words, *self.options, str(self.script), *rest]

    def __str__(self) -> str:
        settings = [f"{name}={shlex.quote(value)}" for name, value in self.environment.items()]
        return " ".join([*settings, shlex.join(self.command)])


def scripts_folder() -> Path:
    """Return the folder of the job scripts: of the checkout, or as installed."""
    checkout = Path(__file__).parents[2] / "launch" / "slurm"
    installed = Path(sysconfig.get_path("data")) / "share" / "distcl" / "launch" / "slurm"
    for folder in (checkout, installed):
        if folder.is_dir():
            return folder
    raise UsageError(f"the job scripts are in neither {checkout} nor {installed}")


def submit(submission: Submission) -> str:
    """Make the run folder, submit the job, return its id. Raises UsageError if SLURM refuses."""
    try:
        submission.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"the run folder '{submission.out}' cannot be made: {error.strerror}"
        ) from error
    # a job's variables, where this runs inside one, would become the new job's
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_"))}
    inherited |= {k: v for k, v in os.environ.items() if k in ("SLURM_CONF", "SLURM_CLUSTERS")}
    try:
        done = subprocess.run(
            submission.command,
            env=inherited | submission.environment,
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
