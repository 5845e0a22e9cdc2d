"""The scripts of examples/: killed, resumed, they end as an uninterrupted run does."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.spawn import free_port

EXAMPLES = Path(__file__).parent.parent.parent / "examples"


def digest(script: str, *arguments: str, ranks: int, died: bool = False) -> str:
    start = [sys.executable]
    if ranks > 1:
        start += ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
        start += ["--master-port", str(free_port())]
    ended = subprocess.run(
        [*start, str(EXAMPLES / script), *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (ended.returncode != 0) == died, ended.stdout + ended.stderr
    return "".join(re.findall(r"digest \w{12}", ended.stdout))


@pytest.mark.parametrize(
    ("script", "needs", "ranks", "at"),
    [
        ("plain_torch.py", [], 1, 39),
        ("hf_trainer.py", ["transformers"], 2, 17),
        ("lightning_trainer.py", ["lightning", "torchdata"], 1, 33),
    ],
)
def test_killed_and_resumed(
    script: str, needs: list[str], ranks: int, at: int, tmp_path: Path
) -> None:
    if missing := [name for name in needs if not find_spec(name)]:
        pytest.skip(f"{', '.join(missing)} is not installed")
    whole = digest(script, str(tmp_path / "whole"), ranks=ranks)
    assert whole
    assert not digest(script, str(tmp_path / "cut"), f"--die-at={at}", ranks=ranks, died=True)
    assert digest(script, str(tmp_path / "cut"), ranks=ranks) == whole
