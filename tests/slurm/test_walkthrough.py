"""The walkthrough of docs/CLUSTER.md, as it stands there."""

import json
import re
import subprocess
from pathlib import Path

import pytest

from tests.runs import read, status

ROOT = Path(__file__).parents[2]


@pytest.mark.timeout(300)
def test_the_walkthrough_of_the_docs_works(cluster, tmp_path):
    text = (ROOT / "docs" / "CLUSTER.md").read_text(encoding="utf-8")
    block = re.search(r"<!-- walkthrough -->\n```bash\n(.*?)```\n<!-- end -->", text, re.DOTALL)
    assert block
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    environ = {k: v for k, v in cluster.env.items() if k != "PYTHON"}
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block[1]],
        cwd=tmp_path,
        env=environ,
        capture_output=True,
        text=True,
        timeout=240,
    )
    out = tmp_path / "runs" / "first"
    said = "".join(path.read_text() for path in out.glob("slurm-*.out"))
    assert done.returncode == 0, done.stderr + said
    assert re.search(r"^submitted job \d+; its output: runs/first/slurm-", done.stdout)
    assert status(out)["state"] == "done"
    assert "start 1: saved and requeued" in said
    assert "start 2: ended as done, exit code 0" in done.stdout
    assert "[resume] from " in read(out, "log.txt")
    assert len(json.loads(read(out, "summary.json"))["rounds"]) == 4
    assert "<svg" in read(out, "report.html") or "<img" in read(out, "report.html")
