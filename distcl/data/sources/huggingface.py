"""Hugging Face datasets as sources, decoded as they are read; needs the optional extra ``data``."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils._pytree import tree_map

from distcl.config import DataConfig, StreamConfig
from distcl.config.paths import reachable
from distcl.data.ids import checked_rows
from distcl.data.images import decode_image, pixels
from distcl.data.sources.grouping import held_out
from distcl.data.transforms import Sample, Stack, Transforms, arrays_of, to_tensor
from distcl.errors import ConfigError, DataError
from distcl.registry import nearest
from distcl.types import Batch, Ids, SourceInfo

_FILES = {
    ".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet",
    ".arrow": "arrow", ".txt": "text",
}  # fmt: skip
"""Builders of the package datasets for single files, by suffix."""


def hf(
    config: StreamConfig,
    data: DataConfig | None = None,
    image: str = "image",
    label: str = "label",
    train: str = "train",
    test: str = "test",
    name: str | None = None,
    revision: str | None = None,
) -> tuple[HFSource, HFSource]:
    """Return (train, test) of the dataset at ``stream.path``.

    The path is a folder that ``save_to_disk`` wrote, a folder of data files (images, Parquet, …), a
    file of rows (CSV, JSON, Parquet, Arrow), or a name on the hub, there with ``name`` (of a
    configuration) and ``revision``. ``image`` and ``label``: columns of x and y; ``train`` and
    ``test``: splits. Without a test split, ``test_fraction`` of each class is held out.

    Raises ConfigError if the extra is not installed or a split or column is not there, DataError
    naming the dataset if it cannot be loaded.
    """
    found = load_splits(config, train, test, name, revision)
    transforms = Transforms(data.transforms if data else ())
    source, *held = (
        HFSource(rows, image, label, f"'{config.path}', {split}", transforms)
        for split, rows in found.items()
    )
    return (source, held[0]) if held else source.holdout(config)


def load_splits(
    config: StreamConfig, train: str, test: str, name: str | None, revision: str | None
) -> dict[str, Any]:
    """Return the split ``train`` of the dataset at ``stream.path``, and ``test`` if it is there.

    Raises ConfigError naming a split that is not there, unless it is a ``test`` nobody asked for.
    """
    source = f"stream.source = '{config.source}'"
    if not config.path:
        raise ConfigError(f"{source} needs stream.path, a folder or a name on the hub")
    found = _load(source, config.path, name, revision)
    for option, split in (("train", train), ("test", test)):
        if split not in found and (option == "train" or option in config.options):
            raise ConfigError(
                f"'{config.path}' has no split '{split}'{nearest(split, found)}; it has "
                f"{', '.join(found)} (stream.options.{option})"
            )
    return {split: found[split] for split in (train, test) if split in found}


def _load(source: str, path: str, name: str | None, revision: str | None) -> dict[str, Any]:
    """Return the splits by name; a dataset without splits is called "train"."""
    try:
        import datasets
    except ImportError as error:
        raise ConfigError(
            f"{source} needs the package 'datasets'; type: pip install 'distcl[data]' ({error})"
        ) from error
    datasets.disable_progress_bars()  # of every rank, on stderr
    folder = reachable(path).absolute()  # it takes "data:x" for a URL
    if folder.exists() and "::" in str(folder):
        raise DataError(f"the package datasets cannot open '{folder}': '::' has a meaning to it")
    kind = _FILES.get(folder.suffix.lower(), "")
    if not folder.exists() and (kind or path.startswith(("/", ".", "~"))):
        raise DataError(f"stream.path: there is no '{folder}'")
    if folder.is_file() and not kind:
        raise DataError(f"'{folder}' is no file that {source} reads: {', '.join(_FILES)}")
    saved = (folder / "dataset_dict.json").exists() or (folder / "state.json").exists()
    try:
        if saved:
            found = datasets.load_from_disk(str(folder))
        elif folder.is_file():  # never looked up on the hub
            more = {"delimiter": "\t"} if folder.suffix.lower() == ".tsv" else {}
            found = datasets.load_dataset(kind, data_files=str(folder), **more)
        else:
            where = str(folder) if folder.exists() else path
            found = datasets.load_dataset(where, name, revision=revision)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise DataError(f"the dataset '{path}' cannot be loaded: {reason[0]}") from error
    return dict(found) if isinstance(found, dict) else {"train": found}


class HFSource:
    """A source over one split; ids are rows. Images become float32 [C, H, W] in [0, 1].

    Images are decoded by :mod:`distcl.data.images`. ``labels``: int64 [N], or None where the label
    column is floating point (regression). Other columns than images are numbers, read as
    :class:`distcl.data.sources.arrays.ArraySource` does, or texts if ``transforms`` make arrays of
    them. A transform finds x under the name of its column.

    Raises ConfigError if a column is not there, or labels are texts; DataError naming the row of a
    missing label.
    """

    def __init__(
        self,
        split: Any,
        image: str,
        label: str,
        where: str,
        transforms: Transforms | None = None,
    ) -> None:
        for key, column in (("image", image), ("label", label)):
            if column not in split.features:
                raise ConfigError(
                    f"{where} has no column '{column}'{nearest(column, split.features)}; it has "
                    f"{', '.join(split.features)} (stream.options.{key})"
                )
        self._split = split
        self._where, self._image, self._label = where, image, label
        self._is_image = type(split.features[image]).__name__ == "Image"
        self._transforms = transforms or Transforms()
        self._stack = Stack(where)
        columns = split.select_columns([image, label])
        kept = {"columns": [label], "output_all_columns": True} if self._is_image else {}
        self._rows = columns.with_format("numpy", **kept)  # images as they are
        names = getattr(split.features[label], "names", None) or ()
        self.labels = _labels(split, label, where)
        others = (n for n, f in split.features.items() if type(f).__name__ != "Image")
        self.info = SourceInfo(
            where,
            self.labels,
            class_names=names,
            columns={n: partial(_values_of, split, n) for n in others},
            transformed=True,
        )

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, ids: Ids) -> Batch:
        """Read rows: x [B, ...], y int64 [B] or floating point [B, ...]. Local.

        Raises DataError naming an id out of range, one whose x is of another shape than others', or
        is NaN or infinite.
        """
        ids = checked_rows(ids, len(self), self._where)
        wanted = ids if len(ids) else np.zeros(1, dtype=np.int64)
        columns = self._read_rows(wanted)
        pairs = zip(wanted.tolist(), columns[self._image], columns[self._label], strict=True)
        x, y = self._stack([self._sample(*row) for row in pairs], wanted)
        if self.labels is None and isinstance(y, torch.Tensor):
            y = to_tensor(y.numpy())
        x, y = tree_map(lambda t: t[: len(ids)], (x, y))
        return Batch(torch.from_numpy(ids), x, y, len(ids))

    def _read_rows(self, ids: Ids) -> dict[str, Any]:
        """Return the columns; DataError names the row of an image that cannot be decoded."""
        try:
            return dict(self._rows[ids.tolist()])
        except Exception as error:  # whatever the library, and Pillow, raise on a damaged file
            if len(ids) > 1:
                for id_ in ids:
                    self._read_rows(id_[None])
            raise DataError(f"{self._where}: sample {ids[0]} cannot be read ({error})") from error

    def _sample(self, id_: int, value: Any, label: Any) -> Sample:
        """Return a row as :func:`distcl.data.transforms.arrays_of` does."""
        try:
            if value is None:
                raise DataError(f"it has no '{self._image}'")
            if isinstance(value, dict) and self._is_image:  # of a column cast to decode=False
                value = decode_image(value["bytes"] or Path(value["path"]).read_bytes())
            elif self._is_image:
                value = pixels(value)
            elif not isinstance(value, str):
                value = np.asarray(value)
            sample: Sample = {self._image: value, "cls": label}
            if self._transforms:
                sample = self._transforms(sample, str(id_), id_)
            found = arrays_of(sample)
            if len(found) == 1:
                raise DataError(f"column '{self._image}' has no numbers, but texts")
            return found
        except (DataError, ValueError, OSError, SyntaxError) as error:
            raise DataError(f"{self._where}: sample {id_}: {error}") from error

    def holdout(self, config: StreamConfig) -> tuple[HFSource, HFSource]:
        """Split into (train, test), ``test_fraction`` of each class of each experience in test."""
        given = self._image, self._label, self._where, self._transforms
        *parts, infos = held_out(config, self.info, len(self))
        train, test = (HFSource(self._split.select(part), *given) for part in parts)
        for source, info in zip((train, test), infos, strict=True):
            source.info = replace(
                source.info, groups=info.groups, group_names=info.group_names, grouped=info.grouped
            )
        return train, test


def _values_of(split: Any, column: str) -> npt.NDArray[Any]:
    """Return the values of a column; dates, and texts, as they are."""
    values = split.data.column(column)
    if split._indices is not None:
        values = values.take(split._indices.column(0))
    return np.asarray(values.to_numpy())


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
