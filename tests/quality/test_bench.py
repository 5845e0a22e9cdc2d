"""Benchmarks run, and what they say holds with slack, on a machine that does other things too."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from distcl.bench.anchor import OF_MODEL
from distcl.bench.measure import on_ranks
from distcl.bench.rows import Row
from tests.spawn import distcl


def test_reading_shards_is_faster_than_the_library(tmp_path: Path) -> None:
    done = distcl("bench", "shards", "--quick", "--json", str(tmp_path / "b.json"))
    assert done.returncode == 0, done.stderr
    rows = {row["name"]: row for row in json.loads((tmp_path / "b.json").read_text())}
    assert {"name", "ours", "theirs", "ratio", "target", "pass"} <= rows["shards streaming"].keys()
    assert rows["shards streaming"]["ratio"] > 0.8
    assert rows["shards indexed"]["ours"] > 0
    assert rows["shards streaming, weighted, npy, 0 workers"]["ratio"] > 1.5
    assert "shards streaming" in done.stdout


@pytest.mark.timeout(120)
def test_the_anchor_takes_its_share_of_the_model() -> None:
    small, large = (on_ranks(2, OF_MODEL, "ddp", millions) for millions in (1, 4))
    slope = (large["anchor_bytes"] - small["anchor_bytes"]) / (3 << 20)
    replica = (large["replica_bytes"] - small["replica_bytes"]) / (3 << 20)
    assert slope == pytest.approx(2, rel=0.1)
    assert replica > 3.5


def test_a_row_knows_whether_its_target_is_reached() -> None:
    assert Row("a", 1.0, 1.0, "s", 1.0, "<= 1.05").passed
    assert not Row("a", 1.0, 1.0, "s", np.nextafter(1.05, 2), "<= 1.05").passed
    assert Row("a", 1.0, None, "s", 5.0, ">= 5").passed
    assert Row("a", 1.0, None, "s", 5.0).passed is None


def test_unknown_benchmarks_and_folders_are_named(tmp_path: Path) -> None:
    done = distcl("bench", "anchro")
    assert done.returncode == 2
    assert "unknown benchmark 'anchro', did you mean 'anchor'?" in done.stderr
    done = distcl("bench", "anchor", "--json", str(tmp_path / "no" / "b.json"))
    assert done.returncode == 2
    assert "does not exist" in done.stderr
