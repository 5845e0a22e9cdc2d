"""A few images that can be learned, as arrays and as shards."""

from __future__ import annotations

import io
import itertools
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np

from distcl.data.shards.index import index_folder
from distcl.data.shards.tar import END, member_bytes


def samples() -> tuple[Any, Any]:
    """Return 361 images float32 [1, 8, 8] and their labels, int64 of 10 classes."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 10, 361)
    centres = rng.normal(size=(10, 1, 8, 8))
    return (rng.normal(size=(361, 1, 8, 8)) + centres[labels]).astype(np.float32), labels


def write_shards(folder: Path, broken: Collection[int] = ()) -> None:
    """Write them as 8 shards, no two of one size, and index them; cut the arrays of ``broken``.

    Three shards are held out. Samples have a json with ``site``, a, b or c.
    """
    folder.mkdir()
    images, labels = samples()
    ends = (0, 59, 110, 140, 171, 214, 304, 335, 361)
    for shard, (start, end) in enumerate(itertools.pairwise(ends)):
        part = "test" if shard in (2, 4, 6) else "train"  # streams hold out whole shards
        with (folder / f"{part}-{shard}.tar").open("wb") as file:
            for k in range(start, end):
                array = io.BytesIO()
                np.save(array, images[k])
                x = array.getvalue()[: 100 if k in broken else None]
                site = json.dumps({"site": "abc"[k % 5 % 3]})
                file.write(member_bytes(f"{k:04d}.x.npy", x))
                file.write(member_bytes(f"{k:04d}.cls", str(labels[k]).encode()))
                file.write(member_bytes(f"{k:04d}.json", site.encode()))
            file.write(END)
    index_folder(folder)
