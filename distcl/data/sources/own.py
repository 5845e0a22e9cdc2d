"""Datasets of torch's as sources: what a function of the user's returns."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import IterableDataset

from distcl import registry
from distcl.config import StreamConfig
from distcl.data.loader import DatasetSource
from distcl.data.sources.arrays import MAX_CLASSES
from distcl.data.sources.grouping import held_out
from distcl.errors import ConfigError, DataError
from distcl.types import SourceInfo

log = logging.getLogger("distcl")

_CHUNK = 1024


def torch(
    config: StreamConfig, dataset: str, labels: str = "", **options: Any
) -> tuple[DatasetSource, DatasetSource]:
    """Return (train, test) of a map-style dataset of pairs (x, y), or of two, (train, held-out).

    ``dataset``: the function that returns it, ``package.module:function``, called with the other
    options as keywords. Of one dataset ``stream.test_fraction`` of each class of each experience is
    held out. y is a whole number, a class, or floating point, for regression. A dataset may have
    ``classes``, the names of its classes; ``groups`` [N], the experience of each sample; and
    ``columns``, a dict of values [N] by which ``stream.experiences`` may go. ``labels``: an
    attribute that has y of all samples (torchvision's ``targets``); without it every sample is read
    once to learn them.

    Raises ConfigError if there is no such function, or it returns something else, DataError or
    UserCodeError naming a sample that cannot be read.
    """
    made = registry.create("source", dataset, options=options)
    pair = made if isinstance(made, list | tuple) else (made,)
    if len(pair) not in (1, 2):
        raise ConfigError(
            f"stream.options.dataset = '{dataset}' returns {len(pair)} things; a dataset, or a "
            "pair (train, held-out), is needed"
        )
    sources = [_source(each, dataset, labels) for each in pair]
    if len(sources) == 2:
        return sources[0], sources[1]
    *rows, infos = held_out(config, sources[0].info, len(sources[0]))
    train, test = (sources[0].part(r, info) for r, info in zip(rows, infos, strict=True))
    return train, test


def _source(dataset: Any, name: str, labels: str) -> DatasetSource:
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__"):
        raise ConfigError(
            f"stream.options.dataset = '{name}' returns a {type(dataset).__name__}; a map-style "
            "dataset, with __len__ and __getitem__, is needed"
        )
    source = DatasetSource(dataset)
    if labels and not hasattr(dataset, labels):
        raise ConfigError(
            f"stream.options.labels: {type(dataset).__name__} has no attribute '{labels}'"
        )
    y = getattr(dataset, labels) if labels else _labels(source)
    y = np.asarray(y)
    if labels and y.shape != (len(source),):
        raise DataError(
            f"{source.info.name}.{labels} has shape {y.shape}; one label for each of the "
            f"{len(source)} samples is needed"
        )
    if y.dtype.kind in "iub" and y.ndim == 1:
        bad = (y < 0) | (y >= MAX_CLASSES)
        if bad.any():
            row = int(bad.argmax())
            raise DataError(
                f"{source.info.name}, sample {row}: label {y[row]} is out of range "
                f"(0…{MAX_CLASSES - 1})"
            )
        _check_names(source.info, int(y.max()), int(y.argmax()))
        source.info = replace(source.info, labels=y.astype(np.int64))
    elif y.dtype.kind in "iu" and y.shape == (len(source), 1):
        log.warning(
            "[data] %s: y is a tensor [1], which counts as several labels a sample; for one, give "
            "a number", source.info.name
        )  # fmt: skip
    return source


def _check_names(info: SourceInfo, most: int, row: int) -> None:
    if info.class_names and most >= len(info.class_names):
        raise DataError(
            f"{info.name}, sample {row}: label {most} is out of range: there are "
            f"{len(info.class_names)} names of classes"
        )


def _labels(source: DatasetSource) -> Any:
    """Return y of every sample, one tensor."""
    found = []
    for start in range(0, len(source), _CHUNK):
        y = source.read(np.arange(start, min(start + _CHUNK, len(source)))).y
        if not isinstance(y, Tensor):
            raise DataError(
                f"{source.info.name}, sample {start}: y is a {type(y).__name__}; a number, or a "
                "tensor of them, is needed"
            )
        found.append(y.numpy())
    return np.concatenate(found)
