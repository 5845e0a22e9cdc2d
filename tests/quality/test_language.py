"""The language model's comparison, as docs/LANGUAGE.md has it, on less text."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.forked import compare

ROOT = Path(__file__).parents[2]


@pytest.mark.timeout(600)
def test_prioritized_and_uniform_replay_are_compared_in_bits_per_byte(tmp_path: Path) -> None:
    done = compare(
        str(ROOT / "configs" / "lm.toml"),
        "--vs",
        "continual_learning.importance_weighting=false",
        "--seeds",
        "3",
        "--out",
        str(tmp_path / "out"),
        *("--set", "stream.options.max_bytes=8000"),
        *("--set", "model.options={dim = 32, depth = 1, heads = 2, length = 64}"),
    )
    assert done.exit_code == 0, done.output
    assert re.search(
        r"(is better here by|uniform minus prioritized sampling is) [+-]?\d\.\d+ bits per byte",
        done.stdout,
    ), done.stdout
    found = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert found["metric"] == "bits_per_byte" and found["higher_is_better"] is False
    (difference,) = found["differences"]
    assert difference["accuracy"]["n"] == 3
    assert all(2 < run["average_accuracy"] < 9 for arm in found["arms"] for run in arm["runs"])
