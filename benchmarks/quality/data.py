"""MNIST for the studies: found or not, cut to size, with noisy labels or uneven classes."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from distcl.config import StreamConfig
from distcl.data.sources.arrays import ArraySource
from distcl.data.sources.npy import open_npz

ROOT = Path(__file__).resolve().parents[2]
USUAL = ROOT.parent / "shared" / "data" / "mnist.npz"
HELD_OUT = 4_000
CLASSES = 10


def prepare(given: Path, folder: Path) -> Path:
    """Return an .npz, written once, of all training images and 4,000 test images, uncompressed.

    Uncompressed, so that every run maps it into memory instead of inflating it.
    """
    path = folder / "mnist.npz"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with np.load(given) as arrays:
            found = {name: arrays[name] for name in arrays.files}
        found |= {name: found[name][:HELD_OUT] for name in ("x_test", "y_test")}
        temporary = folder / "mnist.part.npz"
        np.savez(temporary, **found)
        temporary.replace(path)
    return path


def mnist(
    config: StreamConfig, noise: float = 0.0, imbalance: float = 1.0
) -> tuple[ArraySource, ArraySource]:
    """Return (train, test) of ``stream.path``, as :func:`prepare` left it.

    ``noise``: this share of training labels is replaced by another class, drawn uniformly.
    ``imbalance``: class c keeps a share imbalance^-(c / 9) of its training images. Held-out data
    stay as they are. Both are the same for every seed, which chooses among the images.
    """
    names = ("x_train", "y_train", "x_test", "y_test")
    found = open_npz(Path(config.path), names, ())
    x, y = found["x_train"], found["y_train"].astype(np.int64)
    rng = np.random.default_rng(0)
    if imbalance > 1:
        kept = rng.random(len(y)) < imbalance ** -(y / (CLASSES - 1))
        x, y = x[kept], y[kept]
    if noise:
        wrong = rng.random(len(y)) < noise
        y = np.where(wrong, (y + rng.integers(1, CLASSES, len(y))) % CLASSES, y)
    held_out = found["y_test"].astype(np.int64)
    return ArraySource(x[:, None], y), ArraySource(found["x_test"][:, None], held_out)


def shared(config: StreamConfig, name: str = "letter") -> tuple[ArraySource, ArraySource]:
    """Return (train, test) of ``NAME.npz`` in ../shared/data, beside MNIST's."""
    names = ("x_train", "y_train", "x_test", "y_test")
    found = open_npz(USUAL.with_name(f"{name}.npz"), names, ())
    return ArraySource(found["x_train"], found["y_train"]), ArraySource(
        found["x_test"], found["y_test"]
    )
