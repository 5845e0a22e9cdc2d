"""From a sample's members to numbers: by extension, without pickle; and transforms of samples.

A decoded sample is a dict: ext → numpy array (npy: as saved; png, jpg, webp: uint8 [C, H, W], C 1
for grey and 3 otherwise), text (txt), or what the JSON says (json); other members stay bytes.
``cls`` is the label. ``__key__`` and ``__id__`` are the sample's key and its id in the source.

A transform takes such a dict and returns it, changed or new. Afterwards the arrays in it, ``cls``
aside, are x: one alone as it is, several as a dict by ext.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from distcl.data.sources.arrays import as_tensor
from distcl.data.sources.npy import Array, parse_npy
from distcl.data.transforms import Sample, create_transforms
from distcl.errors import ConfigError, DataError, DistclError, named, told

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
                raise DataError(f"transform '{name}': {told(error) or named(error)}") from error
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
