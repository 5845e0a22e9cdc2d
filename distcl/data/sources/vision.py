"""MNIST and its like: IDX files, gzipped or not, or the ``.npz`` that Keras made common."""

from __future__ import annotations

import gzip
import math
import re
import zlib
from io import BufferedReader
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from distcl.config import StreamConfig
from distcl.config.paths import reachable
from distcl.data.sources.arrays import ArraySource, arrays
from distcl.data.sources.npy import Array, open_file
from distcl.errors import ConfigError, DataError

_TYPES = {0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
_PIECE = 1 << 22


def mnist(config: StreamConfig) -> tuple[ArraySource, ArraySource]:
    """Return (train, test) of MNIST, or of data in the same files: x uint8 images [N, 1, H, W].

    ``stream.path`` is the folder of the four IDX files ({train,t10k}-{images,labels}-idx{3,1}-ubyte
    with or without ``.gz``; a dot before ``idx`` is fine too), or an ``.npz`` as for ``arrays``.
    Raises ConfigError without a path, DataError naming the file that is absent or damaged.
    """
    if not config.path:
        raise ConfigError(
            "stream.source = 'mnist' needs stream.path, the folder of its IDX files, or an .npz"
        )
    folder = reachable(config.path)
    if folder.suffix == ".npz":
        return arrays(config)
    if not folder.is_dir():
        raise DataError(f"stream.path = '{config.path}' is neither a folder nor an .npz file")
    return _split(folder, "train"), _split(folder, "t10k")


def open_idx(path: Path, dimensions: int) -> Array:
    """Return the array of an IDX file; mapped, read-only, unless it is gzipped. Local.

    Raises DataError naming the file if it is absent, has another magic number than that of an array
    with so many dimensions, is truncated, or is longer than its header says.
    """
    if path.suffix != ".gz":
        with open_file(path) as file:
            dtype, shape, start = _header(file, dimensions, path)
        _require(path, path.stat().st_size - start, dtype, shape)
        return np.asarray(np.memmap(path, dtype, "r", start, shape))
    try:
        with open_file(path) as packed, gzip.open(packed) as file:
            dtype, shape, _ = _header(file, dimensions, path)
            data = _take(file, math.prod(shape) * dtype.itemsize + 1)  # one more: is it the end?
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise DataError(f"'{path}' is truncated or damaged ({error})") from error
    _require(path, len(data), dtype, shape)
    return np.frombuffer(data, dtype).reshape(shape)


def _split(folder: Path, split: str) -> ArraySource:
    files = [_find(folder, f"{split}-images", 3), _find(folder, f"{split}-labels", 1)]
    x, y = open_idx(files[0], 3), open_idx(files[1], 1)
    return ArraySource(x[:, None], y, f"'{files[0]}' with '{files[1].name}'")


def _find(folder: Path, stem: str, dimensions: int) -> Path:
    names = [f"{stem}{dot}idx{dimensions}-ubyte{end}" for end in ("", ".gz") for dot in "-."]
    for name in names:
        if (folder / name).exists():
            return folder / name
    raise DataError(f"'{folder}' has no '{names[0]}', nor one with .gz")


def _header(
    file: BufferedReader | gzip.GzipFile, dimensions: int, path: Path
) -> tuple[np.dtype[Any], tuple[int, ...], int]:
    """Read (type, shape, bytes of the header)."""
    head = file.read(4 + 4 * dimensions)
    if len(head) < 4 or head[:2] != b"\0\0" or head[2] not in _TYPES or head[3] != dimensions:
        raise DataError(
            f"'{path}' has magic number 0x{head[:4].hex()}, but an IDX file of bytes in "
            f"{dimensions} dimension{'s' * (dimensions > 1)} has 0x000008{dimensions:02}"
        )
    if len(head) < 4 + 4 * dimensions:
        raise DataError(f"'{path}' is truncated: its header is incomplete")
    shape = tuple(int(n) for n in np.frombuffer(head[4:], ">u4"))
    if 0 in shape:
        raise DataError(f"'{path}' has shape {shape}, no data")
    return np.dtype(_TYPES[head[2]]), shape, len(head)


def _take(file: BufferedReader | gzip.GzipFile, size: int) -> bytes:
    """Read ``size`` bytes, or what is there; memory is bounded by that, not by ``size``."""
    pieces = []
    while size > 0 and (piece := file.read(min(size, _PIECE))):
        pieces.append(piece)
        size -= len(piece)
    return b"".join(pieces)


def _require(path: Path, found: int, dtype: np.dtype[Any], shape: tuple[int, ...]) -> None:
    needed = math.prod(shape) * dtype.itemsize
    if found < needed:
        raise DataError(f"'{path}' is truncated: {found} of {needed} bytes of data are there")
    if found > needed:
        raise DataError(
            f"'{path}' is longer than its header says: {needed} bytes of data for shape {shape}"
        )


# CIFAR-10 and CIFAR-100 (Krizhevsky 2009) from their binary versions.
#
# The Python version of these files is pickled. Unpickling runs whatever code a file holds, so it is
# never read here.


_SHAPE = (3, 32, 32)
_PIXELS = 3 * 32 * 32


def cifar10(config: StreamConfig) -> tuple[ArraySource, ArraySource]:
    """Return (train, test) of data_batch_*.bin and test_batch.bin: x uint8 [N, 3, 32, 32].

    ``stream.path`` is their folder, or the one that holds ``cifar-10-batches-bin``. Read into
    memory: 3,073 bytes a sample. Raises ConfigError without a path, DataError naming the file that
    is absent, truncated, pickled, or, with its row, has a label out of range.
    """
    folder = _folder(config, "cifar10", "cifar-10-batches-bin", ("data_batch_1", "batches.meta"))
    batches = folder.glob("data_batch_*.bin")
    train = sorted(batches, key=lambda path: (len(path.name), path.name))
    if not train:
        raise DataError(f"'{folder}' has no 'data_batch_1.bin'")
    return _read(train, 1, 10), _read([folder / "test_batch.bin"], 1, 10)


def cifar100(config: StreamConfig) -> tuple[ArraySource, ArraySource]:
    """Return (train, test) of train.bin and test.bin, with the 100 fine labels.

    As :func:`cifar10`; the folder may hold ``cifar-100-binary``.
    """
    folder = _folder(config, "cifar100", "cifar-100-binary", ("train", "test", "meta"))
    return _read([folder / "train.bin"], 2, 100), _read([folder / "test.bin"], 2, 100)


def _folder(config: StreamConfig, source: str, inner: str, pickled: tuple[str, ...]) -> Path:
    if not config.path:
        raise ConfigError(f"stream.source = '{source}' needs stream.path, the folder of its files")
    path = reachable(config.path)
    if re.search(r"-python(\.tar\.gz|\.tgz)?$", path.name):
        _refuse(path, inner)
    if path.is_file():
        raise DataError(f"'{path}' is a file; unpack it and give its folder, '{inner}'")
    if not path.is_dir():
        raise DataError(f"stream.path = '{config.path}' is not a folder")
    folder = path / inner if (path / inner).is_dir() else path
    if not any(folder.glob("*.bin")):
        unpacked = [folder, *folder.glob("cifar-*")]
        if any((place / name).is_file() for place in unpacked for name in pickled):
            _refuse(path, inner)
    return folder


def _refuse(path: Path, inner: str) -> NoReturn:
    archive = "cifar-10-binary.tar.gz" if "10-b" in inner else "cifar-100-binary.tar.gz"
    raise DataError(
        f"'{path}' holds the pickled (Python) version; unpickling could run any code, so it is "
        f"refused: take the binary version, {archive}, from the same page"
    )


def _read(files: list[Path], label_bytes: int, classes: int) -> ArraySource:
    """Read records of ``label_bytes`` labels, of which the last counts, and an image."""
    records = np.concatenate([_records(file, label_bytes, classes) for file in files])
    x = records[:, label_bytes:].reshape(-1, *_SHAPE)
    return ArraySource(x, records[:, label_bytes - 1], f"'{files[0]}'")


def _records(file: Path, label_bytes: int, classes: int) -> npt.NDArray[np.uint8]:
    """Map the records of a file, uint8 [n, label_bytes + pixels]."""
    width = label_bytes + _PIXELS
    with open_file(file):
        size = file.stat().st_size
    if size == 0 or size % width:
        raise DataError(
            f"'{file}' has {size} bytes, which is not a whole number of records of {width}: it is "
            f"truncated, or not the binary version of CIFAR-{classes}"
        )
    records = np.memmap(file, np.uint8, "r", shape=(size // width, width))
    wrong = records[:, label_bytes - 1] >= classes
    if wrong.any():
        row = int(wrong.argmax())
        label = records[row, label_bytes - 1]
        raise DataError(f"'{file}': label {label} at row {row} is out of range (0…{classes - 1})")
    return records
