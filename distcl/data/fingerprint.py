"""What a stream is made of, in a few values that a checkpoint keeps: the same data as before?"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch.utils._pytree import tree_leaves

from distcl.data.ids import blocks
from distcl.data.shards.indexed import ShardSource
from distcl.data.stream import DriftStream
from distcl.errors import DataError
from distcl.types import Ids, info_of, unpack_ids

_ROWS, _MOST = 64, 256  # samples looked at: of an experience, and of all
_RANDOM = "random"  # in place of a digest: the source reads a sample in another way each time


def data_fingerprint(stream: DriftStream, like: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return what identifies the data of a stream: plain values, by what they are of. Local.

    Counts, shapes, types and classes; labels, where the source has them at hand; shards by what
    ``shards.json`` says of them; and some samples of every experience, evenly spaced in its order:
    their bytes in the archive where there is an index, none where shards are streamed, otherwise
    what ``stream.read`` gives, unless that is random. Global random numbers are not kept.

    ``like``: look at no more than was there for this other fingerprint.
    """
    train, test = stream.sources
    nothing = train.read(np.empty(0, dtype=np.int64))
    numbers = {"training samples": len(train), "test samples": len(test)}
    sources: list[Any] = [train, test]
    if stream.general is not None:
        numbers["general samples"] = len(stream.general.source)
        sources.append(stream.general.source)
    sizes = [[len(e.train), len(e.test)] for e in stream.experiences]
    if like is not None:
        numbers = {key: min(n, like.get(key, n)) for key, n in numbers.items()}
        before = like["sizes of experiences"]
        sizes = [np.minimum(a, b).tolist() for a, b in zip(sizes, before, strict=False)]
    found: dict[str, Any] = {
        **numbers,
        "classes": stream.spec.classes,
        "shapes": [list(leaf.shape[1:]) for leaf in tree_leaves((nothing.x, nothing.y))],
        "types": [str(leaf.dtype) for leaf in tree_leaves((nothing.x, nothing.y))],
        "sizes of experiences": sizes,
    }
    for (key, number), source in zip(numbers.items(), sources, strict=True):
        name = key.removesuffix(" samples")
        if isinstance(source, ShardSource):
            key = f"{name} shards"
            most = len(source.shards if like is None else like.get(key, ()))
            lines = {s.name: f"{s.samples} {s.bytes} {s.sha256}" for s in source.shards[:most]}
            found[key] = {
                shard: hashlib.sha256(line.encode()).hexdigest()[:16]
                for shard, line in lines.items()
            }
        elif (known := info_of(source).known_labels()) is not None:
            labels = np.ascontiguousarray(known[:number], dtype="<i8")
            found[f"labels of {key}"] = hashlib.sha256(labels.data).hexdigest()
    most = max(1, _MOST // len(sizes) // 2)
    kept = set(stream.info.replaced)
    for e, both in zip(stream.experiences, sizes, strict=False):
        for split, ids, size in zip(("training", "test"), (e.train, e.test), both, strict=True):
            some = _spread(size, min(_ROWS // 2, most))
            found[f"{split} samples of experience {e.index + 1}"] = _digest(stream, ids[some])
    if stream.general is not None:
        ids = stream.general.ids
        found["general samples read"] = _digest(stream, ids[_spread(len(ids), _ROWS // 2)])
    stream.info.replaced.intersection_update(kept)
    return found


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """Yield, in words, what differs between two fingerprints. Local."""
    for key in dict.fromkeys((*before, *now)):
        a, b = before.get(key), now.get(key)
        if a == b or _RANDOM in (a, b):
            continue
        if isinstance(a, dict) and isinstance(b, dict):
            other = [n for n in a if n in b and a[n] != b[n]]
            other += [n for n in (*a, *b) if (n in a) != (n in b)]
            yield f"{key} ('{other[0]}' first)"
        elif isinstance(a, str) or isinstance(b, str):
            yield key
        else:
            yield f"{key}: {a} -> {b}"


def check_ids(stream: DriftStream, ids: Ids, whose: str) -> None:
    """Raise DataError, naming the first, if ids are not (or no longer) in the stream. Local."""
    for some in blocks(ids):
        try:
            stream.locate(some if stream.general is None else stream.general.others(some))
        except DataError as error:
            raise DataError(f"{whose}: {error}; the data are not what they were") from error


def _spread(size: int, number: int) -> Ids:
    """Return ``number`` positions of ``size``, evenly spaced, or all of them."""
    return np.unique(np.linspace(0, size - 1, min(number, size)).astype(np.int64))


def _digest(stream: DriftStream, ids: Ids) -> str:
    digest = hashlib.sha256(np.ascontiguousarray(ids, dtype="<i8").data)
    for row in ids:
        once = _content(stream, row)
        if once != _content(stream, row):
            return _RANDOM
        digest.update(once)
    return digest.hexdigest()


def _content(stream: DriftStream, id_: np.int64) -> bytes:
    """Return what a sample is, without what is done to it where that can be had."""
    ids = np.array([id_])
    _, row, test = unpack_ids(ids)
    source: Any = stream.sources[int(test[0])]
    if stream.general is not None and stream.general.holds(ids).all():
        source = stream.general.source
    try:
        if isinstance(source, ShardSource):
            return b"" if source.info.sequential else next(source.extents(row))
        batch = stream.read(ids)
    except DataError:
        return b"bad"
    leaves = tree_leaves((batch.x, batch.y))
    data = [leaf.detach().cpu().contiguous().view(torch.uint8) for leaf in leaves]
    return b"".join(tensor.numpy().tobytes() for tensor in data)
