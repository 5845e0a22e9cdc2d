"""MNIST and its like: IDX files, gzipped or not, or the ``.npz`` that Keras made common."""

from __future__ import annotations

import gzip
import math
import zlib
from io import BufferedReader
from pathlib import Path
from typing import Any

import numpy as np

from distcl.config import StreamConfig
from distcl.data.arrays import ArraySource, arrays
from distcl.data.npy import Array, open_file
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
    folder = Path(config.path).expanduser()
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
