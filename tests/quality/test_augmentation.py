"""Random transforms: the same training at every number of ranks and workers, and resumed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from distcl.config import StreamConfig
from distcl.data.shards.inputs import open_samples
from distcl.data.shards.writer import write_shards
from distcl.errors import ConfigError
from tests.faults.test_resume import go
from tests.spawn import run_ranks

BASE = (
    "data.transforms=['flip', {name='crop', size=8, pad=2, random=true}]",
    "run.precision=fp64",
    "training.batch_size=23",
    "training.pretrain_epochs=1",
    "continual_learning.mix_historic_data=true",
    "optimizer.momentum=0.9",
)
WAYS = {
    "score": ("priority.source=score", "priority.signal=loss", "priority.correction=0.7"),
    "online": ("priority.source=online", "priority.signal=entropy", "priority.correction=0.7"),
    "stream": (
        "priority.source=score",
        "priority.signal=loss",
        "data.access=stream",
        "data.lanes=5",
    ),
    "candidates": ("priority.source=candidates", "priority.signal=loss", "priority.target=union"),
}


def left(out: Path) -> tuple[Any, Any, dict[str, Any]]:
    summary = json.loads((out / "summary.json").read_text())
    weights = load_file(out / "checkpoints" / "final.safetensors")
    draws = [r["draws_sha256"] for r in summary["rounds"]]
    return draws, np.array(summary["accuracy"], float), weights


@pytest.mark.parametrize("way", WAYS)
def test_training_is_the_same_at_three_ranks_with_workers_and_resumed(tmp_path, way):
    keys = (*BASE, *WAYS[way])
    if way == "stream":
        samples = open_samples("digits", stream=StreamConfig())
        write_shards(samples, tmp_path / "s", per_shard=200)
        keys += ("stream.source=shards", f"stream.path={tmp_path / 's'}")
    assert go("train", keys, tmp_path / "one", 0, "never") == "done"
    more = (*keys, "data.workers=1") if way == "score" else keys
    out = tmp_path / "three"
    if way == "score":  # in the midst of an epoch of round 1
        assert run_ranks(3, go, "train", more, out, 8, "never") == ["preempted"] * 3
    assert run_ranks(3, go, "train", more, out, 0, "auto") == ["done"] * 3
    (draws, accuracy, weights), (others, again, same) = left(tmp_path / "one"), left(out)
    assert draws == others
    np.testing.assert_allclose(again, accuracy, atol=1e-9)
    for name, value in weights.items():
        np.testing.assert_allclose(same[name], value, atol=1e-9)
    if way == "score":  # they do change what is trained on, and nothing that is drawn at first
        assert go("train", keys[1:], tmp_path / "plain", 0, "never") == "done"
        plain = left(tmp_path / "plain")[2]
        assert max(np.abs(plain[name] - value).max() for name, value in weights.items()) > 1e-3


def test_copies_are_of_plain_samples_so_random_transforms_are_refused(tmp_path):
    copied = (*BASE, "continual_learning.history_store=copy")
    with pytest.raises(ConfigError, match=r"data\.transforms has 'flip', which is random.* 'copy'"):
        go("train", copied, tmp_path / "a", 0, "never")
    keys = (*copied[1:], "data.transforms=[{name='resize', size=6}]")
    assert go("train", keys, tmp_path / "b", 0, "never") == "done"
    assert go("train", (*keys[:-2], keys[-1]), tmp_path / "c", 0, "never") == "done"
    for one, other in zip(left(tmp_path / "b"), left(tmp_path / "c"), strict=True):
        np.testing.assert_equal(one, other)
