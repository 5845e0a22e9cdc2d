"""What several processes can do for distcl together: ``distcl doctor`` under a launcher."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch

from distcl.config import RunConfig
from distcl.doctor import Finding, existing
from distcl.errors import UsageError
from distcl.runtime import Runtime

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
    blind = list(
        dict.fromkeys(p.node for p, sees in zip(runtime.peers, seen, strict=True) if not sees)
    )
    if blind:
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
    small = _seconds(runtime, torch.zeros(2, device=runtime.device), 50)
    yield Finding("ok", "latency", f"{1e6 * small:,.0f} µs for a sum of 8 bytes over all ranks")
    large = _seconds(runtime, torch.zeros(_LARGE // 4, device=runtime.device), 5)
    # what a link carries for it in a ring: 2 (W-1)/W of the bytes, each way
    carried = 2 * (runtime.world_size - 1) / runtime.world_size * _LARGE
    text = f"{carried / large / 1e9:.2f} GB/s per rank in a sum of {_LARGE // _MIB} MiB"
    yield Finding("ok", "bandwidth", text)


def _seconds(runtime: Runtime, tensor: torch.Tensor, times: int) -> float:
    """Return the median seconds of one sum over all ranks, as rank 0 sees it."""
    taken = []
    for _ in range(times + 2):
        begun = time.perf_counter()
        runtime.all_reduce(tensor)
        if tensor.is_cuda:
            torch.cuda.synchronize(tensor.device)
        taken.append(time.perf_counter() - begun)
    return runtime.broadcast(median(taken[2:]))  # the first ones make connections
