"""Transforms of samples, by name or as a user gives them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from distcl import registry
from distcl.data.sources.npy import Array
from distcl.errors import ConfigError, DataError

Sample = dict[str, Any]
Transform = Callable[[Sample], Sample]


# ---------------------------------------------------------------- transforms


def create_transforms(
    specs: Sequence[str | dict[str, Any]],
) -> list[tuple[str, Transform]]:
    """Return (name, transform) for each of ``data.transforms``.

    A built-in's factory is called with the options; of a user's ``package.module:function`` the
    options become keyword arguments of every call. Raises ConfigError naming what is wrong.
    """
    made: list[tuple[str, Transform]] = []
    for spec in specs:
        options = {"name": spec} if isinstance(spec, str) else dict(spec)
        name = options.pop("name", None)
        if not isinstance(name, str):
            raise ConfigError(f"data.transforms: {spec} has no name")
        if ":" in name:
            function = registry.resolve("transform", name)
            made.append((name, functools.partial(function, **options)))
        else:
            made.append((name, registry.create("transform", name, options=options)))
    return made


def crop(size: int, pad: int = 0, random: bool = False) -> Transform:
    """Cut float images [C, H, W] to ``size`` x ``size``, after ``pad`` zeros on every side.

    In the centre; with ``random`` anywhere, by the sample's id, the same at every reading.
    """

    def cut(image: Array, id_: int) -> Array:
        image = np.pad(image, ((0, 0), (pad, pad), (pad, pad)))
        spare = np.array(image.shape[1:]) - size
        if spare.min() < 0:
            raise DataError(f"an image of {image.shape[1:]} cannot be cropped to {size} x {size}")
        down, right = (_hashed(id_, 2) % (spare + 1)) if random else spare // 2
        return image[:, down : down + size, right : right + size]

    return _on_images(cut)


def flip() -> Transform:
    """Mirror half of all images [C, H, W] left to right: which ones, their ids decide."""
    return _on_images(lambda image, id_: image[:, :, ::-1] if _hashed(id_, 1)[0] % 2 else image)


def normalize(mean: list[float], std: list[float]) -> Transform:
    """Subtract the mean and divide by the standard deviation of each channel of [C, H, W]."""
    if len(mean) != len(std) or not mean or min(std) <= 0:
        raise ConfigError(
            "transform 'normalize': mean and std need one number per channel, std > 0"
        )
    shift, scale = (np.array(v, dtype=np.float32)[:, None, None] for v in (mean, std))

    def standardize(image: Array, id_: int) -> Array:
        if len(image) != len(shift):
            raise DataError(f"an image has {len(image)} channels, 'normalize' {len(shift)}")
        return np.asarray((image - shift) / scale, dtype=np.float32)

    return _on_images(standardize)


def _on_images(function: Callable[[Array, int], Array]) -> Transform:
    def transform(sample: Sample) -> Sample:
        for ext, value in sample.items():
            if isinstance(value, np.ndarray) and value.ndim == 3:
                sample[ext] = function(value, sample["__id__"])
        return sample

    return transform


def _hashed(id_: int, n: int) -> Array:
    """Return ``n`` numbers, int64 >= 0, that depend on the id alone."""
    return np.random.default_rng(id_).integers(0, 2**62, n)
