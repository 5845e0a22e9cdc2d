"""Tables as sources: CSV and Parquet files, through pandas."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from distcl.config import StreamConfig
from distcl.config.paths import reachable
from distcl.data.sources.arrays import MAX_CLASSES, ArraySource
from distcl.data.sources.columns import (
    Values,
    as_dates,
    as_text,
    check_classes,
    dates,
    matching_files,
    numeric,
    read_frame,
    refuse,
    whole,
)
from distcl.data.sources.grouping import held_out
from distcl.errors import ConfigError, DataError
from distcl.registry import checked, nearest
from distcl.types import Ids, SourceInfo

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger("distcl")


@checked("stream")
def table_rows(
    config: StreamConfig,
    target: str | tuple[str, ...] = "",
    features: tuple[str, ...] = (),
    categories: tuple[str, ...] = (),
    files: tuple[str, ...] = (),
    test: tuple[str, ...] = (),
    time: str = "",
    time_format: str = "",
    task: Literal["auto", "classification", "regression"] = "auto",
    standardize: bool = True,
    standardize_target: bool = False,
    fill: float | Literal["mean"] | None = None,
    missing: tuple[str, ...] = (),
    separator: str = ",",
) -> tuple[ArraySource, ArraySource]:
    """Return (train, test) of the rows of CSV files (.csv, .tsv, packed by gzip too) or of Parquet.

    ``stream.path``: a file, or a folder of them; ``files``: names or globs in it, else all; their
    rows follow one another. ``test``: names or globs of held-out files; without them,
    ``stream.test_fraction`` of each class of each experience is held out.

    ``target``: the column of y, or several. Texts, truth values and whole numbers are classes, and
    texts their names; fractions are regression. ``task`` says it where the type does not:
    "classification" numbers whatever values there are, in order. ``features``: the columns of x, in
    their order; without them all others but ``time`` and the one that ``stream.experiences`` goes
    by. ``categories``: those of them that are one-hot, a feature for each value that training rows
    have; another value is all zeros. ``standardize``: all others have mean 0 and deviation 1 over
    training rows; ``standardize_target``: so do targets of regression, and what is predicted.

    ``time``: the column of dates by which rows are ordered (ISO, or as ``time_format`` says, as
    strptime; or numbers), and ``stream.experiences = "time:month"`` goes.

    An empty field is a missing value, so are texts in ``missing``. A missing feature is refused, or
    is ``fill``: a number, or "mean" over training rows; a category is then of none. ``separator``:
    of fields in .csv.

    Raises ConfigError on columns that are not there, or without pandas (for Parquet, pyarrow);
    DataError naming file, row (from 1, the header not counted) and column of what cannot be used.
    """
    targets = (target,) if isinstance(target, str) else target
    if not config.path or not all(targets) or not targets:
        raise ConfigError(
            "stream.source = 'table' needs stream.path, a file or a folder, and "
            "stream.options.target, the column of y"
        )
    kind, _, by = config.grouping
    if kind == "time" and not (time or by):
        raise ConfigError(
            f"stream.experiences = '{config.experiences}' needs stream.options.time, the column of "
            "dates"
        )
    by = by if kind in ("key", "time") else ""
    reader = _Reader(
        features, categories, targets, time, time_format, fill, by, kind, task, (missing, separator)
    )
    base = reachable(config.path)
    named = {file.resolve(): file for file in matching_files(base, test)} if test else {}
    found = [file for file in matching_files(base, files) if file.resolve() not in named]
    parts = [reader.read(file) for file in found]
    if not parts:
        raise DataError(f"'{base}' has no files but those of stream.options.test")
    splits = [_ordered(parts)]
    if named:
        splits.append(_ordered([reader.read(file) for file in sorted(named.values())]))
    if any(isinstance(v, str) for split in splits for v in split.columns.get(by, ())):
        for split in splits:  # of one file they may be numbers, and texts of another
            split.columns[by] = np.array([*map(as_text, split.columns[by])], dtype=object)
    y, names = _targets(splits, task, str(base))
    infos = [
        SourceInfo(f"'{base}'", _labels_of(y[k]), class_names=names, columns=split.columns)
        for k, split in enumerate(splits)
    ]
    if named:
        rows = [np.arange(len(split)) for split in splits]
    else:
        *rows, infos = held_out(config, infos[0], len(splits[0]))
        splits, y = splits * 2, y * 2
    x, columns = _features(splits, rows, standardize, fill)
    infos = [replace(info, features=columns) for info in infos]
    if y[0].dtype.kind == "f":
        y = _scaled(y, rows[0], standardize_target)
    train, held = (
        ArraySource(x[k], y[k][rows[k]], f"'{base}'" + ", test" * k, infos[k]) for k in (0, 1)
    )
    return train, held


@dataclass
class _Rows:
    """Columns of rows: features in their order, numbers or (``categories``) texts."""

    features: dict[str, Values]
    categories: tuple[str, ...]
    targets: list[Values]
    columns: dict[str, Values]
    order: Values | None

    def __len__(self) -> int:
        return len(self.targets[0])


@dataclass
class _Reader:
    """Reads files to rows, and checks every value of them. All files have the first's columns."""

    features: tuple[str, ...]
    categories: tuple[str, ...]
    targets: tuple[str, ...]
    time: str
    time_format: str
    fill: Any
    by: str
    kind: str
    task: str
    options: tuple[tuple[str, ...], str]

    def read(self, file: Path) -> _Rows:
        """Return the rows of a file. Raises ConfigError or DataError, see :func:`table_rows`."""
        frame = read_frame(file, *self.options)
        self._check(frame, file)
        columns = {}
        order = None
        if self.time:
            order = columns[self.time] = dates(frame, self.time, self.time_format, file)
        if self.by and self.kind == "key":
            columns[self.by] = whole(frame, self.by, file)
        elif self.kind == "time":
            name = self.by or self.time
            columns[name] = as_dates(dates(frame, name, self.time_format, file), name, file)
        features = {
            name: self._category(frame, name, file)
            if name in self.categories
            else self._numbers(frame, name, file)
            for name in self.features
        }
        targets = [whole(frame, name, file) for name in self.targets]
        for name, values in zip(self.targets, targets, strict=True):
            if values.dtype.kind in "Mm":
                raise DataError(f"'{file}': column '{name}', the target, holds dates")
            if values.dtype.kind == "f" and not np.isfinite(values).all():
                refuse(file, int(np.isfinite(values).argmin()), name, "is infinite")
            check_classes(values, self.task == "auto", name, file)
        return _Rows(features, self.categories, targets, columns, order)

    def _check(self, frame: pd.DataFrame, file: Path) -> None:
        """Settle which columns are features; all that are named must be there."""
        asked = {
            **dict.fromkeys(self.categories, "stream.options.categories"),
            **dict.fromkeys(self.features, "stream.options.features"),
            **dict.fromkeys(self.targets, "stream.options.target"),
            self.time: "stream.options.time",
            self.by: "stream.experiences",
        }
        for name, key in asked.items():
            if name and name not in frame:
                raise ConfigError(
                    f"'{file}' has no column '{name}'{nearest(name, frame)}; it has "
                    f"{', '.join(frame)} ({key})"
                )
        if not len(frame):
            raise DataError(f"'{file}' has no rows")
        others = {*self.targets, self.time, self.by}
        self.features = self.features or tuple(name for name in frame if name not in others)
        for name in self.categories:
            if name not in self.features:
                raise ConfigError(f"stream.options.categories: '{name}' is none of the features")
        if unnamed := [name for name in self.features if name.startswith("Unnamed: ")]:
            raise DataError(
                f"'{file}' has a column without a name, {unnamed[0].split()[1]} (from 0); name it, "
                "or say which are the features (stream.options.features)"
            )
        if twice := {*self.features} & {*self.targets, self.time}:
            raise ConfigError(f"stream.options.features: '{min(twice)}' is the target, or the time")
        if not self.features:
            raise ConfigError(f"'{file}' has no columns left to be features")

    def _numbers(self, frame: pd.DataFrame, name: str, file: Path) -> Values:
        values = numeric(frame[name], name, file)
        self._present(np.isnan(values), name, file)
        return values

    def _category(self, frame: pd.DataFrame, name: str, file: Path) -> Values:
        lacking = frame[name].isna().to_numpy()
        self._present(lacking, name, file)
        pairs = zip(frame[name], lacking, strict=True)
        return np.array([None if none else as_text(value) for value, none in pairs], dtype=object)

    def _present(self, lacking: Values, name: str, file: Path) -> None:
        if self.fill is None and lacking.any():
            refuse(file, int(lacking.argmax()), name, "is missing (stream.options.fill)")


def _ordered(parts: Sequence[_Rows]) -> _Rows:
    """Return the rows of files as one, ordered by time if there is one; equal times as they lie."""
    first = parts[0]

    def one(found: Sequence[Values], order: Ids | None = None) -> Values:
        whole = np.concatenate(found)
        return whole if order is None else whole[order]

    order = None
    if first.order is not None:
        order = np.argsort(one([p.order for p in parts if p.order is not None]), kind="stable")
    return _Rows(
        {name: one([p.features[name] for p in parts], order) for name in first.features},
        first.categories,
        [one([p.targets[k] for p in parts], order) for k in range(len(first.targets))],
        {name: one([p.columns[name] for p in parts], order) for name in first.columns},
        None,
    )


def _targets(splits: Sequence[_Rows], task: str, name: str) -> tuple[list[Values], tuple[str, ...]]:
    """Return y of each split, and the names of the classes if they have some."""
    kinds = {column.dtype.kind for split in splits for column in split.targets}
    if task == "auto":
        task = "regression" if "f" in kinds or len(splits[0].targets) > 1 else "classification"
        if kinds <= {"i", "u", "b"} and task == "classification":
            y = [split.targets[0].astype(np.int64) for split in splits]
            for value in (min(part.min() for part in y), max(part.max() for part in y)):
                if not 0 <= value < MAX_CLASSES:
                    raise ConfigError(
                        f"{name}: a target is {value}, no number of a class; stream.options.task = "
                        "'classification' numbers whatever values there are, 'regression' takes "
                        "them as they are"
                    )
            return y, ()
    if task == "regression":
        try:
            y = [np.stack(split.targets, 1).astype(np.float64) for split in splits]
        except (TypeError, ValueError):
            raise DataError(f"{name}: targets are texts; regression needs numbers") from None
        return [part[:, 0] if part.shape[1] == 1 else part for part in y], ()
    if len(splits[0].targets) > 1:
        raise ConfigError("stream.options.target: classification needs one column")
    columns = [split.targets[0].tolist() for split in splits]
    if any(isinstance(v, str) for column in columns for v in column):
        columns = [[*map(as_text, column)] for column in columns]
    known = sorted({v for column in columns for v in column}, key=lambda v: (str(type(v)), v))
    numbers = {value: k for k, value in enumerate(known)}
    return [np.array([numbers[v] for v in c]) for c in columns], tuple(map(as_text, known))


def _scaled(y: list[Values], train: Ids, standardize: bool) -> list[Values]:
    """Return targets of regression, float32, or say that they are far from 0 and 1."""
    rows = y[0][train]
    flat = np.ptp(rows, 0) == 0  # its mean may be off by a rounding, and not equal to it
    mean, deviation = np.where(flat, rows[0], rows.mean(0)), np.where(flat, 0, rows.std(0))
    if standardize:
        y = [(part - mean) / np.where(deviation > 0, deviation, 1.0) for part in y]
    elif max(np.abs(mean).max(), deviation.max()) > 10:
        log.info(
            "[data] targets have mean %s and deviation %s; stream.options.standardize_target = "
            "true brings them to 0 and 1", mean.round(3), deviation.round(3)
        )  # fmt: skip
    return [part.astype(np.float32) for part in y]


def _labels_of(y: Values) -> Ids | None:
    return y if y.dtype.kind == "i" else None


def _features(
    splits: Sequence[_Rows], rows: Sequence[Ids], standardize: bool, fill: Any
) -> tuple[list[Values], tuple[str, ...]]:
    """Return x of train and of test, float32 [N, D], and the names [D] of its columns.

    What is learned is of training rows alone.
    """
    parts: list[list[Values]] = [[], []]
    names: list[str] = []
    for name in splits[0].features:
        train, test = (split.features[name][r] for split, r in zip(splits, rows, strict=True))
        if name in splits[0].categories:
            values = sorted({v for v in train.tolist() if v is not None})
            foreign = sorted({v for v in test.tolist() if v is not None} - {*values})
            if foreign:
                log.info("[data] '%s' is %s in no training row: all zeros", name, foreign[:8])
            names += [f"{name}={value}" for value in values]
            both = [part[:, None] == np.array(values, dtype=object) for part in (train, test)]
        else:
            names.append(name)
            there = train[~np.isnan(train)]
            instead = fill if fill != "mean" else there.mean() if len(there) else 0.0
            both = [part[:, None] for part in (train, test)]
            if fill is not None:
                both = [np.where(np.isnan(part), instead, part) for part in both]
            if standardize:
                mean, deviation = both[0].mean(), both[0].std() or 1.0
                if np.ptp(both[0]) == 0:  # the mean may be off by a rounding
                    mean, deviation = both[0][0], 1.0
                both = [(part - mean) / deviation for part in both]
        for k in (0, 1):
            parts[k].append(both[k].astype(np.float32))
    return [np.concatenate(part, 1) for part in parts], tuple(names)
