"""From a sample's members to numbers: by extension, without pickle; and transforms of samples.

A decoded sample is a dict: ext → numpy array (npy: as saved; png, jpg, webp: uint8 [C, H, W], C 1
for grey and 3 otherwise), text (txt), or what the JSON says (json); other members stay bytes.
``cls`` is the label. ``__key__`` and ``__id__`` are the sample's key and its id in the source.

A transform takes such a dict and returns it, changed or new. Afterwards the arrays in it, ``cls``
aside, are x: one alone as it is, several as a dict by ext.
"""

from __future__ import annotations

import functools
import io
import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from distcl import registry
from distcl.data.arrays import as_tensor
from distcl.data.npy import Array, parse_npy
from distcl.errors import ConfigError, DataError, DistclError

Sample = dict[str, Any]
Transform = Callable[[Sample], Sample]

IMAGES = ("png", "jpg", "jpeg", "webp")


class Decoder:
    """Decodes samples and transforms them; the same input gives the same bits in any process.

    ``transforms``: names, or tables of a name and options; see :func:`create_transforms`.
    """

    def __init__(self, transforms: Sequence[str | dict[str, Any]] = ()) -> None:
        self._transforms = create_transforms(transforms)

    def __call__(self, key: str, id_: int, label: int, members: dict[str, bytes]) -> Sample:
        """Return the arrays of x by ext, and the label under ``cls``.

        Raises DataError naming the member that cannot be decoded; what a user's transform raises
        arrives as DataError too, with the transform's name.
        """
        sample: Sample = {e: decode(e, data) for e, data in members.items() if e != "cls"}
        sample["cls"] = label
        if self._transforms:
            sample = self._transform(sample | {"__key__": key, "__id__": id_})
        label = int(sample.pop("cls"))
        found: Sample = {e: _numbers(e, v) for e, v in sample.items() if _is_array(v)}
        if not found:
            raise DataError(
                f"there is nothing to feed a model with in {', '.join(members)}: no npy, png, jpg "
                "or webp, and no transform makes an array of them"
            )
        found["cls"] = label
        return found

    def _transform(self, sample: Sample) -> Sample:
        for ext, value in sample.items():
            if _is_array(value):
                sample[ext] = as_tensor(value, True).numpy()
        for name, transform in self._transforms:
            try:
                sample = transform(sample)
                if not isinstance(sample, dict) or "cls" not in sample:
                    raise TypeError("it must return the sample, a dict with a label under 'cls'")
            except DistclError:
                raise
            except Exception as error:  # whatever a user's function raises
                raise DataError(f"transform '{name}': {type(error).__name__}: {error}") from error
        return sample


def _is_array(value: Any) -> bool:
    return isinstance(value, np.ndarray | torch.Tensor)


def _numbers(ext: str, value: Array | torch.Tensor) -> Array:
    array = np.asarray(value)
    if array.dtype.kind not in "biuf":
        raise DataError(f"member '{ext}' has type {array.dtype}; numbers are needed")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise DataError(f"member '{ext}' has a value that is NaN or infinite")
    return array


def decode(ext: str, data: bytes) -> Any:
    """Decode one member by the last part of its ext; unknown ones stay bytes.

    Raises DataError naming the member.
    """
    kind = ext.rpartition(".")[2]
    try:
        if kind == "npy":
            return parse_npy(data)
        if kind in IMAGES:
            return decode_image(data)
        if kind == "json":
            return json.loads(data)
        if kind == "txt":
            return data.decode()
    except (DataError, ValueError, OSError, SyntaxError, RecursionError) as error:
        raise DataError(f"member '{ext}' cannot be decoded ({error})") from error
    return data


def decode_image(data: bytes) -> Array:
    """Return an image as uint8 [C, H, W]: C is 1 for grey images, else 3.

    Raises OSError, ValueError or SyntaxError, as Pillow does, on bytes that are not a sound image.
    """
    try:
        from PIL import Image
    except ImportError:
        raise ConfigError("images need Pillow: pip install 'distcl[data]'") from None
    try:
        with Image.open(io.BytesIO(data)) as image:
            grey = image.mode in ("1", "L", "LA")
            pixels = np.asarray(image.convert("L" if grey else "RGB"))
    except Image.DecompressionBombError as error:
        raise ValueError(str(error)) from error
    return pixels[None] if grey else np.ascontiguousarray(np.moveaxis(pixels, -1, 0))


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
