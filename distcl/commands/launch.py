"""``distcl launch``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from distcl.commands.common import (
    ConfigArgument,
    ConfigOption,
    Out,
    Overrides,
    one_config,
    say,
)
from distcl.config_load import load_with_origins
from distcl.errors import UsageError


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

    path = one_config(config, file)
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
