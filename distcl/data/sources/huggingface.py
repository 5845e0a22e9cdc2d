"""Hugging Face datasets as sources, decoded as they are read; needs the optional extra ``data``."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from distcl.config import StreamConfig
from distcl.config.paths import reachable
from distcl.data.sources.arrays import as_tensor, stratified
from distcl.errors import ConfigError, DataError
from distcl.registry import nearest
from distcl.types import Batch, Ids


def hf(
    config: StreamConfig,
    image: str = "image",
    label: str = "label",
    train: str = "train",
    test: str = "test",
    name: str | None = None,
    revision: str | None = None,
) -> tuple[HFSource, HFSource]:
    """Return (train, test) of the dataset at ``stream.path``.

    The path is a folder that ``save_to_disk`` wrote, a folder of data files (images, Parquet, …),
    or a name on the hub, there with ``name`` (of a configuration) and ``revision``. ``image`` and
    ``label``: columns of x and y; ``train`` and ``test``: splits. Without a test split,
    ``test_fraction`` of each class is held out.

    Raises ConfigError if the extra is not installed or a split or column is not there, DataError
    naming the dataset if it cannot be loaded.
    """
    if not config.path:
        raise ConfigError("stream.source = 'hf' needs stream.path, a folder or a name on the hub")
    found = _load(config.path, name, revision)
    if train not in found:
        raise ConfigError(
            f"'{config.path}' has no split '{train}'{nearest(train, found)}; it has "
            f"{', '.join(found)} (stream.options.train)"
        )
    source = HFSource(found[train], image, label, f"'{config.path}', {train}")
    if test in found:
        return source, HFSource(found[test], image, label, f"'{config.path}', {test}")
    if "test" in config.options:
        raise ConfigError(f"'{config.path}' has no split '{test}'{nearest(test, found)}")
    return source.holdout(config.test_fraction)


def _load(path: str, name: str | None, revision: str | None) -> dict[str, Any]:
    """Return the splits by name; a dataset without splits is called "train"."""
    try:
        import datasets
    except ImportError as error:
        raise ConfigError(
            "stream.source = 'hf' needs the package 'datasets'; type: pip install 'distcl[data]' "
            f"({error})"
        ) from error
    folder = reachable(path).absolute()  # it takes "data:x" for a URL
    if folder.exists() and "::" in str(folder):
        raise DataError(f"the package datasets cannot open '{folder}': '::' has a meaning to it")
    saved = (folder / "dataset_dict.json").exists() or (folder / "state.json").exists()
    try:
        if saved:
            found = datasets.load_from_disk(str(folder))
        else:
            where = str(folder) if folder.exists() else path
            found = datasets.load_dataset(where, name, revision=revision)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise DataError(f"the dataset '{path}' cannot be loaded: {reason[0]}") from error
    return dict(found) if isinstance(found, dict) else {"train": found}


class HFSource:
    """A source over one split; ids are rows. Images become float32 [C, H, W] in [0, 1].

    ``labels``: int64 [N], or None where the label column is floating point (regression). Other
    columns than images are numbers, read as :class:`distcl.data.sources.arrays.ArraySource` does.

    Raises ConfigError if a column is not there, or labels are texts; DataError naming the row of a
    missing label.
    """

    def __init__(self, split: Any, image: str, label: str, where: str) -> None:
        for key, column in (("image", image), ("label", label)):
            if column not in split.features:
                raise ConfigError(
                    f"{where} has no column '{column}'{nearest(column, split.features)}; it has "
                    f"{', '.join(split.features)} (stream.options.{key})"
                )
        self._where, self._image, self._label = where, image, label
        self._is_image = type(split.features[image]).__name__ == "Image"
        self._rows = split.select_columns([image, label]).with_format("numpy")
        self.labels = _labels(split, label, where)

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, ids: Ids) -> Batch:
        """Read rows: x [B, ...], y int64 [B] or floating point [B, ...]. Local.

        Raises DataError naming an id out of range, one whose x is of another shape than others', or
        is NaN or infinite.
        """
        ids = np.array(ids, dtype=np.int64)
        outside = (ids < 0) | (ids >= len(self))
        if outside.any():
            raise DataError(
                f"{self._where}: there is no sample {ids[outside][0]} (0…{len(self) - 1})"
            )
        rows = self._rows[ids.tolist() or [0]]
        x, y = self._samples(rows[self._image], ids), np.asarray(rows[self._label])
        targets = as_tensor(y) if self.labels is None else torch.from_numpy(y.astype(np.int64))
        return Batch(torch.from_numpy(ids), x[: len(ids)], targets[: len(ids)], len(ids))

    def holdout(self, fraction: float) -> tuple[HFSource, HFSource]:
        """Split into sources (train, test), ``fraction`` of each class in test."""
        labels = np.zeros(len(self), np.int64) if self.labels is None else self.labels
        parts = stratified(labels, fraction)
        if len(parts[1]) == 0:
            raise DataError(f"{self._where}: no class has two samples, so none can be held out")
        train, test = (
            HFSource(self._rows.select(part), self._image, self._label, self._where)
            for part in parts
        )
        return train, test

    def _samples(self, x: Any, ids: Ids) -> torch.Tensor:
        x = np.asarray(x)
        if x.dtype == object:
            shapes = [np.shape(sample) for sample in x]
            odd = next(i for i, shape in enumerate(shapes) if shape != shapes[0])
            raise DataError(
                f"{self._where}: sample {ids[odd]} has shape {shapes[odd]}, but sample {ids[0]} "
                f"has {shapes[0]}; bring them to one size and mode"
            )
        if x.dtype.kind == "f" and not np.isfinite(x).all():
            bad = ids[int(np.isfinite(x).reshape(len(x), -1).all(axis=1).argmin())]
            raise DataError(f"{self._where}: sample {bad} has a value that is NaN or infinite")
        if x.dtype.kind not in "biuf":
            raise DataError(f"{self._where}: column '{self._image}' has no numbers, but {x.dtype}")
        if self._is_image:
            x = x[:, None] if x.ndim == 3 else np.moveaxis(x, -1, 1)
        return as_tensor(np.ascontiguousarray(x))


def _labels(split: Any, label: str, where: str) -> Ids | None:
    column = split.data.column(label)
    if column.null_count:
        row = next(i for i, value in enumerate(split[label]) if value is None)
        raise DataError(f"{where}: row {row} has no '{label}'")
    kind = str(column.type)
    if kind.startswith(("float", "double", "halffloat", "list", "fixed_size_list")):
        return None
    if not kind.startswith(("int", "uint", "bool")):
        raise ConfigError(
            f"{where}: column '{label}' has type {kind}; class labels (integers) or floating-point "
            "targets are needed (stream.options.label)"
        )
    return np.asarray(split.with_format("numpy")[label][:]).astype(np.int64)
