"""Open MPI's and MPICH's own launchers start runs that agree with one process."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.runs import draws, read
from tests.small import SMALL
from tests.spawn import distcl

ROOT = Path(__file__).parents[2]
JOB = ("train", "configs/digits.toml", *(w for one in SMALL for w in ("--set", one)))
STARTERS = {
    "mpirun.openmpi": ("--oversubscribe", "--bind-to", "none"),
    "mpiexec.hydra": (),
}


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    out = tmp_path_factory.mktemp("one") / "run"
    done = distcl(*JOB, "--set", "run.precision=fp64", "--out", str(out))
    assert done.returncode == 0, done.stderr
    return draws(out)


@pytest.mark.parametrize("starter", list(STARTERS))
def test_mpi_starts_two_ranks_that_draw_as_one(starter, reference, tmp_path):
    if shutil.which(starter) is None:
        pytest.skip(f"not installed: {starter} (tests/install installs it)")
    root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    out = tmp_path / "run"
    done = subprocess.run(
        [
            *(starter, *STARTERS[starter], "-n", "2", sys.executable, "-m", "distcl", *JOB),
            *("--set", "run.precision=fp64", "--out", str(out)),
        ],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | root,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    first = read(out, "log.txt").splitlines()[0]
    assert "started by mpirun: 2 processes; " in first and "ranks 0 to 1 on cpu" in first
    assert draws(out) == reference
