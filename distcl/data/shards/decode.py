"""From a sample's members to numbers and back: by extension, without pickle.

A decoded sample is a dict: ext → numpy array (npy: as saved; png, jpg, webp: see
:mod:`distcl.data.images`), text (txt), or what the JSON says (json); other members stay bytes.
``cls`` is the label. ``__key__`` and ``__id__`` are the sample's key and its id in the source.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from distcl.data.images import IMAGES, decode_image
from distcl.data.sources.arrays import MAX_CLASSES
from distcl.data.sources.npy import Array, parse_npy
from distcl.data.transforms import Sample, Transforms, arrays_of
from distcl.errors import DataError

_NUMBER = re.compile(rb"\s*(\d+|-[1-9]\d*)\s*")  # int() would take 1_0, +1 and more
_TWO = re.compile(r"(\w+)\*([1-9]\d*)\+(\w+)")


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


def decode_sample(
    members: Mapping[str, bytes], label: int, transforms: Transforms, key: str, id_: int
) -> Sample:
    """Return the arrays of x by ext, transformed, and the label under ``cls``.

    Raises DataError naming the member that cannot be decoded.
    """
    sample: Sample = {ext: decode(ext, data) for ext, data in members.items() if ext != "cls"}
    sample["cls"] = label
    if transforms:
        sample = transforms(sample, key, id_)
    found = arrays_of(sample)
    if len(found) == 1:
        raise DataError(
            f"there is nothing to feed a model with in {', '.join(members)}: no npy, png, jpg "
            "or webp, and no transform makes an array of them"
        )
    return found | {"cls": int(found["cls"])}


def label_of(members: Mapping[str, bytes], label: str) -> int:
    """Return the label of a sample. ``label``: the member that has it, cls or json:FIELD.

    MEMBER*N+MEMBER makes one number of two, the second below N. Raises DataError if there is none,
    or if it is not an integer in [0, MAX_CLASSES).
    """
    if both := _TWO.fullmatch(label):
        first, second = label_of(members, both[1]), label_of(members, both[3])
        if second >= int(both[2]):
            raise DataError(f"its label is {second}, but shards.json says at most {both[2]} - 1")
        return first * int(both[2]) + second
    ext, _, field = label.partition(":")
    if ext not in members:
        others = ", ".join(f"'{ext}'" for ext in members)
        raise DataError(f"it has no label: there is no member '{ext}' beside {others}")
    data = members[ext]
    try:
        if not field and not _NUMBER.fullmatch(data):
            raise ValueError("not digits")
        value = json.loads(data)[field] if field else int(data)
    except (ValueError, TypeError, KeyError, RecursionError):
        what = f"a field '{field}'" if field else f"digits, but {data[:20]!r}"
        raise DataError(f"it has no label: member '{ext}' does not hold {what}") from None
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < MAX_CLASSES:
        raise DataError(f"its label, {value!r}, is not a whole number from 0 to {MAX_CLASSES - 1}")
    return value


def npy_bytes(array: Array) -> bytes:
    """Return an array as the bytes of an .npy file."""
    out = io.BytesIO()
    np.save(out, np.ascontiguousarray(array), allow_pickle=False)
    return out.getvalue()
