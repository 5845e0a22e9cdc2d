"""Runs over shards that are killed in the middle go on exactly, by either access."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from distcl import job
from distcl.config import StreamConfig
from distcl.data.shards.inputs import open_samples
from distcl.data.shards.writer import write_shards
from tests.faults.test_resume import Killer, outcome
from tests.small import small
from tests.spawn import exit_codes, run_ranks

ACCESS = {
    "indexed": ("data.access=indexed",),
    "indexed with workers": ("data.access=indexed", "data.workers=2"),
    "stream": ("data.access=stream", "data.shuffle_buffer=40", "data.lanes=4"),
    "stream with workers": (
        "data.access=stream",
        "data.shuffle_buffer=100",
        "data.workers=2",
        "priority.target=union",
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits in nine shards."""
    path = tmp_path_factory.mktemp("data") / "shards"
    config = StreamConfig(source="digits")
    write_shards(open_samples("digits", stream=config), path, per_shard=170)
    return path


def keys_of(access: str, folder: Path) -> tuple[str, ...]:
    return (
        "run.poll_steps=3",
        "stream.source=shards",
        f"stream.path={folder}",
        "stream.samples_per_experience=300",
        "training.batch_size=20",
        "continual_learning.mix_historic_data=true",
        "checkpoint.every_steps=4",
        "checkpoint.every_round=false",
        *ACCESS[access],
    )


def go(keys: tuple[str, ...], out: Path, polls: int, resume: str) -> None:
    """Run a job; rank 0 kills itself after so many polls (0: never)."""
    main = int(os.environ.get("RANK", "0")) == 0
    shown = Killer(polls, signal.SIGKILL) if main and polls else None
    job.execute("train", small(*keys), out, shown, resume=resume)


def killed(keys: tuple[str, ...], out: Path, world: int, polls: int, resume: str) -> None:
    codes = exit_codes(world, go, keys, out, polls, resume)
    assert codes[0] == -signal.SIGKILL and 0 not in codes
    assert list((out / "checkpoints").glob("step-*"))


@pytest.mark.parametrize(
    ("access", "ranks"),
    [
        ("indexed with workers", 1),
        ("indexed", 2),
        ("stream with workers", 1),
        ("stream with workers", 2),
    ],
)
def test_a_killed_run_over_shards_goes_on_as_if_nothing_had_happened(
    access: str, ranks: int, folder: Path, tmp_path: Path
) -> None:
    keys, parts = keys_of(access, folder), tmp_path / "parts"
    run_ranks(ranks, go, keys, tmp_path / "whole", 0, "never")
    killed(keys, parts, ranks, 12, "never")
    killed(keys, parts, ranks, 7, "auto")
    run_ranks(ranks, go, keys, parts, 0, "auto")
    resumed, whole = outcome(parts), outcome(tmp_path / "whole")
    assert resumed == whole and len(whole["digests"]) == 2


@pytest.mark.parametrize(("before", "after"), [(3, 1), (1, 3)])
def test_a_streamed_run_goes_on_with_another_number_of_ranks(
    before: int, after: int, folder: Path, tmp_path: Path
) -> None:
    keys = (
        *keys_of("stream", folder),
        "run.precision=fp64",
        "priority.correction=0.5",
        "model.options.hidden=[4, 40]",
    )
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run_ranks(1, go, keys, whole, 0, "never")
    killed(keys, parts, before, 14, "never")
    run_ranks(after, go, keys, parts, 0, "auto")
    resumed, expected = outcome(parts), outcome(whole)
    for name in ("digests", "accuracy", "passes"):
        assert resumed[name] == expected[name]
    weights: list[dict[str, Any]] = [
        load_file(out / "checkpoints" / "final.safetensors") for out in (whole, parts)
    ]
    for name, value in weights[0].items():
        np.testing.assert_allclose(weights[1][name], value, rtol=1e-8, atol=1e-10)
