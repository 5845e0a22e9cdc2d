"""What a source's samples are: their shapes, their labels, and which classes there are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils._pytree import tree_flatten

from distcl.data.sources.arrays import MAX_CLASSES
from distcl.errors import DataError
from distcl.types import DataSpec, Ids, Source

_CHUNK = 1024


def data_spec(train: Source, test: Source, labels: Sequence[Ids | int | None]) -> DataSpec:
    """Return the spec of samples; ``x_shape`` is () where a sample is several tensors.

    ``labels``: see :func:`labels_of`.
    """
    shapes, targets = [], []
    for source in (train, test):
        nothing = source.read(np.empty(0, dtype=np.int64))
        leaves, tree = tree_flatten(nothing.x)
        shapes.append((tree, [tuple(leaf.shape[1:]) for leaf in leaves]))
        targets.append(tuple(nothing.y.shape[1:]) if isinstance(nothing.y, torch.Tensor) else ())
    if shapes[0] != shapes[1]:
        raise DataError(
            f"training samples have shape {shapes[0][1]} but test samples {shapes[1][1]}"
        )
    x_shape = shapes[0][1][0] if len(shapes[0][1]) == 1 else ()
    known = [part for part in labels if part is not None]
    if len(known) == 2:
        classes = max(p if isinstance(p, int) else int(p.max()) + 1 for p in known)
        names = tuple(getattr(train, "class_names", ()))
        return DataSpec(x_shape, classes, (), occurring(train, labels[0], classes), names)
    if known:
        raise DataError("one of training and test samples has class labels, the other targets")
    if targets[0] != targets[1]:
        raise DataError(f"training targets have shape {targets[0]} but test targets {targets[1]}")
    return DataSpec(x_shape, 0, targets[0])


def occurring(train: Source, labels: Ids | int | None, classes: int) -> tuple[int, ...]:
    """Return the classes of which there are usable training samples; (): all, or not known."""
    if not isinstance(labels, np.ndarray):
        return ()
    usable = usable_of(train, labels)
    there = np.flatnonzero(np.bincount(labels if usable is None else labels[usable]))
    return () if len(there) == classes else tuple(there.tolist())


def usable_of(source: Source, labels: Ids | None) -> npt.NDArray[np.bool_] | None:
    """Return which samples are not known to be bad, bool [N]; None: all. Local.

    ``labels`` [N], if known: -1 for one that turned out bad while they were read.
    """
    usable: npt.NDArray[np.bool_] | None = getattr(source, "usable", None)
    if usable is None and labels is not None and labels.min() < 0:
        return labels >= 0
    return usable


def labels_of(source: Source, split: str, read: bool = False) -> Ids | int | None:
    """Return the class labels, int64 [N], or None if y is floating point; -1 for bad samples.

    Of a source that has no labels but says how many classes there are, that; ``read``: read them.
    """
    if len(source) == 0:
        raise DataError(f"the {split} source has no samples")
    labels, bad = getattr(source, "labels", None), None
    if labels is None:
        y = source.read(np.empty(0, dtype=np.int64)).y
        if isinstance(y, torch.Tensor) and y.is_floating_point():
            return None
        classes = getattr(source, "classes", 0)
        if classes and not read:
            return int(classes)
        labels, bad = _read_labels(source, split)
    labels = np.asarray(labels)
    if labels.dtype.kind not in "iu" or labels.shape != (len(source),):
        raise DataError(
            f"labels of the {split} source have type {labels.dtype} and shape {labels.shape}; "
            f"integers of shape ({len(source)},) are needed"
        )
    if labels.min() < 0:
        raise DataError(
            f"label {labels.min()} of the {split} source, row {labels.argmin()}, is negative"
        )
    if labels.max() >= MAX_CLASSES:
        raise DataError(
            f"label {labels.max()} of the {split} source, row {labels.argmax()}, is not below "
            f"{MAX_CLASSES}"
        )
    labels = labels.astype(np.int64, copy=False)
    if bad is not None:
        labels[bad] = -1
    return labels


def _read_labels(
    source: Source, split: str
) -> tuple[npt.NDArray[Any], npt.NDArray[np.bool_] | None]:
    """Return y of every sample, [N], read one after another, and which are bad, if any may be."""
    number, found = len(source), np.empty(0, dtype=np.int64)
    bad = np.zeros(number, dtype=np.bool_) if getattr(source, "replaces", False) else None
    for start in range(0, number, _CHUNK):
        ids = np.arange(start, min(start + _CHUNK, number))
        batch = source.read(ids)
        y = batch.y
        if bad is not None:
            bad[ids] = batch.ids.numpy() != ids
        if not isinstance(y, torch.Tensor):
            raise DataError(f"labels of the {split} source are a {type(y).__name__}")
        if y.shape != ids.shape:
            raise DataError(
                f"labels of the {split} source, {len(ids)} from sample {start} on, have shape "
                f"{tuple(y.shape)}; one integer a sample is needed"
            )
        if not start:  # one array from the start: pieces would leave holes in memory
            found = np.empty(number, dtype=y.numpy().dtype)
        found[start : start + len(y)] = y
    return found, bad
