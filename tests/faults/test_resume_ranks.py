"""A run that goes on at three ranks or more equals one never interrupted, bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.test_resume import go, interrupted, outcome
from tests.spawn import run_ranks

KEYS = (
    "stream.experiences=2",
    "model.options.hidden=[64,64]",
    "optimizer.momentum=0.9",
    "priority.signal=loss",
    "priority.correction=0.7",
    "training.batch_size=47",
)
"""Parts of unlike size, unlike weights, and many steps in which a last bit may grow."""

CASES = [
    (3, ()),
    (4, ("training.accumulate=2",)),
    (3, ("model.name=tests.theirs:Branching", "model.options={}")),
]


@pytest.mark.parametrize(("world", "keys"), CASES)
def test_ranks_go_on_bit_for_bit(world: int, keys: tuple[str, ...], tmp_path: Path) -> None:
    keys = (*KEYS, *keys)
    assert run_ranks(world, go, "train", keys, tmp_path / "whole", 0, "never") == ["done"] * world
    interrupted("train", keys, tmp_path / "parts", world, (4,))
    assert outcome(tmp_path / "parts") == outcome(tmp_path / "whole")
