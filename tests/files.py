"""Data files for tests, in the formats that people have: IDX, CIFAR's binary version, tar, shards.

Fewer than a test wants to learn from: :mod:`tests.samples` has such.
"""

from __future__ import annotations

import gzip
import io
import json
import struct
import tarfile
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from distcl.config import StreamConfig
from distcl.data.shards.decode import npy_bytes
from distcl.data.shards.index import index_folder
from distcl.data.shards.tar import END, member_bytes

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (60, 7, 5), dtype=np.uint8)
LABELS = (np.arange(60) % 10).astype(np.uint8)
CIFAR10 = {"data_batch_1.bin": 20, "data_batch_2.bin": 30, "test_batch.bin": 10}
CIFAR100 = {"train.bin": 200, "test.bin": 100}


def idx_bytes(array: np.ndarray[Any, Any]) -> bytes:
    """An array as an IDX file."""
    codes = {"u1": 8, "i1": 9, "i2": 11, "i4": 12, "f4": 13, "f8": 14}
    head = bytes([0, 0, codes[array.dtype.str[1:]], array.ndim])
    big = array.astype(array.dtype.newbyteorder(">"))
    return head + struct.pack(f">{array.ndim}I", *array.shape) + big.tobytes()


def write_mnist(
    folder: Path,
    images: np.ndarray[Any, Any] = IMAGES,
    labels: np.ndarray[Any, Any] = LABELS,
    dash: str = "-",
    pack: bool = False,
    at: int = 40,
) -> StreamConfig:
    """The four files of MNIST, gzipped or not; samples from ``at`` on are held out."""
    for split, part in (("train", slice(0, at)), ("t10k", slice(at, None))):
        for kind, array in (("images", images), ("labels", labels)):
            name = f"{split}-{kind}{dash}idx{array.ndim}-ubyte"
            content = idx_bytes(array[part])
            if pack:
                (folder / f"{name}.gz").write_bytes(gzip.compress(content))
            else:
                (folder / name).write_bytes(content)
    return StreamConfig(source="mnist", path=str(folder))


def write_cifar(folder: Path, classes: int, sizes: Mapping[str, int]) -> dict[str, tuple[Any, Any]]:
    """A file of records for each name; return {name: (labels, images)}."""
    folder.mkdir(exist_ok=True)
    content = {}
    for name, n in sizes.items():
        labels = RNG.permutation(np.arange(n) % classes).astype(np.uint8)
        images = RNG.integers(0, 256, (n, 3, 32, 32), dtype=np.uint8)
        coarse = labels[:, None] // 5 if classes == 100 else np.empty((n, 0), np.uint8)
        records = np.hstack([coarse, labels[:, None], images.reshape(n, -1)])
        records.tofile(folder / name)
        content[name] = labels, images
    return content


# -- archives -------------------------------------------------------------------------------------


def write_tar(tar: Path, members: Iterable[tuple[str, bytes]], **how: Any) -> None:
    """An archive of these (name, data), by the standard library."""
    with tarfile.open(tar, "w", **how) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def member(name: str, data: bytes = b"", **fields: object) -> bytes:
    """The bytes of a member of any kind."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for field, value in fields.items():
        setattr(info, field, value)
    form = tarfile.PAX_FORMAT if fields.get("pax_headers") else tarfile.GNU_FORMAT
    return info.tobuf(form) + data + bytes(-len(data) % 512)


def row_value(row: int) -> np.ndarray[Any, Any]:
    """The x of a row in every archive that is written here."""
    return np.array([row, -row, 0.5], dtype=np.float32)


def sample(row: int, key: str = "") -> bytes:
    """The bytes of a plain sample in an archive, 2,048 of them; its label is row % 2."""
    key = key or f"{row:04d}"
    members = (("cls", b"%d" % (row % 2)), ("npy", npy_bytes(row_value(row))))
    return b"".join(member_bytes(f"{key}.{ext}", data) for ext, data in members)


def archive(tar: Path, rows: int, *more: bytes) -> Path:
    """An archive of so many samples, and of what else is given."""
    tar.parent.mkdir(exist_ok=True)
    tar.write_bytes(b"".join([*map(sample, range(rows)), *more]) + END)
    return tar


def shard_folder(
    path: Path, sizes: list[int], bad: Collection[int] = (), facts: bool = False, **tar: Any
) -> Path:
    """Indexed shards s0, s1, … whose sample of row r has label r % 3; ``bad`` ones do not decode.

    ``facts``: samples have a json too, of site r % 2 and a time that grows for four weeks.
    """
    path.mkdir(exist_ok=True)
    row, width = 0, len(str(len(sizes) - 1))
    long = "x" * 60 * tar.get("format", 0)
    for number, size in enumerate(sizes):
        members = []
        for r in range(row, row + size):
            key, data = f"{long}{r:04d}", b"?" if r in bad else npy_bytes(row_value(r))
            members += [(f"{key}.npy", data), (f"{key}.cls", b"%d" % (r % 3))]
            if facts:
                known = {"site": r % 2, "time": f"2024-01-{r % 28 + 1:02d}"}
                members.append((f"{key}.json", json.dumps(known).encode()))
        write_tar(path / f"s{number:0{width}d}.tar", members, **tar)
        row += size
    index_folder(path)
    return path
