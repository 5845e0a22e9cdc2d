"""The lock of a run folder: one run at a time, and no dead one for ever."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from distcl.config import Config
from distcl.errors import UsageError
from distcl.reporting.run_folder import RunFolder

FULL = """
import logging, resource, signal, sys
from pathlib import Path
from distcl.config import Config
from distcl.reporting.run_folder import RunFolder

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
with RunFolder(Path(sys.argv[1]), Config(), True).open():
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, resource.RLIM_INFINITY))
    for k in range(9):
        logging.getLogger("distcl").info("a line that the disk may have no room for")
print("done")
"""


HOLDER = """
import os, signal, sys, time
from pathlib import Path
from distcl.config import Config
from distcl.reporting.run_folder import RunFolder

seconds = float(sys.argv[2])
with RunFolder(Path(sys.argv[1]), Config(), True).open():
    if os.fork() == 0:  # a worker
        time.sleep(seconds)
        os._exit(0)
    print("held", flush=True)
    time.sleep(float(sys.argv[3]))
    os.kill(os.getpid(), signal.SIGKILL)
"""


def _hold(folder: Path, workers: float, own: float) -> subprocess.Popen[str]:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder), str(workers), str(own)],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    return holder


def test_a_folder_in_use_names_the_process_that_has_it(tmp_path: Path) -> None:
    holder = _hold(tmp_path, 0, 30)
    begun = time.monotonic()
    with (
        pytest.raises(UsageError, match=f"in use by another run .process {holder.pid} on "),
        RunFolder(tmp_path, Config(), True).open(),
    ):
        pass
    assert time.monotonic() - begun < 5
    holder.kill()
    holder.communicate()


def test_the_lock_of_a_killed_run_is_free_once_its_workers_are_gone(tmp_path: Path) -> None:
    holder = _hold(tmp_path, 3, 0)
    holder.wait()
    begun = time.monotonic()
    with RunFolder(tmp_path, Config(), True).open("auto"):
        assert 1 < time.monotonic() - begun < 10


def test_a_log_that_the_disk_has_no_room_for_does_not_end_the_run(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")
