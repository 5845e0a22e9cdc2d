"""Benchmarks on real shards and ranks; their ratios hold with slack, on a busy machine too."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.spawn import distcl


@pytest.mark.timeout(170)
def test_reading_shards_and_the_anchor_are_about_as_good_as_they_should(tmp_path: Path) -> None:
    out = tmp_path / "rows.json"
    done = distcl("bench", "shards", "anchor", "--quick", "--json", str(out), timeout=160)
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text())
    told = {row["name"]: row["ratio"] for row in rows if row["target"]}
    memory = [ratio for name, ratio in told.items() if "bytes a parameter" in name]
    assert memory == [pytest.approx(1, rel=0.1)]
    shards = {name: ratio for name, ratio in told.items() if "anchor" not in name}
    assert shards
    for name, ratio in shards.items():
        assert ratio > 0.5 * float(next(r["target"] for r in rows if r["name"] == name)[2:]), name
