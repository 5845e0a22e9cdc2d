"""Whole runs over shards: as over arrays, at every world size, with faults."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from distcl import Anchor, Runtime, compute_sample_priorities, registry
from distcl.config import DataConfig
from distcl.config.load import load_config
from distcl.data.shards.manifest import read_shards
from distcl.data.shards.inputs import ArraySamples
from distcl.data.shards.indexed import ShardSource
from distcl.data.shards.sequential import StreamedSource
from distcl.data.shards.writer import append_shards, write_shards
from distcl.parallel.inference import ShardedForward
from distcl.job import execute
from distcl.parallel.partition import create_partition
from distcl.priority.scoring import Scorer
from distcl.priority.signals import create_signal
from distcl.priority.population import Dealer
from tests.spawn import distcl, run_ranks
from tests.files import write_cifar

ROOT = Path(__file__).parents[2]
SHORT = [
    "--set=training.epochs=2",
    "--set=training.pretrain_epochs=2",
    "--set=stream.experiences=3",
    "--set=model.options.hidden=[16]",
    "--set=run.precision=fp64",
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits in an .npz and in three shards."""
    from sklearn.datasets import load_digits

    folder = tmp_path_factory.mktemp("data")
    x, y = load_digits(return_X_y=True)
    x = (x * 15.9).astype(np.uint8).reshape(-1, 8, 8)
    held_out = {"x_test": x[600:800], "y_test": y[600:800]}
    np.savez(folder / "digits.npz", x=x[:600], y=y[:600], **held_out)
    write_shards(ArraySamples(folder / "digits.npz"), folder / "shards", per_shard=250)
    return folder


def train(config: str, out: Path, *sets: str, ranks: int = 1) -> dict[str, Any]:
    """Run ``distcl train``: in this process, or on real ranks."""
    if ranks == 1:
        short = [s.removeprefix("--set=") for s in SHORT]
        return execute("train", load_config(ROOT / config, [*short, *sets]), out)
    options = [f"--set={s}" for s in sets]
    done = distcl("train", config, *SHORT, *options, "--quiet", "--out", str(out), ranks=ranks)
    assert done.returncode == 0, done.stderr
    summary: dict[str, Any] = json.loads((out / "summary.json").read_text())
    return summary


def essence(summary: dict[str, Any]) -> Any:
    return summary["accuracy"], [r["draws_sha256"] for r in summary["rounds"]]


def note(sample: dict[str, Any], log: str) -> dict[str, Any]:
    """A transform that writes down what is decoded."""
    with open(log, "a") as file:
        file.write(f"{sample['__id__']}\n")
    return sample


def score(folder: Path, log: Path, access: str) -> tuple[list[int], list[float]]:
    runtime = Runtime()
    shards_ = read_shards(folder).split("train")
    spec = {"name": f"{__name__}:note", "log": str(log)}
    data = DataConfig(transforms=[spec], access=access)
    torch.manual_seed(0)
    model = runtime.prepare(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10)))
    criterion = torch.nn.CrossEntropyLoss(reduction="none")
    anchor = Anchor(create_partition(runtime, model))
    if access == "stream":
        streamed = StreamedSource(folder, shards_, data, "cls", "", "streamed")

        def lanes_of(ids: np.ndarray, lanes: int) -> np.ndarray:
            shard, shards = streamed.shards_of(ids)
            return shard * lanes // shards

        forward = ShardedForward(runtime, model, create_partition(runtime, model), criterion)
        scorer = Scorer(forward, anchor, create_signal("loss", criterion=criterion), 64)
        every = np.arange(len(streamed))
        slices = Dealer.over(runtime, 8, lanes_of).deal(every)
        ids, scores = slices.ids, scorer.score_slices(streamed, every, slices).numpy()
        assert scorer.forward.forwards == len(streamed)
    else:
        source = ShardSource(folder, shards_, data)
        ids, scores = compute_sample_priorities(
            model, anchor, source, criterion, runtime=runtime, signal="loss", batch_size=64
        )
    runtime.close()
    return ids.tolist(), scores.tolist()


@pytest.mark.parametrize("count", [1, 2, 5])
def test_every_sample_is_scored_once_over_all_ranks(data, tmp_path, count):
    """By streams, each rank has the scores of its own lanes, and they are those of any other."""
    folder = tmp_path / "s"
    write_shards(ArraySamples(data / "digits.npz"), folder, per_shard=600 // count)
    found = {}
    for access in ("indexed", "stream"):
        log = tmp_path / access
        found[access] = run_ranks(2, score, folder, log, access)
        decoded = [int(line) for line in log.read_text().split()]
        assert sorted(decoded) == list(range(600))
    every, scores = found["indexed"][0]
    assert found["indexed"][1] == (every, scores) and every == list(range(600))
    (first, some), (second, others) = found["stream"]
    assert first + second == every and (len(second) > 0) == (count > 1)
    np.testing.assert_allclose(some + others, scores, rtol=1e-5)


def test_shards_give_the_draws_and_accuracies_of_the_same_arrays(data, tmp_path):
    config = "configs/digits.toml"
    arrays = train(
        config, tmp_path / "a", "stream.source=arrays", f"stream.path={data / 'digits.npz'}"
    )
    over = ["stream.source=shards", f"stream.path={data / 'shards'}", "data.verify=true"]
    one = train(config, tmp_path / "b", *over, "data.workers=2")
    two = train(config, tmp_path / "c", *over, ranks=2)
    assert essence(arrays) == essence(one) == essence(two)
    assert one["bad_samples"] == 0


def test_streams_give_the_same_run_at_one_and_two_ranks(data, tmp_path):
    folder = tmp_path / "s"
    made = distcl("shard", "digits", str(folder), "--per-shard", "120")
    assert made.returncode == 0, made.stderr
    over = ["stream.source=shards", f"stream.path={folder}", "data.access=stream"]
    over += ["data.shuffle_buffer=100", "stream.experiences=2", "training.epochs=1"]
    one = train("configs/digits.toml", tmp_path / "one", *over, "data.workers=2")
    two = train("configs/digits.toml", tmp_path / "two", *over, ranks=2)
    assert essence(one) == essence(two) and one["average_accuracy"] > 0.5


def test_the_commands_that_the_shipped_configs_name_make_their_shards(tmp_path):
    made = distcl("shard", "digits", str(tmp_path / "s"), "--per-shard", "300")
    assert made.returncode == 0, made.stderr
    summary = train("configs/shards-digits.toml", tmp_path / "out", f"stream.path={tmp_path / 's'}")
    assert summary["bad_samples"] == 0 and summary["average_accuracy"] > 0.5
    write_cifar(tmp_path / "cifar", 10, {"data_batch_1.bin": 40, "test_batch.bin": 40})
    path = f"stream.path={tmp_path / 'cifar'}"
    made = distcl("shard", "cifar10", str(tmp_path / "c"), "--workers", "2", "--set", path)
    assert made.returncode == 0, made.stderr
    shard = read_shards(tmp_path / "c").shards[0]
    assert shard.samples == 40 and shard.bytes < 40 * 5200  # pixels stay bytes
