"""What the two sources of a stream are: their shapes, their labels, and which classes there are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils._pytree import tree_flatten

from distcl.config import StreamConfig
from distcl.data.sources.arrays import MAX_CLASSES
from distcl.errors import ConfigError, DataError
from distcl.types import IGNORED, Batch, DataSpec, Ids, Mask, Source, SourceInfo, info_of

_CHUNK = 1024


class SourceSplit:
    """A source of a stream, its ``name`` there (train or test), and what is known of its samples.

    ``labels``: int64 [N]; the number of classes until :meth:`learn`, where the source has no labels
    but says that, or each sample has several; None if y is floating point. ``usable``: which
    samples are not known to be bad, bool [N], or None: all. ``lone``: see SourceInfo.positions.
    Raises DataError on no samples, and on labels that are no classes.
    """

    def __init__(self, source: Source, name: str) -> None:
        self.source, self.name = source, name
        if len(source) == 0:
            raise DataError(f"the {name} source has no samples")
        self.info = _sound_info(source, name)
        usable = self.info.known_usable()
        if usable is not None:
            usable = _of_each(usable, "b", f"usable of the {name} source", len(source))
        self.usable: Mask | None = usable
        nothing = source.read(np.empty(0, dtype=np.int64))
        if not isinstance(nothing, Batch):
            raise DataError(f"the {name} source returns a {type(nothing).__name__}, not a Batch")
        leaves, tree = tree_flatten(nothing.x)
        self.x_shapes = tree, [tuple(leaf.shape[1:]) for leaf in leaves]
        is_tensor = isinstance(nothing.y, torch.Tensor)
        self.y_shape = tuple(nothing.y.shape[1:]) if is_tensor else ()
        self.labels: Ids | int | None = None
        self.lone = ""
        if (labels := self.info.known_labels()) is not None:
            self.labels = self._checked(labels)
        elif not (is_tensor and nothing.y.is_floating_point()):
            if self.y_shape and not self.info.classes:
                self.labels, self.lone = self.info.positions or self._positions()
            else:
                self.labels = self.info.classes or self._read()

    def learn(self) -> Ids | None:
        """Return the labels [N], -1 for bad samples; None if y is floating point.

        Where only the number of classes is known, every sample is read.
        """
        if self.y_shape:  # labels by position are not kept
            return None
        if isinstance(self.labels, int):
            self.labels = self._read()
        return self.labels

    def _read(self) -> Ids:
        """Return y of every sample, read one after another."""
        number, found = len(self.source), np.empty(0, dtype=np.int64)
        bad = np.zeros(number, dtype=np.bool_)
        for start in range(0, number, _CHUNK):
            ids = np.arange(start, min(start + _CHUNK, number))
            batch = self.source.read(ids)
            y = batch.y
            if not isinstance(y, torch.Tensor):
                raise DataError(f"labels of the {self.name} source are a {type(y).__name__}")
            if y.shape != ids.shape:
                raise DataError(
                    f"labels of the {self.name} source, {len(ids)} from sample {start} on, have "
                    f"shape {tuple(y.shape)}; one integer a sample is needed"
                )
            if not start:  # one array from the start: pieces would leave holes in memory
                found = np.empty(number, dtype=y.numpy().dtype)
            found[start : start + len(y)] = y
            bad[ids] = self.info.replaces and batch.ids.numpy() != ids
        labels = self._checked(found)
        if bad.any():
            labels[bad] = -1
            self.usable = ~bad if self.usable is None else self.usable
        return labels

    def _positions(self) -> tuple[int, str]:
        """Return :attr:`distcl.types.SourceInfo.positions`; reads every sample."""
        largest, lone = 0, ""
        for start in range(0, len(self.source), _CHUNK):
            ids = np.arange(start, min(start + _CHUNK, len(self.source)))
            y = self.source.read(ids).y.flatten(1)
            there = y != IGNORED
            counts, later = there.sum(1), there[:, 1:].sum(1)
            if int(counts.min()) == 0:
                raise DataError(
                    f"sample {start + int(counts.argmin())} of the {self.name} source has no label "
                    f"but {IGNORED}, which counts for nothing"
                )
            if not lone and int(later.min()) == 0:
                lone = f"sample {start + int(later.argmin())} of the {self.name} source"
            if bool(((y < 0) & (y != IGNORED)).any()) or int(y.max()) >= MAX_CLASSES:
                raise DataError(
                    f"labels of the {self.name} source, {len(ids)} from sample {start} on, go from "
                    f"{int(y.min())} to {int(y.max())}; 0 to {MAX_CLASSES - 1}, or {IGNORED} for "
                    "none, are needed"
                )
            largest = max(largest, int(y.max()))
        return largest + 1, lone

    def _checked(self, values: npt.ArrayLike) -> Ids:
        labels = _of_each(values, "iu", f"labels of the {self.name} source", len(self.source))
        if labels.min() < 0:
            raise DataError(
                f"label {labels.min()} of the {self.name} source, row {labels.argmin()}, is "
                "negative"
            )
        if labels.max() >= MAX_CLASSES:
            raise DataError(
                f"label {labels.max()} of the {self.name} source, row {labels.argmax()}, is not "
                f"below {MAX_CLASSES}"
            )
        return labels.astype(np.int64, copy=False)

    @property
    def classes(self) -> int:
        """One more than the largest label; 0 if y is floating point."""
        if isinstance(self.labels, np.ndarray):
            return int(self.labels.max()) + 1
        return self.labels or 0

    def occurring(self, classes: int) -> tuple[int, ...]:
        """Return those of ``classes`` that usable samples have; (): all, or not known."""
        if not isinstance(self.labels, np.ndarray):
            return ()
        labels = self.labels if self.usable is None else self.labels[self.usable]
        there = np.flatnonzero(np.bincount(labels))
        return () if len(there) == classes else tuple(there.tolist())


def groups_in(splits: Sequence[SourceSplit], config: StreamConfig) -> int:
    """Return the number of concepts: what the configuration states, else that of the groups.

    Raises ConfigError if a group would be in no experience.
    """
    groups = [s.info.groups for s in splits if isinstance(s.info.groups, np.ndarray)]
    number = 1 + max((int(g.max()) for g in groups), default=0)
    if config.concepts and number > config.concepts:
        raise ConfigError(
            f"{splits[0].info.name or 'the source'} has {number} groups, but the stream "
            f"{config.concepts} concepts (stream.experiences, or stream.recurring): write "
            "stream.experiences = 'groups'"
        )
    return config.concepts or number


def data_spec(train: SourceSplit, test: SourceSplit) -> DataSpec:
    """Return the spec of samples; ``x_shape`` is () where a sample is several tensors."""
    (_, shapes), (_, others) = train.x_shapes, test.x_shapes
    if train.x_shapes != test.x_shapes:
        raise DataError(f"training samples have shape {shapes} but test samples {others}")
    x_shape = shapes[0] if len(shapes) == 1 else ()
    if (train.labels is None) != (test.labels is None):
        raise DataError("one of training and test samples has class labels, the other targets")
    if train.y_shape != test.y_shape:
        raise DataError(
            f"training targets have shape {train.y_shape} but test targets {test.y_shape}"
        )
    ours, theirs = (tuple(split.info.class_names) for split in (train, test))
    if ours and theirs and ours != theirs:
        k = next((k for k, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), -1)
        what = f"class {k} is '{ours[k]}' in one, '{theirs[k]}' in the other"
        if k < 0:
            what = f"one has {len(ours)} names of classes, the other {len(theirs)}"
        raise DataError(f"{what}: labels would mean different things")
    tokens, longest = train.info.tokens, max(train.info.longest, test.info.longest)
    if train.labels is not None:
        classes, names = max(train.classes, test.classes), tuple(train.info.class_names)
        seen = train.occurring(classes)
        lone = train.lone or test.lone
        return DataSpec(x_shape, classes, train.y_shape, seen, names, tokens, longest, lone)
    return DataSpec(x_shape, 0, train.y_shape, tokens=tokens, longest=longest)


def _sound_info(source: Source, name: str) -> SourceInfo:
    """Return what a source says of itself, if it can be worked with; lists become arrays.

    Raises DataError on a number of classes or groups that do not fit its samples, ConfigError
    naming a method that it needs and has not.
    """
    info = info_of(source)
    needed = {"shards_of": info.sequential, "arrived": info.live_seconds, "grow": info.live_seconds}
    for method, wanted in needed.items() if name == "train" else ():
        if wanted and not callable(getattr(source, method, None)):
            what = "sequential = True" if method == "shards_of" else "live_seconds"
            raise ConfigError(
                f"the {name} source says {what}, but has no method '{method}', see "
                "distcl.types.SourceInfo"
            )
    if not 0 <= info.classes <= MAX_CLASSES:
        raise DataError(
            f"classes of the {name} source are {info.classes}; 0 to {MAX_CLASSES} are possible"
        )
    if isinstance(info.groups, np.ndarray | list | tuple):
        groups = _of_each(info.groups, "iu", f"groups of the {name} source", len(source))
        return replace(info, groups=groups)
    return info


def _of_each(values: Any, kinds: str, what: str, number: int) -> npt.NDArray[Any]:
    """Return ``values`` as an array [number] of one of these kinds of numbers; else DataError."""
    array = np.asarray(values)
    if array.dtype.kind not in kinds or array.shape != (number,):
        kind = "bool" if kinds == "b" else "integers"
        raise DataError(
            f"{what} have type {array.dtype} and shape {array.shape}; {kind} of shape ({number},) "
            "are needed"
        )
    return array
