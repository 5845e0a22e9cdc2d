"""CIFAR-10 and CIFAR-100 (Krizhevsky 2009) from their binary versions.

The Python version of these files is pickled. Unpickling runs whatever code a file holds, so it is
never read here.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NoReturn

import numpy as np
import numpy.typing as npt

from distcl.config import StreamConfig
from distcl.data.arrays import ArraySource
from distcl.data.npy import open_file
from distcl.errors import ConfigError, DataError

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
    path = Path(config.path).expanduser()
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
