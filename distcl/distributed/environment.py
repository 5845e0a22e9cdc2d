"""Who started this process, and as which of how many: read from the environment. No torch here.

torchrun and ``accelerate launch`` tell their processes by RANK, WORLD_SIZE, LOCAL_RANK,
LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT. SLURM and MPI say the same in words of their own,
which :func:`adopt` translates, so that everything after it reads one set of names.
"""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass

from distcl.config import ParallelConfig, RunConfig, TrainingConfig
from distcl.errors import ConfigError, UsageError

FIRST_PORT, PORTS = 20_000, 10_000
"""Rendezvous ports made from a job's id lie here: below those that Linux hands out by itself."""

_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")

# rank, size, rank within the node, size within the node: Open MPI, MVAPICH, MPICH and Intel, PALS
_MPI = (
    *(
        tuple(f"{mpi}_COMM_WORLD_{name}" for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE"))
        for mpi in ("OMPI", "MV2")
    ),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    ("PMI_RANK", "PMI_SIZE", "PALS_LOCAL_RANKID", "PALS_LOCAL_SIZE"),
)
_MPI_JOB = ("PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid", "PBS_JOBID", "PALS_APID")


@dataclass(frozen=True, slots=True)
class Launch:
    """What started this process. ``job``: the batch job around it, as "SLURM job 12", or ""."""

    launcher: str
    job: str
    rank: int
    world_size: int
    local_rank: int
    local_world_size: int

    def __str__(self) -> str:
        return self.launcher + (f" in {self.job}" if self.job else "")


def rank_of(environ: Mapping[str, str]) -> int:
    """Return this process's rank as its launcher tells it; 0 without a launcher.

    A RANK without WORLD_SIZE is a leftover, not a launcher's, and must not make a run silent.
    """
    launched = ("RANK", "LOCAL_RANK") if "WORLD_SIZE" in environ else ()
    for name in (*launched, "SLURM_PROCID", *(names[0] for names in _MPI)):
        if environ.get(name, "").isdecimal():
            return int(environ[name])
    return 0


def adopt(environ: MutableMapping[str, str]) -> Launch:
    """Read what started this process and, under srun or mpirun, set torch's variables. Local.

    Sets RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE and, where they are not set, MASTER_ADDR
    and MASTER_PORT. Calling it again changes nothing. Raises UsageError naming the variables where
    two launchers disagree about the number of processes, or where a value is not a number.
    """
    accelerated = "ACCELERATE_MIXED_PRECISION" in environ
    slurm = environ.get("SLURM_JOB_ID", "")
    job = f"SLURM job {slurm}" if slurm else ""
    tasks = _number(environ, "SLURM_STEP_NUM_TASKS", 1) if "SLURM_STEP_ID" in environ else 1
    if "TORCHELASTIC_RUN_ID" in environ:
        agents = _number(environ, "GROUP_WORLD_SIZE", 1)
        if tasks > 1 and agents != tasks:
            raise UsageError(
                f"srun started {tasks} launchers but each works with {agents}; give them the same "
                f"rendezvous, as torchrun --nnodes {tasks} --node-rank $SLURM_NODEID "
                "--master-addr FIRST-NODE, or start one with srun --ntasks 1"
            )
        return _read(environ, "accelerate launch" if accelerated else "torchrun", job)
    for names in _MPI:  # before srun, by which mpirun starts its own daemons
        if all(name in environ for name in names) and _number(environ, names[1], 1) > 1:
            return _adopt_mpi(environ, names, job)
    if tasks > 1:
        return _adopt_slurm(environ, tasks, job)
    if "RANK" in environ and "WORLD_SIZE" in environ:
        return _read(environ, "RANK and WORLD_SIZE", job)
    return Launch("accelerate launch" if accelerated else "hand", job, 0, 1, 0, 1)


def _number(environ: Mapping[str, str], name: str, default: int) -> int:
    text = environ.get(name, str(default))
    if not text.isdecimal():
        raise UsageError(f"{name} = '{text}' is not a number; unset it, or use a launcher")
    return int(text)


def _read(environ: Mapping[str, str], launcher: str, job: str) -> Launch:
    rank, world = _number(environ, "RANK", 0), _number(environ, "WORLD_SIZE", 1)
    local, here = _number(environ, "LOCAL_RANK", rank), _number(environ, "LOCAL_WORLD_SIZE", world)
    if rank >= world:
        raise UsageError(f"RANK = {rank} but WORLD_SIZE = {world}; ranks count from 0")
    return Launch(launcher, job, rank, world, local, here)


def _adopt_slurm(environ: MutableMapping[str, str], tasks: int, job: str) -> Launch:
    values = {
        "RANK": _number(environ, "SLURM_PROCID", 0),
        "WORLD_SIZE": tasks,
        "LOCAL_RANK": _number(environ, "SLURM_LOCALID", 0),
        "LOCAL_WORLD_SIZE": tasks_on_node(
            environ.get("SLURM_STEP_TASKS_PER_NODE", str(tasks)),
            _number(environ, "SLURM_NODEID", 0),
        ),
    }
    nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_NODELIST", "")
    step = _number(environ, "SLURM_STEP_ID", 0)
    port = FIRST_PORT + (_number(environ, "SLURM_JOB_ID", 0) + 101 * step) % PORTS
    address = environ.get("MASTER_ADDR") or first_node(nodes)
    return _set(environ, "srun", job, values, address, port)


def _adopt_mpi(environ: MutableMapping[str, str], names: tuple[str, ...], job: str) -> Launch:
    values = {ours: _number(environ, theirs, 0) for ours, theirs in zip(_NAMES, names, strict=True)}
    alone = values["LOCAL_WORLD_SIZE"] == values["WORLD_SIZE"]
    if not alone and "MASTER_ADDR" not in environ:
        raise UsageError(
            "mpirun started processes on several nodes, and does not say which is the first; "
            "export MASTER_ADDR, as mpirun -x MASTER_ADDR=$(hostname) … on the first of them"
        )
    unique = "".join(environ.get(name, "") for name in _MPI_JOB)
    port = FIRST_PORT + zlib.crc32(unique.encode()) % PORTS
    return _set(environ, "mpirun", job, values, "127.0.0.1", port)


def _set(
    environ: MutableMapping[str, str],
    launcher: str,
    job: str,
    values: dict[str, int],
    address: str,
    port: int,
) -> Launch:
    for name in ("WORLD_SIZE", "RANK"):
        if name in environ and environ[name] != str(values[name]):
            raise UsageError(
                f"{launcher} started {values['WORLD_SIZE']} processes, this one as rank "
                f"{values['RANK']}, but {name} = {environ[name]} is set; "
                "type: unset RANK WORLD_SIZE"
            )
    environ.update({name: str(value) for name, value in values.items()})
    environ.setdefault("MASTER_ADDR", address)
    environ.setdefault("MASTER_PORT", str(port))
    return _read(environ, launcher, job)


def first_node(nodes: str) -> str:
    """Return the first name of SLURM's list of nodes: ``gpu[003-007,9]`` gives ``gpu003``."""
    found = re.match(r"([^,\[]+)(?:\[(\d+)[^\]]*\])?([^,\[]*)", nodes)
    if found is None:
        raise UsageError(f"SLURM_STEP_NODELIST = '{nodes}' names no node; export MASTER_ADDR")
    return found[1] + (found[2] or "") + found[3]


def tasks_on_node(counts: str, node: int) -> int:
    """Return how many tasks run on a node, from SLURM's ``4(x2),1``: two nodes of 4, one of 1."""
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", counts):
        if node < int(times or 1):
            return int(count)
        node -= int(times or 1)
    raise UsageError(f"SLURM_STEP_TASKS_PER_NODE = '{counts}' does not tell of every node")


# What the launcher was asked for, compared with the TOML. Local.


def check_launch(environ: Mapping[str, str], processes: int = 0) -> int:
    """Return how many processes the launcher started; raise UsageError if they cannot be real.

    ``processes``: how many there must be (0: as many as were started). Launchers that were asked
    for several processes and silently started one are found by what they leave in ``environ``.
    """
    world = int(environ.get("WORLD_SIZE", "1"))
    if "WORLD_SIZE" in environ and "RANK" not in environ:
        raise UsageError(
            "WORLD_SIZE is set but RANK is not; start with "
            f"'torchrun --nproc-per-node {world} -m distcl …', or unset WORLD_SIZE"
        )
    by_accelerate = "ACCELERATE_MIXED_PRECISION" in environ and "MASTER_ADDR" in environ
    if by_accelerate and "WORLD_SIZE" not in environ:
        count = processes or "N"
        raise UsageError(
            "accelerate launch was asked for several processes but started one (it does so with "
            f"--cpu); type: torchrun --nproc-per-node {count} -m distcl …"
        )
    if processes and world != processes:
        raise UsageError(
            f"parallel.processes asks for {processes} processes but {world} "
            f"{'was' if world == 1 else 'were'} started; "
            f"type: torchrun --nproc-per-node {processes} -m distcl …"
        )
    return world


def check_launcher(
    run: RunConfig,
    parallel: ParallelConfig,
    training: TrainingConfig,
    environ: Mapping[str, str] = os.environ,
) -> None:
    """Raise ConfigError naming what the launcher and the TOML say differently.

    The launcher tells its processes by ``ACCELERATE_*``. What only repeats its own default ("no",
    "none", one step of accumulation) is not compared.
    """
    found = "ddp"
    if environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true":
        found = f"zero{environ.get('ACCELERATE_DEEPSPEED_ZERO_STAGE', '')}"
    elif environ.get("ACCELERATE_USE_FSDP", "").lower() == "true":
        found = "fsdp2"
    if found != "ddp" and not parallel.strategy.startswith(found):  # "zero": a file has the stage
        choice = "'zero1', 'zero2' or 'zero3'" if found == "zero" else f"'{found}'"
        raise ConfigError(
            f"accelerate launch asks for {choice}, but parallel.strategy = '{parallel.strategy}'"
        )
    device = "cpu" if parallel.offload_optimizer else "none"
    for option, key, value, default in (
        ("MIXED_PRECISION", "run.precision", run.precision, "no"),
        ("GRADIENT_ACCUMULATION_STEPS", "training.accumulate", str(training.accumulate), "1"),
        ("GRADIENT_CLIPPING", "training.clip_norm", str(training.clip_norm), "none"),
        ("DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "parallel.offload_optimizer", device, "none"),
    ):
        asked = environ.get(f"ACCELERATE_{option}", default).lower()
        if asked not in (default, value, "auto"):
            flag = option.removeprefix("DEEPSPEED_").lower()
            raise ConfigError(f"accelerate launch asks for --{flag} {asked}, but {key} = {value}")
