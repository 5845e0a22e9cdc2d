"""Online learning: with one epoch and plain draws, every sample is trained on exactly once."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from distcl.data.stream import create_stream
from distcl.types import Batch
from distcl.updaters import Updater
from distcl.updaters.base import StepResult
from tests.small import execute, small
from tests.spawn import run_ranks

SEEN: list[int] = []


class Recording(Updater):
    def fwd_bwd(self, batch: Batch, hist_batch: Batch | None) -> StepResult:
        SEEN.extend(batch.ids.tolist())
        return super().fwd_bwd(batch, hist_batch)


ONLINE = (
    "training.epochs=1",
    "training.pretrain_epochs=0",
    "training.batch_size=16",
    "continual_learning.importance_weighting=false",
    "continual_learning.update_mode=tests.dist.test_online:Recording",
)


def _seen(command: str, overrides: tuple[str, ...], out: Path) -> tuple[list[int], int]:
    summary = execute(command, overrides, out)
    return list(SEEN), len(summary["rounds"])


@pytest.mark.parametrize("world", [1, 2])
def test_scheduled_rounds_see_each_sample_once(world: int, tmp_path: Path) -> None:
    parts = run_ranks(world, _seen, "train", ONLINE, tmp_path)
    seen = Counter(i for part, _ in parts for i in part)
    stream = create_stream(small(*ONLINE).stream, 0)
    every = [i for e in stream.experiences for i in e.train.tolist()]
    assert seen == Counter(every) and len(every) == 903


def test_rounds_on_drift_see_no_sample_twice(tmp_path: Path) -> None:
    overrides = (
        *ONLINE,
        "detector.name=tests.monitor_parts:Every",
        "detector.options={n=120}",
        "monitor.batch_size=50",
        "monitor.holdout_fraction=0.1",
    )
    seen, rounds = run_ranks(1, _seen, "run", overrides, tmp_path)[0]
    assert rounds > 3 and max(Counter(seen).values()) == 1
    assert len(seen) > 0.85 * 120 * rounds
