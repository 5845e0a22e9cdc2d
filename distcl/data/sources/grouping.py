"""Which samples make an experience, by ``stream.experiences``, and which are held out."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import replace
from datetime import UTC, date, datetime
from typing import Any

import numpy as np

from distcl.config import StreamConfig
from distcl.data.ids import column_of, info_part
from distcl.data.sources.arrays import stratified
from distcl.errors import ConfigError, DataError
from distcl.registry import nearest
from distcl.types import Ids, SourceInfo

_UNITS = {"year": "Y", "month": "M", "day": "D", "hour": "h"}
YEARS = -62135596800, 253402300800
"""Seconds from which on, and before which, the years of dates are 1 to 9999."""
NO_SECONDS = "beyond the year 9999; seconds are needed, are they milliseconds?"
_STRETCHES = int(StreamConfig.model_fields["experiences"].default)


def regrouped(
    config: StreamConfig, infos: Sequence[SourceInfo], sizes: Sequence[int]
) -> list[SourceInfo]:
    """Return what splits (train first) say, with the groups that ``stream.experiences`` asks for.

    Values of a column and times ascend. Raises ConfigError if a source has no such column, or
    groups of its own; DataError naming a sample without a value, or one that is held out of a group
    without training samples.
    """
    how = config.experiences
    kind, unit, column = config.grouping
    for info, size in zip(infos, sizes, strict=True):
        _check_sizes(info, size)
    if not kind or all(info.grouped == how for info in infos):
        return list(infos)
    if kind == "groups":
        if any(info.groups is None for info in infos):
            raise ConfigError(f"stream.experiences = 'groups': {infos[0].name} has none of its own")
        return list(infos)
    for info in infos:
        if info.groups is not None:
            raise ConfigError(
                f"stream.experiences = '{how}', but {info.name} has groups of its own: write "
                "'groups', or their number"
            )
    if kind == "order":
        parts = int(unit or _STRETCHES)
        if min(sizes) < parts:
            raise ConfigError(
                f"stream.experiences = '{how}': {min(sizes)} samples cannot be {parts} stretches"
            )
        names = tuple(f"part {k + 1}" for k in range(parts))
        found = [np.arange(n) * parts // n for n in sizes]
    else:
        values = [_values(info, n, column, str(how)) for info, n in zip(infos, sizes, strict=True)]
        if kind == "time":
            values = [_periods(v, unit, info.name) for v, info in zip(values, infos, strict=True)]
        found, names = group_values(values, [info.name for info in infos])
    return [
        replace(info, groups=groups, group_names=names, grouped=str(how))
        for info, groups in zip(infos, found, strict=True)
    ]


def held_out(
    config: StreamConfig, info: SourceInfo, size: int
) -> tuple[Ids, Ids, list[SourceInfo]]:
    """Return the rows of train and of test, and what is known of each, of one source.

    ``stream.test_fraction`` of each class of each experience is held out.
    """
    (info,) = regrouped(config, [info], [size])
    labels, strata = info.known_labels(), np.zeros(size, dtype=np.int64)
    if info.groups is not None:
        strata = np.asarray(info.groups[:])
    if labels is not None:
        strata = np.unique(strata * (labels.max() + 1) + labels, return_inverse=True)[1]
    if strata.min() < 0:  # bad samples are of no group
        strata = strata - strata.min()
    train, test = stratified(strata, config.test_fraction, info.name)
    if info.groups is not None:
        bare = np.setdiff1d(info.groups[train], info.groups[test])
        if len(bare := bare[bare >= 0]):
            raise DataError(
                f"experience {bare[0] + 1} ({info.group_names[bare[0]]}) of {info.name} has no two "
                "samples of one class, so none can be held out"
            )
    return train, test, [info_part(info, train), info_part(info, test)]


def group_values(values: Sequence[Any], names: Sequence[str]) -> tuple[list[Ids], tuple[str, ...]]:
    """Return the groups of splits, train first, of equal values [N] each, in order of the values.

    A value None is of no group, -1. ``names``: of the splits.
    """
    first = {v for v in values[0] if v is not None}
    known = {v: k for k, v in enumerate(sorted(first, key=lambda v: (str(type(v)), v)))}
    for split, name in zip(values, names, strict=True):
        foreign = next((v for v in split if v is not None and v not in known), None)
        if foreign is not None:
            raise DataError(f"{name} has samples of {foreign!r}, which training samples have not")
    groups = [np.array([-1 if v is None else known[v] for v in split]) for split in values]
    return groups, tuple(map(str, known))


def moment(value: Any) -> float:
    """Return a time, a number of seconds, a date or ISO text (UTC without a zone), in seconds."""
    if isinstance(value, str):
        value = datetime.fromisoformat(value)
    elif isinstance(value, date) and not isinstance(value, datetime):
        value = datetime(value.year, value.month, value.day)
    if isinstance(value, datetime):
        return (value if value.tzinfo else value.replace(tzinfo=UTC)).timestamp()
    return float(value)


def has_value(value: Any) -> bool:
    """Whether a value can say where a sample belongs: it is not missing, no NaN, and no list."""
    return value is not None and isinstance(value, Hashable) and bool(value == value)


def _check_sizes(info: SourceInfo, size: int) -> None:
    """Raise DataError if groups, or columns that are there, are not one for each sample."""
    if isinstance(info.groups, np.ndarray):
        shape, kind = info.groups.shape, info.groups.dtype
        if shape != (size,) or kind.kind not in "iub":
            raise DataError(
                f"{info.name}: its groups have shape {shape} and type {kind}; one integer for each "
                f"of the {size} samples is needed"
            )
    for name, values in info.columns.items():
        if not callable(values):
            _check_size(info.name, name, values, size)


def _check_size(source: str, column: str, values: Any, size: int) -> None:
    if len(values) != size:
        raise DataError(
            f"{source}: its column '{column}' has {len(values)} values; one for each of the {size} "
            "samples is needed"
        )


def _values(info: SourceInfo, size: int, column: str, how: str) -> Any:
    """Return a column, by default the first of dates, as a list; None: a bad sample."""
    if not column:
        column = next((n for n in info.columns if _is_dates(column_of(info, n))), "")
        if not column:
            raise ConfigError(
                f"stream.experiences = '{how}': {info.name} has no column of dates; name one as "
                f"'{how}:COLUMN'"
            )
    try:
        values = column_of(info, column)
    except KeyError:
        has = f"it has {', '.join(info.columns)}" if info.columns else "it knows of none"
        near = nearest(column, info.columns)
        raise ConfigError(
            f"stream.experiences = '{how}': {info.name} has no column '{column}'{near}; {has}"
        ) from None
    _check_size(info.name, column, values, size)
    if _is_dates(values):
        values = values.astype("datetime64[us]")
        wrong = np.flatnonzero(np.isnat(values))
        if how.startswith("key"):
            values = np.datetime_as_string(values, unit="auto").tolist()
        else:
            values = values.astype(np.int64) / 1e6
    else:
        values = values.tolist() if isinstance(values, np.ndarray) else list(values)
        bad = (
            k for k, v in enumerate(values) if not (has_value(v) or (v is None and info.replaces))
        )
        wrong = np.array([*bad], dtype=np.int64)
    if len(wrong):
        raise DataError(f"{info.name}: sample {wrong[0]} has no usable '{column}'")
    return values


def _is_dates(values: Any) -> bool:
    return isinstance(values, np.ndarray) and values.dtype.kind == "M"


def _periods(values: Any, unit: str, name: str) -> list[str | None]:
    """Return each time's period, by a name of which the order is that of time."""
    seconds = np.full(len(values), np.nan)
    for k, value in enumerate(values):
        try:
            seconds[k] = np.nan if value is None else moment(value)
        except (TypeError, ValueError, OverflowError):
            raise DataError(f"{name}: {value!r} of sample {k} is no date") from None
    known = np.isfinite(seconds)
    far = known & ~((seconds >= YEARS[0]) & (seconds < YEARS[1]))
    if far.any():
        k = int(far.argmax())
        raise DataError(f"{name}: {values[k]!r} of sample {k} is no date: {NO_SECONDS}")
    whole = np.floor(np.where(known, seconds, 0)).astype(np.int64)
    if unit != "week":
        periods = whole.astype("datetime64[s]").astype(f"datetime64[{_UNITS[unit]}]").astype(str)
    else:
        numbers, back = np.unique((whole // 86400 + 3) // 7, return_inverse=True)  # from Mondays
        mondays = (numbers * 7 - 3).astype("datetime64[D]").tolist()
        periods = np.array([f"{monday:%G-W%V}" for monday in mondays])[back]
    return [n if there else None for n, there in zip(periods.tolist(), known, strict=True)]
