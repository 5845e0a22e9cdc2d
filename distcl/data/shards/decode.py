"""From a sample's members to numbers: by extension, without pickle.

A decoded sample is a dict: ext → numpy array (npy: as saved; png, jpg, webp: see
:mod:`distcl.data.images`), text (txt), or what the JSON says (json); other members stay bytes.
``cls`` is the label. ``__key__`` and ``__id__`` are the sample's key and its id in the source.
"""

from __future__ import annotations

import json
from typing import Any

from distcl.data.images import IMAGES, decode_image
from distcl.data.sources.npy import parse_npy
from distcl.data.transforms import Sample, Transforms, arrays_of
from distcl.errors import DataError


class Decoder:
    """Decodes samples and transforms them."""

    def __init__(self, transforms: Transforms) -> None:
        self._transforms = transforms

    def __call__(self, key: str, id_: int, label: int, members: dict[str, bytes]) -> Sample:
        """Return the arrays of x by ext, and the label under ``cls``.

        Raises DataError naming the member that cannot be decoded.
        """
        sample: Sample = {e: decode(e, data) for e, data in members.items() if e != "cls"}
        sample["cls"] = label
        if self._transforms:
            sample = self._transforms(sample, key, id_)
        found = arrays_of(sample)
        if len(found) == 1:
            raise DataError(
                f"there is nothing to feed a model with in {', '.join(members)}: no npy, png, jpg "
                "or webp, and no transform makes an array of them"
            )
        return found | {"cls": int(found["cls"])}


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
