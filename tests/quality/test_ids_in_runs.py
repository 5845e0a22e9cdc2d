"""Every updater over a stream whose ids are kept in runs; slow, since there are many."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest

from distcl import registry
from tests.dist.test_shards import data, essence, train

__all__ = ["data"]  # a fixture


@pytest.mark.parametrize("name", [part.name for part in registry.parts("updater")])
def test_every_updater_learns_the_same_from_ids_in_runs_as_from_arrays(
    name: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    over = ["stream.source=shards", f"stream.path={data / 'shards'}", "data.access=stream"]
    over += ["training.epochs=1", "training.pretrain_epochs=1", "priority.guard=auto"]
    over += ["stream.experiences=2", "run.precision=fp32"]
    over += [f"continual_learning.update_mode={name}", "continual_learning.mix_historic_data=true"]
    over += ["continual_learning.importance_weighting=true", "run.report=false"]
    runs = train("configs/digits.toml", tmp_path / "runs", *over)
    seen = []

    def arrays(parts: Iterable[np.ndarray]) -> np.ndarray:
        seen.append(np.concatenate(list(parts)))
        return seen[-1]

    monkeypatch.setattr("distcl.data.stream.in_runs", arrays)
    assert essence(train("configs/digits.toml", tmp_path / "arrays", *over)) == essence(runs)
    assert [len(ids) for ids in seen] == [600] * 2
