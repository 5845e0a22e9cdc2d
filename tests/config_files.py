"""What makes each file of configs/ a small job: fewer samples, and data files of its source."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from distcl.config.load import load_config
from distcl.data.shards.inputs import ArraySamples
from distcl.data.shards.writer import write_shards
from tests.files import write_cifar, write_mnist

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.toml"))

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


def _jsonl(folder: Path) -> Path:
    lines = [{"text": f"{k * k}" * (k % 5 + 1), "site": "ab"[k % 2]} for k in range(300)]
    (folder / "notes.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder / "notes.jsonl"


def _table(folder: Path) -> Path:
    pytest.importorskip("pandas", reason="the extra 'table' is not installed")
    rng = np.random.default_rng(0)
    days = [f"2024-0{k % 3 + 1}-{k % 28 + 1:02}T{k % 24:02}:00" for k in range(500)]
    states = ["ok" if k % 5 else "bad" for k in range(500)]
    lines = [f"{days[k]},{rng.random()},{'abc'[k % 3]},{states[k]}" for k in range(500)]
    (folder / "sensor.csv").write_text("\n".join(["when,heat,site,state", *lines]))
    return folder / "sensor.csv"


def _folder(folder: Path) -> Path:
    image = pytest.importorskip("PIL.Image", reason="the extra 'data' is not installed")
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (folder / "photos" / name).mkdir(parents=True)
        for k in range(80):  # sizes, modes and formats mixed
            shape = (9 + k % 3, 10, 3) if k % 2 else (9, 11)
            pixels = image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8))
            pixels.save(folder / "photos" / name / f"{k}.{('png', 'jpg')[k % 5 > 2]}")
    return folder / "photos"


FILES: dict[str, Callable[[Path], Path]] = {
    "mnist": _mnist,
    "cifar10": _cifar10,
    "shards": _shards,
    "arrays": _arrays,
    "hf": _hf,
    "jsonl": _jsonl,
    "table": _table,
    "folder": _folder,
}
"""Writes small files of the right format into a folder and returns stream.path."""

SMALL_NET = ["model.options.width=4", "stream.samples_per_experience=40"]
LESS = {
    "cifar10-binary": SMALL_NET,
    "cifar10": SMALL_NET,
    "folder": ["stream.options.size=12", "data.workers=0", "stream.samples_per_experience=60"],
    "lora": ["stream.options.max_bytes=9000", "model.lora.r=2"],
    "lm": ["stream.options.max_bytes=9000", "model.options.dim=16", "model.options.depth=1"],
}
"""What else makes a config small."""


def small_sets(path: Path, folder: Path) -> list[str]:
    """``--set`` values that make a config small; data files go into ``folder``."""
    config = load_config(path)
    if config.model.name.startswith("hf:"):
        for package in ("transformers", "peft"):
            pytest.importorskip(package, reason="the extra 'transformers' is not installed")
    sets = [*SMALLER, *LESS.get(path.stem, [])]
    if config.stream.path:
        make = FILES.get(config.stream.source)
        assert make is not None, f"say in FILES how to make files for '{config.stream.source}'"
        sets.append(f"stream.path={make(folder)}")
    return sets


def command_of(path: Path) -> str:
    return "run" if f"distcl run configs/{path.name}" in path.read_text() else "train"
