"""Every config draws on three ranks what ``draws.json`` records; see ``tests.draws``."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from distcl.config.load import load_config
from distcl.job import execute
from tests.config_files import CONFIGS, command_of, small_sets
from tests.draws import outcome, recorded
from tests.spawn import run_ranks


def _run(path: Path, sets: list[str], out: Path) -> None:
    execute(command_of(path), load_config(path, sets), out)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_three_ranks_draw_what_they_did(path: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    sets = small_sets(path, tmp_path / "data")
    strategy = load_config(path, sets).parallel.strategy
    if strategy.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed; type: pip install 'distcl[deepspeed]'")
    run_ranks(3, _run, path, sets, tmp_path / "out")
    assert outcome(tmp_path / "out")["draws"] == recorded(path, 3)["draws"]
