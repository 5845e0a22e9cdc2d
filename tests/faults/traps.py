"""Traps in a rank: at the n-th call of a function they strike: a signal, a full disk and so on."""

from __future__ import annotations

import atexit
import ctypes
import functools
import importlib
import itertools
import json
import os
import resource
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

POINTS = {
    "scoring": "distcl.priority.scoring:Scorer._row",
    "gather": "distcl.distributed.runtime:Runtime.all_gather",
    "refresh": "distcl.parallel.anchor:Anchor.refresh",
    "step": "distcl.training.step_loop:StepLoop._set_rate",
    "evaluation": "distcl.training.evaluation:Evaluator.score",
    "checkpoint write": "distcl.checkpoint.store:file_digest",
    "rename": "distcl.checkpoint.store:_rename",
}
"""The phases of a run by name, and a function that each of them calls."""


@dataclass(frozen=True)
class Trap:
    """Strike on one rank around the n-th call, from 1, of the function of a phase."""

    rank: int
    point: str
    call: int
    strike: Callable[[], None]
    after: bool = False


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def no_more_than(size: int) -> None:
    """Let no file grow beyond so many bytes: the disk is full for whatever is larger."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def set_clock_back(seconds: float) -> None:
    """Let ``time.time`` jump back; ``time.monotonic`` never does."""
    now = time.time
    time.time = lambda: now() - seconds


def obey_permissions() -> None:
    """Give up root's power to write where the permissions forbid it, for this thread and its own.

    That is CAP_DAC_OVERRIDE, bit 1 of the effective capabilities.
    """
    if os.geteuid():
        return
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    sets = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable; twice 32 bits
    assert libc.capget(header, sets) == 0
    sets[0] &= ~(1 << 1) & 0xFFFFFFFF
    assert libc.capset(header, sets) == 0


def forbid_writing(folder: Path) -> None:
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)


def remove(path: Path) -> None:
    with suppress(FileNotFoundError):
        path.unlink()


def _set(trap: Trap, calls: Iterator[int]) -> None:
    module, _, name = POINTS[trap.point].partition(":")
    owner: Any = importlib.import_module(module)
    *classes, name = name.split(".")
    for part in classes:
        owner = getattr(owner, part)
    function = getattr(owner, name)

    @functools.wraps(function)
    def trapped(*args: Any, **kwargs: Any) -> Any:
        due = next(calls) == trap.call
        if due and not trap.after:
            trap.strike()
        result = function(*args, **kwargs)
        if due and trap.after:
            trap.strike()
        return result

    setattr(owner, name, trapped)


def arm(traps: list[Trap], count: Path | None, rank: int) -> None:
    """Set the traps of this rank; rank 0 writes at its end how often each function was called."""
    mine = [trap for trap in traps if trap.rank == rank]
    counters = [itertools.count(1) for _ in mine]
    for trap, calls in zip(mine, counters, strict=True):
        if trap.point == "start":
            trap.strike()
        else:
            _set(trap, calls)
    if count is not None and rank == 0:
        atexit.register(_write_counts, count, mine, counters)  # main() ends the process


def _write_counts(path: Path, traps: list[Trap], counters: list[Iterator[int]]) -> None:
    found = {t.point: next(c) - 1 for t, c in zip(traps, counters, strict=True)}
    path.write_text(json.dumps(found))
