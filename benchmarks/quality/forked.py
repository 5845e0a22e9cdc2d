"""Runs of ``distcl`` forked from a server that has imported torch: seconds less for each."""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from multiprocessing.context import ForkServerContext
from pathlib import Path

PRELOADED = ["torch._dynamo", "accelerate", "distcl.cli.app", "distcl.cli.training", "distcl.job"]


class Forked:
    """Starts runs, each a process of its own; see :data:`distcl.reporting.comparison.Start`."""

    def __init__(self) -> None:
        self._context: ForkServerContext = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(PRELOADED)

    def __call__(self, arguments: Sequence[str], environment: Mapping[str, str]) -> tuple[int, str]:
        """Run ``distcl`` with the arguments; return its exit code and what it wrote to stderr."""
        with tempfile.TemporaryDirectory() as folder:
            complaint = Path(folder) / "stderr"
            child = self._context.Process(
                target=_run, args=(list(arguments), dict(environment), str(complaint)), daemon=True
            )
            child.start()
            child.join()
            code = child.exitcode
            child.close()
            return 1 if code is None else code, complaint.read_text(errors="replace")


def _run(arguments: list[str], environment: dict[str, str], complaint: str) -> None:
    os.environ.update(environment)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(os.open(complaint, os.O_WRONLY | os.O_CREAT), 2)
    import torch

    torch.set_num_threads(int(environment.get("OMP_NUM_THREADS", "1")))
    sys.argv = ["distcl", *arguments]
    from distcl.cli.app import main

    main()
