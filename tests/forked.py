"""The command line in real processes, one a rank, forked from a server that has imported torch."""

from __future__ import annotations

import functools
import multiprocessing
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from unittest.mock import patch

from click.testing import Result
from typer.testing import CliRunner

from tests.spawn import _context, free_port, preload, rank_environment

for module in ("distcl.cli.app", "distcl.cli.training"):
    preload(module)

_POLLING = threading.Lock()
"""Held while processes are started or asked how they ended.

A start asks all processes how they ended, those of other threads too; an exit code can be read only
once, and whoever comes second takes it for 255.
"""


@dataclass
class Ended:
    """How the processes of a run ended. ``codes``: of each rank, None where it had to be killed."""

    codes: list[int | None]
    text: str

    @property
    def hung(self) -> bool:
        return None in self.codes


class Started:
    """The processes of a run of ``distcl`` that has been started.

    What they print is appended to the file ``said``, errors to ``errors`` if that is given.
    ``first(rank)`` is called in each process before the command line; it must be picklable.
    """

    def __init__(
        self,
        argv: Sequence[str],
        said: Path,
        world: int = 1,
        first: Callable[[int], None] | None = None,
        environment: Mapping[str, str] | None = None,
        errors: Path | None = None,
    ) -> None:
        port = free_port()
        said.parent.mkdir(parents=True, exist_ok=True)
        self._said = said
        self._from = said.stat().st_size if said.exists() else 0
        self.processes = [
            _context.Process(
                target=_rank,
                args=(
                    {
                        **(environment or {}),
                        **(rank_environment(rank, world, port) if world > 1 else {}),
                    },
                    said,
                    errors or said,
                    rank,
                    first,
                    list(argv),
                ),
            )
            for rank in range(world)
        ]
        with _POLLING:
            for process in self.processes:
                process.start()

    def end(self, limit: float | None = 60.0) -> Ended:
        """Wait for the end of all processes; kill those that are left after so many seconds."""
        deadline = None if limit is None else time.monotonic() + limit
        for process in self.processes:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            wait([process.sentinel], left)
        with _POLLING:
            codes = [process.exitcode for process in self.processes]
            for process in self.processes:
                process.kill()
                process.join()
        said = self._said.read_bytes() if self._said.exists() else b""
        text = said[self._from :].decode(errors="replace")
        return Ended(codes, text)


def start(arguments: Sequence[str], environment: Mapping[str, str]) -> tuple[int, str]:
    """Run one process to its end, however long; see ``distcl.reporting.comparison.Start``."""
    with tempfile.TemporaryDirectory() as folder:
        ended = Started(arguments, Path(folder) / "said", environment=environment).end(None)
    return ended.codes[0] or 0, ended.text


def compare(*args: str) -> Result:
    """Run ``distcl compare`` here, and its runs in processes that have nothing to import."""
    from distcl.cli.app import app
    from distcl.reporting import comparison

    forked = functools.partial(comparison.run_plan, start=start)
    with patch.object(comparison, "run_plan", forked), patch.dict(os.environ, OMP_NUM_THREADS="1"):
        return CliRunner().invoke(app, ["compare", *args, "--quiet"])


def distcl(
    *args: str, ranks: int = 1, timeout: float = 150, **env: str
) -> subprocess.CompletedProcess[str]:
    """Run the command line as ``tests.spawn.distcl`` does, with nothing to import and no torchrun.

    Seconds faster each. The code is that of the first rank that did not end with 0.
    """
    outer = {k: v for k, v in os.environ.items() if not k.startswith("DISTCL_")}
    with tempfile.TemporaryDirectory() as folder:
        said, errors = Path(folder) / "said", Path(folder) / "errors"
        started = Started(
            args, said, ranks, environment=outer | {"OMP_NUM_THREADS": "1"} | env, errors=errors
        )
        ended = started.end(timeout)
        told = errors.read_text(errors="replace") if errors.exists() else ""
    assert not ended.hung, f"{args} did not end within {timeout:g} s: {ended.text}{told}"
    code = next((code for code in ended.codes if code), 0)
    return subprocess.CompletedProcess(args, code, ended.text, told)


def _rank(
    env: dict[str, str],
    said: Path,
    errors: Path,
    rank: int,
    first: Callable[[int], None] | None,
    argv: list[str],
) -> None:
    import torch

    from distcl.cli.app import main

    multiprocessing.set_start_method("fork", force=True)  # of its workers, as where distcl is typed
    os.environ.update(env)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    for number, path in ((1, said), (2, errors)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666), number)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
    if first is not None:
        first(rank)
    sys.argv = ["distcl", *argv]
    main()
