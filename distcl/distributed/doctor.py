"""What this machine can do for distcl, and what is misconfigured. Local; prints nothing."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sys
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Literal

import psutil
from packaging.requirements import Requirement

from distcl.config import RunConfig
from distcl.config.load import load_config
from distcl.distributed.environment import adopt, check_launch
from distcl.errors import UsageError

if TYPE_CHECKING:  # whether torch can be imported is one of the findings
    import torch

    from distcl.distributed.runtime import Runtime

Level = Literal["ok", "note", "warning", "broken"]

_GIB = 2**30


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing looked at. ``broken``: distcl cannot work; ``warning``: it will surprise."""

    level: Level
    topic: str
    text: str


_ALONE = frozenset({"launcher", "torch", "torch.distributed", "gloo", "RANK", "WORLD_SIZE"})


def in_a_group(findings: list[Finding], environ: Mapping[str, str] = os.environ) -> bool:
    """Tell whether several processes were started such that they can find each other."""
    broken = {finding.topic for finding in findings if finding.level == "broken"}
    return not broken & _ALONE and adopt(dict(environ)).world_size > 1


def examine(environ: Mapping[str, str] = os.environ, out: Path = Path("runs")) -> list[Finding]:
    """Look at Python, packages, devices, backends, this machine, and the environment.

    ``out``: where runs would be written. Imports torch. Local: under a launcher, every process
    looks at its own machine and environment.
    """
    return [
        *_python(),
        *_packages(),
        *_torch(),
        *_machine(environ),
        *_disk(out),
        *_launcher(environ),
        *_configuration(environ),
    ]


def _python() -> Iterator[Finding]:
    fine = sys.version_info >= (3, 11)
    text = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    yield Finding("ok" if fine else "broken", "python", text + ("" if fine else "; 3.11 is needed"))


def _packages() -> Iterator[Finding]:
    try:
        about = importlib.metadata.metadata("distcl")
    except importlib.metadata.PackageNotFoundError:
        yield Finding("note", "distcl", "is not installed, but runs from its source folder")
        return
    missing: dict[str, list[str]] = {}
    extras = about.get_all("Provides-Extra") or []
    for text in importlib.metadata.requires("distcl") or []:
        requirement = Requirement(text)
        name, marker = requirement.name, requirement.marker
        wanted = (e for e in ("", *extras) if not marker or marker.evaluate({"extra": e}))
        if (extra := next(wanted, None)) is None:
            continue  # not on this platform
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            missing.setdefault(extra, []).append(name)
            continue
        if not extra:
            yield Finding("ok", name, version)
    for name in missing.pop("", []):
        yield Finding("broken", name, f"not installed; type: pip install {name}")
    for extra in extras:
        lacks = missing.get(extra)
        text = f"lacks {', '.join(lacks)}; pip install 'distcl[{extra}]'" if lacks else "installed"
        yield Finding("note" if lacks else "ok", f"extra {extra}", text)


def _torch() -> Iterator[Finding]:
    try:
        import torch
        import torch.distributed as dist
    except (ImportError, OSError) as error:  # OSError: a shared library that does not load
        yield Finding("broken", "torch", f"cannot be imported: {error}")
        return
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            about = torch.cuda.get_device_properties(index)
            memory = f"{about.total_memory / _GIB:.0f} GiB"
            yield Finding("ok", f"cuda:{index}", f"{about.name}, {memory}")
    elif torch.version.cuda or torch.version.hip:
        yield Finding("warning", "cuda", "torch is built for GPUs but sees none; runs use the CPU")
    else:
        yield Finding("note", "cuda", "torch is built for the CPU; runs use the CPU")
    if not dist.is_available():
        yield Finding("broken", "torch.distributed", "not in this build of torch")
        return
    gpus = torch.cuda.device_count()
    if dist.is_nccl_available():
        yield Finding("ok", "nccl", "available")
    else:
        level: Level = "warning" if gpus > 1 else "note"
        yield Finding(level, "nccl", f"not in this build of torch ({gpus} GPUs)")
    if not dist.is_gloo_available():
        yield Finding("broken", "gloo", "not in this build of torch")
    elif not dist.is_initialized():
        yield _try_gloo()


def _try_gloo() -> Finding:
    """Reduce one number in a group of one: fails where gloo finds no network interface."""
    import torch
    import torch.distributed as dist

    try:
        store = dist.HashStore()  # type: ignore[attr-defined]  # public, but not in __all__
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)
        dist.all_reduce(torch.ones(1))
        dist.destroy_process_group()
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        advice = "set GLOO_SOCKET_IFNAME to a network interface, as lo"
        return Finding("broken", "gloo", f"does not work: {reason}; {advice}")
    return Finding("ok", "gloo", "works")


def _machine(environ: Mapping[str, str]) -> Iterator[Finding]:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield Finding("ok", "cores", f"{usable} usable of {os.cpu_count()}")
    memory = psutil.virtual_memory()
    level: Level = "ok" if memory.available > _GIB else "warning"
    text = f"{memory.available / _GIB:.1f} GiB available of {memory.total / _GIB:.1f}"
    yield Finding(level, "memory", text)
    threads = environ.get("OMP_NUM_THREADS", "")
    local = environ.get("LOCAL_WORLD_SIZE", "1")
    if threads:
        fine = threads.isdecimal() and int(threads) > 0
        text = threads if fine else f"'{threads}' is not a number of threads"
        yield Finding("ok" if fine else "warning", "OMP_NUM_THREADS", text)
    elif local.isdecimal() and int(local) > 1:
        advice = f"set it to {max(1, (usable or 1) // int(local))}"
        text = f"not set: {local} processes here would each use all cores; {advice}"
        yield Finding("warning", "OMP_NUM_THREADS", text)
    else:
        text = "not set: right for one process; set it to cores / processes for several"
        yield Finding("ok", "OMP_NUM_THREADS", text)


def _disk(out: Path) -> Iterator[Finding]:
    where = existing(out)
    if not os.access(where, os.W_OK):
        yield Finding("warning", "disk", f"{where} is not writable; choose another --out")
        return
    free = shutil.disk_usage(where).free
    yield Finding(
        "ok" if free > _GIB else "warning", "disk", f"{free / _GIB:.1f} GiB free, {where}"
    )


def existing(folder: Path) -> Path:
    """Return the folder, or the nearest one above it that exists."""
    return next(one for one in (folder.absolute(), *folder.absolute().parents) if one.exists())


def _launcher(environ: Mapping[str, str]) -> Iterator[Finding]:
    environ = dict(environ)
    try:
        found = adopt(environ)
    except UsageError as error:
        yield Finding("broken", "launcher", str(error))
    else:
        by = "none" if found.launcher == "hand" else found.launcher
        where = f" in {found.job}" if found.job else ""
        yield Finding("ok", "launcher", f"{by}{where}, {found.world_size} process(es)")
    numbers: dict[str, int] = {}
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "SLURM_PROCID"):
        text = environ.get(name, "")
        if text.isdecimal():
            numbers[name] = int(text)
        elif name in environ:
            yield Finding("broken", name, f"'{text}' is not a number")
    if "RANK" in numbers and "WORLD_SIZE" not in environ:
        yield Finding("broken", "launcher", "RANK is set but WORLD_SIZE is not")
    for rank, size in (("RANK", "WORLD_SIZE"), ("LOCAL_RANK", "LOCAL_WORLD_SIZE")):
        if rank in numbers and size in numbers and numbers[rank] >= numbers[size]:
            text = f"{rank} = {numbers[rank]} but {size} = {numbers[size]}"
            yield Finding("broken", "launcher", text)
    absent = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in environ]
    if numbers.get("WORLD_SIZE", 1) > 1 and absent:
        text = f"WORLD_SIZE is {numbers['WORLD_SIZE']} but not set: {', '.join(absent)}"
        yield Finding("broken", "launcher", text)
    if "WORLD_SIZE" in numbers or "WORLD_SIZE" not in environ:
        try:  # what the runtime asks at its start
            check_launch(environ)
        except UsageError as error:
            yield Finding("broken", "launcher", str(error))


def _configuration(environ: Mapping[str, str]) -> Iterator[Finding]:
    try:
        load_config(None, (), environ)
    except UsageError as error:
        yield Finding("broken", "environment", str(error))


# What several processes can do for distcl together: ``distcl doctor`` under a launcher.


_MIB = 2**20
_LARGE = 16 * _MIB
_SEEN_SECONDS = 10.0
_TIMEOUT = 60.0


def examine_group(own: Sequence[Finding], out: Path = Path("runs")) -> list[Finding]:
    """Look at what the processes of this launch are to each other; the same list on every rank.

    Who is where; what is wrong on other nodes only (``own``: what this process found); whether
    they share the folder of runs, ``out``; how far clocks differ; how long collectives take.
    Collective: every process of the launch calls it, with no process group made before.
    """
    from distcl.distributed.runtime import Runtime

    try:
        runtime = Runtime(RunConfig(timeout_seconds=_TIMEOUT))
    except UsageError as error:  # the same on every rank
        return [Finding("broken", "launcher", str(error))]
    try:
        return [
            Finding("ok", "processes", runtime.about),
            *_elsewhere(runtime, own),
            _shared_folder(runtime, existing(out)),
            _clocks(runtime),
            *_collectives(runtime),
        ]
    finally:
        runtime.close()


def _elsewhere(runtime: Runtime, own: Sequence[Finding]) -> Iterator[Finding]:
    """What is wrong on other nodes and not on rank 0's, once per node."""
    told = {runtime.peers[0].node}
    for peer, findings in zip(runtime.peers, runtime.gather_objects(list(own)), strict=True):
        if peer.node not in told:
            told.add(peer.node)
            for finding in findings:
                if finding.level in ("warning", "broken"):
                    yield replace(finding, text=f"on {peer.node}: {finding.text}")


def _shared_folder(runtime: Runtime, folder: Path) -> Finding:
    """Rank 0 writes a file; every rank looks for it, as a checkpoint of several parts needs."""
    folder, name = runtime.broadcast((folder.absolute(), f".distcl-doctor-{uuid.uuid4().hex}"))
    problem = ""
    if runtime.is_main:
        try:
            (folder / name).write_text("distcl\n")
        except OSError as error:
            problem = f"{folder} is not writable: {error.strerror}"
    problem = runtime.broadcast(problem)
    if problem:
        return Finding("broken", "shared folder", problem)
    deadline = time.monotonic() + _SEEN_SECONDS  # network file systems take their time
    while not (folder / name).exists() and time.monotonic() < deadline:
        if folder.is_dir():
            os.listdir(folder)  # makes NFS look again
        time.sleep(0.1)
    seen = runtime.gather_objects((folder / name).exists())
    if runtime.is_main:
        (folder / name).unlink()
    pairs = zip(runtime.peers, seen, strict=True)
    if blind := list(dict.fromkeys(peer.node for peer, sees in pairs if not sees)):
        text = f"{folder} of {runtime.peers[0].node} is another folder on {', '.join(blind)}"
        return Finding("broken", "shared folder", f"{text}; put --out on a shared file system")
    return Finding("ok", "shared folder", f"all processes see {folder}")


def _clocks(runtime: Runtime) -> Finding:
    """Compare the clocks right after a barrier, whose own spread is part of the figure."""
    runtime.barrier()
    clocks = runtime.gather_objects(time.time())
    return Finding("ok", "clocks", f"within {1e3 * (max(clocks) - min(clocks)):.0f} ms")


def _collectives(runtime: Runtime) -> Iterator[Finding]:
    """Time sums over all ranks: of 8 bytes for the latency, of 16 MiB for the bandwidth."""
    import torch

    small = _seconds(runtime, torch.zeros(2, device=runtime.device), 50)
    yield Finding("ok", "latency", f"{1e6 * small:,.0f} µs for a sum of 8 bytes over all ranks")
    large = _seconds(runtime, torch.zeros(_LARGE // 4, device=runtime.device), 5)
    # what a link carries for it in a ring: 2 (W-1)/W of the bytes, each way
    carried = 2 * (runtime.world_size - 1) / runtime.world_size * _LARGE
    text = f"{carried / large / 1e9:.2f} GB/s per rank in a sum of {_LARGE // _MIB} MiB"
    yield Finding("ok", "bandwidth", text)


def _seconds(runtime: Runtime, tensor: torch.Tensor, times: int) -> float:
    """Return the median seconds of one sum over all ranks, as rank 0 sees it."""
    import torch

    taken = []
    for _ in range(times + 2):
        begun = time.perf_counter()
        runtime.all_reduce(tensor)
        if tensor.is_cuda:
            torch.cuda.synchronize(tensor.device)
        taken.append(time.perf_counter() - begun)
    return runtime.broadcast(median(taken[2:]))  # the first ones make connections
