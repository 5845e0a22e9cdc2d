import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_an_error_before_the_runtime_is_told_once_whatever_rank_meets_it_first(tmp_path):
    launched = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "3"]
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environ.pop("DISTCL_DEBUG", None)
    done = subprocess.run(
        [*launched, "-m", "distcl", "train", "absent.toml"],
        cwd=tmp_path,
        env=environ,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode != 0
    assert done.stderr.count("distcl: absent.toml: no such file\n") == 1
    assert done.stdout == ""
