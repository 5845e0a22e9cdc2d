"""Every file in configs/ runs: through its own command, on few samples, one pass a round.

A new config is enrolled by being there. One whose source reads files needs a maker of such files in
``FILES``; one for another strategy than ddp, or for several processes, runs on two real ranks.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from distcl import registry
from distcl.config import Config
from distcl.config.load import load_config
from distcl.data.shards.inputs import ArraySamples
from distcl.data.shards.writer import write_shards
from distcl.job import execute
from tests.spawn import distcl
from tests.unit.test_data_files import write_cifar, write_mnist

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.toml"))

SMALLER = (
    "training.epochs=1",
    "training.pretrain_epochs=1",
    "training.batch_size=32",
    "stream.samples_per_experience=100",
    "monitor.collect=20",
)


def _mnist(folder: Path) -> Path:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (400, 28, 28), dtype=np.uint8)
    write_mnist(folder, images, (np.arange(400) % 10).astype(np.uint8), at=300)
    return folder


def _cifar10(folder: Path) -> Path:
    write_cifar(folder, 10, {"data_batch_1.bin": 500, "test_batch.bin": 50})
    return folder


def _shards(folder: Path) -> Path:
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (500, 3, 32, 32), dtype=np.uint8)
    npz = folder / "whole.npz"
    np.savez(npz, x=x[:400], y=np.arange(400) % 10, x_test=x[400:], y_test=np.arange(100) % 10)
    write_shards(ArraySamples(npz), folder / "shards", per_shard=100)
    return folder / "shards"


def _arrays(folder: Path) -> Path:
    x = np.random.default_rng(0).random((800, 5), dtype=np.float32)
    np.savez(folder / "train.npz", x=x, y=np.arange(800) % 3)
    return folder / "train.npz"


def _hf(folder: Path) -> Path:
    datasets = pytest.importorskip("datasets", reason="the extra 'data' is not installed")
    images = np.random.default_rng(0).integers(0, 256, (500, 8, 8), dtype=np.uint8)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    columns = {"image": list(images), "label": (np.arange(500) % 10).tolist()}
    datasets.Dataset.from_dict(columns, features=features).save_to_disk(str(folder / "hf"))
    return folder / "hf"


FILES: dict[str, Callable[[Path], Path]] = {
    "mnist": _mnist,
    "cifar10": _cifar10,
    "shards": _shards,
    "arrays": _arrays,
    "hf": _hf,
}
"""Writes small files of the right format into a folder and returns stream.path."""

SMALL_NET = ["model.options.width=4", "stream.samples_per_experience=40"]
LESS = {"cifar10-binary": SMALL_NET, "cifar10": SMALL_NET}
"""What else makes a config small."""


def _sets(path: Path, folder: Path) -> list[str]:
    config = load_config(path)
    sets = [*SMALLER, *LESS.get(path.stem, [])]
    if config.stream.path:
        make = FILES.get(config.stream.source)
        assert make is not None, f"say in FILES how to make files for '{config.stream.source}'"
        sets.append(f"stream.path={make(folder)}")
    return sets


def _one_process(config: Config) -> bool:
    return config.parallel.strategy == "ddp" and config.parallel.processes < 2


def test_every_method_stands_in_a_config() -> None:
    configs = [load_config(path) for path in CONFIGS]
    shown = {
        "updater": {c.continual_learning.update_mode for c in configs},
        "signal": {c.priority.signal for c in configs if c.continual_learning.importance_weighting},
        "detector": {c.detector.name for c in configs},
        "drift": {name for c in configs for name in c.stream.drifts},
        "source": {c.stream.source for c in configs} | {"cifar100"},  # as cifar10, but for its name
    }
    for kind, names in shown.items():
        assert names == {part.name for part in registry.parts(kind)}, kind


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_shipped_config_runs_and_nothing_warns(
    path: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    recwarn: pytest.WarningsRecorder,
) -> None:
    command = "run" if f"distcl run configs/{path.name}" in path.read_text() else "train"
    sets = _sets(path, tmp_path)
    strategy = load_config(path, sets).parallel.strategy
    if strategy.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed; type: pip install 'distcl[deepspeed]'")
    if not _one_process(load_config(path, sets)):
        arguments = [word for text in sets for word in ("--set", text)]
        done = distcl(command, str(path), "--out", str(tmp_path / "out"), *arguments, ranks=2)
        assert done.returncode == 0, done.stderr
        assert not done.stderr, done.stderr
        return
    config = load_config(path, sets)
    capfd.readouterr()
    summary = execute(command, config, tmp_path / "out")
    assert not capfd.readouterr().err
    assert not [str(w.message) for w in recwarn]
    assert summary["status"] == "done"
    assert all(math.isfinite(a) for row in summary["accuracy"] for a in row if a is not None)
    if command == "train":
        first = bool(config.training.pretrain_epochs and not config.model.pretrained)
        assert len(summary["rounds"]) + first == config.stream.experiences
