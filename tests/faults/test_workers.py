"""Processes that read ahead end with the one that they read for."""

import multiprocessing
import os
import signal
from multiprocessing.connection import Connection

import psutil
import pytest

from distcl.data.loader import BatchLoader
from tests.plans import SOURCE, Plan


def read_and_die(pids: Connection) -> None:
    """Start workers, tell who they are, and be killed."""
    loader = BatchLoader(SOURCE, Plan([[0], [1], [2], [3]]), workers=2)
    next(iter(loader))
    pids.send([p.pid for p in psutil.Process().children(recursive=True)])
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("method", ["fork", "forkserver"])
def test_workers_do_not_outlive_a_killed_process(method: str) -> None:
    mine, theirs = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context(method).Process(target=read_and_die, args=(theirs,))
    process.start()
    workers = [psutil.Process(pid) for pid in mine.recv()]
    process.join()
    assert len(workers) >= 2
    assert not psutil.wait_procs(workers, timeout=30)[1]
