"""Arrays as sources: a user's own in memory, files by memory map, handwritten digits."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch.utils._pytree import tree_leaves, tree_map

from distcl.config import StreamConfig
from distcl.config.paths import reachable
from distcl.data.ids import checked_rows, info_part
from distcl.data.sources.npy import Array, npz_keys, open_npy, open_npz
from distcl.data.transforms import to_tensor
from distcl.errors import ConfigError, DataError
from distcl.types import IGNORED, Batch, Ids, PyTree, SourceInfo, exact

MAX_CLASSES = 1 << 20
"""Labels are below this: a larger one is a mistake, not a class."""

_CHUNK_BYTES = 1 << 24


class ArraySource:
    """A source over arrays, in memory or memory-mapped; ids are rows.

    ``x``: an array [N, ...] of numbers, or a pytree of them; ``y``: integer labels [N], several a
    sample [N, ...] (-100 counts for nothing), or for regression floating-point targets [N, ...].
    On reading, uint8 becomes float32 in [0, 1], float64 stays, every other type becomes float32;
    inside a pytree, and beside several labels a sample, signed integers and booleans (token ids,
    masks) keep their type; beside several labels, [N, T] of uint16 or uint32 becomes int64.
    ``labels``: int64 [N]; None if there is not one a sample.
    ``groups``: the concept that each sample belongs to, int64 [N]; None: to all. ``info``: what
    else is known of the samples.

    Raises DataError naming ``name``, and the row where one is at fault, on unequal lengths, no
    samples, values that are NaN or infinite, types that are not numbers, and labels that are not
    integers in [0, MAX_CLASSES), or of several, at least one of them and -100.
    """

    def __init__(
        self, x: PyTree, y: npt.ArrayLike, name: str = "arrays", info: SourceInfo | None = None
    ) -> None:
        self.name = name
        self._info = info or SourceInfo()
        y = np.asarray(y)
        self._several = y.dtype.kind in "iu" and y[:1].size > 1
        one = y.dtype.kind != "f" and not self._several
        self.labels: Ids | None = _checked_labels(y, name) if one else None
        self._y: Array = _checked_targets(y, name) if self.labels is None else self.labels
        self._positions = _checked_positions(y, name) if self._several else None
        self._x = tree_map(np.asarray, x)
        self._in_tree = not isinstance(self._x, np.ndarray)
        self._rows: Ids | None = None  # row of the arrays for each id; None: the same
        self.groups: Ids | None = None
        for leaf in tree_leaves(self._x):
            _check_x(leaf, len(y), name)

    @property
    def info(self) -> SourceInfo:
        """See :class:`distcl.types.SourceInfo`."""
        groups = self._info.groups if self.groups is None else self.groups
        own = {"name": self.name, "labels": self.labels, "positions": self._positions}
        return replace(self._info, groups=groups, **own)  # type: ignore[arg-type]

    def __len__(self) -> int:
        return len(self._y)

    def read(self, ids: Ids) -> Batch:
        """Read rows: x [B, ...], y int64 [B], or floating point [B, ...]. Local.

        Raises DataError naming an id out of range.
        """
        ids = checked_rows(ids, len(self), self.name)
        rows = ids if self._rows is None else self._rows[ids]
        # not .take: of a member of an .npz, whose data is unaligned, it first copies all of it
        if self._in_tree:
            x = tree_map(lambda leaf: to_tensor(leaf[rows], keep_integers=True), self._x)
        else:
            taken = self._x[rows]
            if self._several and taken.ndim == 2 and taken.dtype.type in (np.uint16, np.uint32):
                taken = taken.astype(np.int64)  # token ids, as most tokenizers' files have them
            x = to_tensor(taken, keep_integers=self._several)
        y = to_tensor(self._y[ids], keep_integers=True)
        return Batch(torch.from_numpy(ids), x, y, len(ids))

    def stored(self, ids: Ids) -> PyTree:
        """Return x of samples as arrays [B, ...] of the type they are stored in. Local."""
        rows = ids if self._rows is None else self._rows[ids]
        return tree_map(lambda leaf: leaf.take(rows, axis=0), self._x)

    def holdout(self, fraction: float) -> tuple[ArraySource, ArraySource]:
        """Split into sources (train, test) over the same arrays, without copying x.

        ``fraction`` of each class, or of all samples in regression, goes to test. The split depends
        on the labels alone, or on the number of samples. A class of one sample is in train only.
        Raises DataError if that leaves test empty.
        """
        labels = np.zeros(len(self), np.int64) if self.labels is None else self.labels
        train, test = stratified(labels, fraction, self.name)
        return self._restrict(train), self._restrict(test)

    def _restrict(self, ids: Ids) -> ArraySource:
        part = copy.copy(self)
        part.labels = None if self.labels is None else self.labels[ids]
        part._y = self._y[ids] if part.labels is None else part.labels
        part._rows = ids if self._rows is None else self._rows[ids]
        part.groups = None if self.groups is None else self.groups[ids]
        part._info = info_part(self._info, ids)
        return part


def digits(config: StreamConfig) -> tuple[ArraySource, ArraySource]:
    """Return (train, test) of 1,797 handwritten digits: x float32 [N, 1, 8, 8] in [0, 1].

    The test set of Alpaydin and Kaynak, *Optical Recognition of Handwritten Digits* (UCI Machine
    Learning Repository, CC BY 4.0), in the order of scikit-learn's ``load_digits``.
    """
    with np.load(Path(__file__).with_name("digits.npz")) as found:
        x, y = found["x"], found["y"].astype(np.int64)
    return ArraySource(x / np.float32(16), y, "digits").holdout(config.test_fraction)


def arrays(config: StreamConfig, experiences: str = "") -> tuple[ArraySource, ArraySource]:
    """Return (train, test) of ``stream.path``, an .npz or a folder of .npy files.

    It holds x and y, optionally x_test and y_test; or x_train and y_train, as Keras names them. x
    is [N, D], [N, H, W] (read as one-channel images, [N, 1, H, W]), [N, C, H, W] or longer; y is
    integer labels [N], or several a sample [N, ...] with -100 where there is none, or
    floating-point targets [N, ...] for regression. Files without a test
    split hold out ``test_fraction`` (of each class, if any). ``experiences``: which samples make an
    experience. Empty: all; ``order``: equal stretches of each split, in the order of its rows.

    Raises ConfigError on keys that do not go together, DataError naming the file, and the row where
    one is at fault, on bad data.
    """
    if experiences not in ("", "order"):
        raise ConfigError(
            f"stream.options.experiences = '{experiences}', but source 'arrays' knows 'order' only"
        )
    if not config.path:
        raise ConfigError(
            "stream.source = 'arrays' needs stream.path: an .npz, or a folder of x.npy and y.npy"
        )
    path = reachable(config.path)
    found = _from_folder(path) if path.is_dir() else npz_splits(path)
    splits = [ArraySource(_as_samples(x, name), y, name) for x, y, name in found]
    if experiences:
        if not config.stated:
            raise ConfigError(
                "stream.experiences and stream.options.experiences both say what makes an "
                "experience; leave one out"
            )
        for split in splits:
            split.groups = np.arange(len(split)) * config.concepts // len(split)
    if len(splits) == 1:
        return splits[0].holdout(config.test_fraction)
    return splits[0], splits[1]


_Split = tuple[Array, Array, str]  # x, y, and how messages name them
_TEST = ("x_test", "y_test")


def npz_splits(path: Path) -> list[_Split]:
    """Return x, y and a name for messages, of train and perhaps test. Raises DataError."""
    x, y = _names(npz_keys(path))
    return _splits(path, open_npz(path, (x, y), _TEST), x, y)


def _from_folder(path: Path) -> list[_Split]:
    names = [file.stem for file in path.glob("*.npy")]
    x, y = _names(names)
    wanted = [x, y, *(name for name in _TEST if name in names)]
    return _splits(path, {name: open_npy(path / f"{name}.npy") for name in wanted}, x, y)


def _names(there: Collection[str]) -> tuple[str, str]:
    return ("x_train", "y_train") if "x_train" in there and "x" not in there else ("x", "y")


def _splits(path: Path, found: Mapping[str, Array], x: str, y: str) -> list[_Split]:
    splits = [(found[x], found[y], f"'{path}'")]
    if len(found) == 3:
        has, lacks = _TEST if "x_test" in found else _TEST[::-1]
        raise DataError(f"'{path}' has '{has}' but no '{lacks}'")
    if len(found) == 4:
        splits.append((found["x_test"], found["y_test"], f"'{path}' (x_test, y_test)"))
    return splits


def _as_samples(x: Array, name: str) -> Array:
    if x.ndim < 2:
        raise DataError(
            f"{name}: x has shape {x.shape}; [N, D], [N, H, W] or [N, C, H, W] is needed"
        )
    if x.ndim == 4 and x.shape[3] in (1, 3, 4) and x.shape[1] == x.shape[2] not in (1, 3, 4):
        raise DataError(
            f"{name}: x has shape {x.shape}, channels last; save np.moveaxis(x, -1, 1) instead"
        )
    return x[:, None] if x.ndim == 3 else x


def _checked_labels(y: Array, name: str) -> Ids:
    if y.dtype.kind not in "iub":
        raise DataError(
            f"{name}: labels have type {y.dtype}; integers, or for regression floating-point "
            "numbers, are needed"
        )
    if y.ndim != 1:
        raise DataError(f"{name}: labels have shape {y.shape}; one per sample, [N], is needed")
    if len(y) == 0:
        raise DataError(f"{name}: there are no samples")
    bad = (y < 0) | (y >= MAX_CLASSES)
    if bad.any():
        row = int(bad.argmax())
        raise DataError(
            f"{name}: label {y[row]} at row {row} is out of range (0…{MAX_CLASSES - 1})"
        )
    return y.astype(np.int64)


def _checked_targets(y: Array, name: str) -> Array:
    """Check floating-point targets, or several labels a sample."""
    if y.ndim == 0 or len(y) == 0:
        raise DataError(f"{name}: there are no samples")
    if y.size == 0:
        raise DataError(f"{name}: targets of shape {y.shape[1:]} are empty")
    if y.dtype.kind == "f":
        _check_finite(y, "y", name)
    return y if y.dtype.kind == "f" else y.astype(np.int64, copy=False)


def _checked_positions(y: Array, name: str) -> tuple[int, str]:
    """Check several labels a sample; return :attr:`SourceInfo.positions` of them."""
    size = max(1, _CHUNK_BYTES // max(1, y[:1].nbytes))
    largest, lone = 0, ""
    for start in range(0, len(y), size):
        rows = y[start : start + size].reshape(len(y[start : start + size]), -1)
        there = rows != IGNORED
        if len(empty := np.flatnonzero(~there.any(1))):
            raise DataError(
                f"{name}: row {start + empty[0]} has no label but {IGNORED}, which counts for "
                "nothing"
            )
        outside = there & ((rows < 0) | (rows >= MAX_CLASSES))
        if outside.any():
            row, at = np.argwhere(outside)[0]
            raise DataError(
                f"{name}: label {rows[row, at]} at row {start + row} is out of range "
                f"(0…{MAX_CLASSES - 1}, or {IGNORED} for none)"
            )
        alone = np.flatnonzero(~there[:, 1:].any(1))
        lone = lone or (f"{name}: row {start + alone[0]}" if len(alone) else "")
        largest = max(largest, int(rows.max()))
    return largest + 1, lone


def _check_x(x: Array, n: int, name: str) -> None:
    if x.dtype.kind not in "biuf":
        raise DataError(f"{name}: x has type {x.dtype}; numbers are needed")
    if x.ndim == 0 or len(x) != n:
        raise DataError(f"{name}: x has {x.shape[0] if x.ndim else 0} samples but y has {n} labels")
    if x.size == 0:
        raise DataError(f"{name}: samples of shape {x.shape[1:]} are empty")
    if x.dtype.kind == "f":
        _check_finite(x, "x", name)


def _check_finite(values: Array, which: str, name: str) -> None:
    size = max(1, _CHUNK_BYTES // max(1, values[:1].nbytes))
    for start in range(0, len(values), size):
        finite = np.isfinite(values[start : start + size])
        if not finite.all():
            row = start + int(finite.reshape(len(finite), -1).all(axis=1).argmin())
            raise DataError(f"{name}: {which} has a value that is NaN or infinite at row {row}")


def stratified(labels: Ids, fraction: float, name: str = "arrays") -> tuple[Ids, Ids]:
    """Return the rows (train, test), each ascending, with ``fraction`` of every class in test.

    Raises DataError, naming the source ``name``, if that leaves test empty.
    """
    order = np.lexsort((np.random.default_rng(0).random(len(labels)), labels))
    counts = np.bincount(labels)
    share = np.array([round(exact(fraction) * n) for n in counts.tolist()])
    held = np.minimum(np.maximum(share, 1), np.maximum(counts - 1, 0))
    place = np.arange(len(labels)) - (counts.cumsum() - counts)[labels[order]]  # within its class
    test = place < held[labels[order]]
    if not test.any():
        raise DataError(f"{name}: no class has two samples, so none can be held out for testing")
    return np.sort(order[~test]), np.sort(order[test])
