"""Data of one's own at three ranks: uneven parts draw what one rank draws."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from distcl.config.load import load_config
from distcl.job import execute
from tests.config_files import _folder, _table
from tests.draws import outcome
from tests.spawn import run_ranks

PLAIN: dict[str, Any] = {
    "training": {"batch_size": 16, "epochs": 1},
    "model": {"name": "mlp", "options": {"hidden": [8]}},
    "continual_learning": {"update_mode": "er", "importance_weighting": True},
    "run": {"report": False},
}


def _job(stream: dict[str, Any], out: Path) -> tuple[Any, int]:
    execute("train", load_config({**PLAIN, "stream": stream}, environ={}), out)
    summary = json.loads((out / "summary.json").read_text())
    return outcome(out)["draws"], len(summary["accuracy"][0])


def _months(folder: Path) -> dict[str, Any]:
    pytest.importorskip("pandas", reason="the extra 'table' is not installed")
    options = {"target": "state", "time": "when", "categories": ["site"]}
    path = str(_table(folder))
    return {"source": "table", "path": path, "options": options, "experiences": "time:month"}


def _domains(folder: Path) -> dict[str, Any]:
    for name in ("a", "b", "c"):
        (folder / name).mkdir()
    listed = [str(_folder(folder / name)) for name in ("a", "b")]
    own = {"dataset": "configs.my_dataset:two_hands"}
    size = {"source": "folder", "options": {"size": 8, "mode": "grey"}}
    photos = [{"path": path, **size} for path in listed]
    return {"source": "torch", "options": own, "experiences": [*photos, {"path": ""}]}


@pytest.mark.parametrize("make", [_months, _domains])
def test_three_ranks_draw_what_one_does(make: Any, tmp_path: Path) -> None:
    stream = make(tmp_path)
    alone = _job(stream, tmp_path / "one")
    assert alone[1] == 3
    assert run_ranks(3, _job, stream, tmp_path / "three") == [alone] * 3
