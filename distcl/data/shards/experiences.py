"""Experiences over shards: by ranges of shards, by a field of the samples' JSON, by time."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from distcl.data.shards.manifest import MANIFEST, Texts
from distcl.data.shards.tar import read_members
from distcl.data.sources.grouping import moment
from distcl.errors import ConfigError, DataError
from distcl.types import Ids

if TYPE_CHECKING:
    from distcl.data.shards.indexed import ShardSource

_KEY = "stream.options.experiences"


class ByShard:
    """The group of each sample, where each is a range of shards: N numbers, worked out as asked."""

    def __init__(self, source: ShardSource, concepts: int) -> None:
        self._source = source
        self._concepts = concepts

    def __getitem__(self, key: slice | Ids) -> Ids:
        rows = np.arange(*key.indices(len(self._source))) if isinstance(key, slice) else key
        shard, shards = self._source.shards_of(rows)
        group: Ids = shard * self._concepts // shards
        return group


Groups = Ids | ByShard
"""The group of each sample by row, int64: indexed by slices and arrays of rows."""


class Fields(dict[str, Any]):
    """The values of a field of the JSON of every sample, read as they are asked for."""

    def __init__(self, source: ShardSource) -> None:
        super().__init__()
        self._source = source

    def __missing__(self, field: str) -> Any:
        return np.array([*_values(self._source, field, False), None], dtype=object)[:-1]


def assign_groups(sources: Sequence[ShardSource], how: str, concepts: int) -> None:
    """Set ``groups`` of the sources of all splits, train first. Local; may read every sample.

    ``how``: shards, key:FIELD or time:FIELD, see :func:`data.shards.open.shards`. Samples that
    cannot be read get group -1. Raises ConfigError if they do not make ``concepts`` groups,
    DataError naming the sample that has no such field.
    """
    kind, _, field = how.partition(":")
    if how == "shards":
        for source in sources:
            if len(source.shards) < concepts:
                raise ConfigError(
                    f"{_KEY} = 'shards': {source.name} has {len(source.shards)} shards, too few "
                    f"for {concepts} experiences"
                )
            source.groups = ByShard(source, concepts)
        return
    if kind not in ("key", "time") or not field:
        raise ConfigError(f"{_KEY} = '{how}' is none of shards, key:FIELD, time:FIELD")
    values = [_values(source, field, kind == "time") for source in sources]
    edges = (_times if kind == "time" else _keys)(values[0], concepts, how)
    for source, found in zip(sources, values, strict=True):
        known = np.array([v is not None for v in found])
        given = [v for v in found if v is not None]
        source.groups = np.full(len(found), -1)
        if kind == "time":
            source.groups[known] = np.searchsorted(edges, given, side="right")
        else:
            numbers = {value: k for k, value in enumerate(edges)}
            foreign = [v for v in given if v not in numbers]
            if foreign:
                raise DataError(
                    f"{source.name} has samples of {foreign[0]!r}, which training samples have not"
                )
            source.groups[known] = [numbers[v] for v in given]


def assign_domains(sources: Sequence[ShardSource], texts: Texts, concepts: int) -> None:
    """Set ``groups`` of the sources of all splits to the domains of their texts. Local.

    Raises ConfigError if these are not ``concepts`` (0: as many as there are), or not known before
    shards are read.
    """
    names = texts.domains
    if concepts and len(names) != concepts:
        raise ConfigError(
            f"{sources[0].name} has {len(names)} domains ({', '.join(names[:8])}), but the stream "
            f"has {concepts} experiences (stream.experiences); {_KEY} = 'shards' makes others"
        )
    for source in sources:
        groups = source.column() // max(texts.classes, 1)
        if (most := int(groups.max())) >= len(names):
            raise DataError(
                f"{source.name}: sample {groups.argmax()} has domain {most}, but {MANIFEST} names "
                f"{len(names)}"
            )
        source.groups = groups.astype(np.min_scalar_type(-len(names)))
        source.group_names = names


def _values(source: ShardSource, field: str, time: bool) -> list[Any]:
    """Return a field of every sample's JSON; None where the sample cannot be read."""
    found: list[Any] = []
    for id_ in range(len(source)):
        try:
            key, members = read_members(next(source.extents(np.array([id_]))))
        except DataError:
            found.append(None)
            continue
        if "json" not in members:
            raise DataError(
                f"{source.name}, sample '{key}', id {id_}: it has no json, where '{field}' would be"
            )
        try:
            value = json.loads(members["json"])[field]
            if value is None or value != value:
                raise ValueError(f"it is {value}")
            found.append(moment(value) if time else value)
            hash(value)
        except (KeyError, ValueError, TypeError) as error:
            raise DataError(
                f"{source.name}, sample '{key}', id {id_}: its json has no usable '{field}' "
                f"({type(error).__name__}: {error})"
            ) from None
    return found


def _keys(values: list[Any], concepts: int, how: str) -> list[Any]:
    """Return the different values in order; there must be one for each concept."""
    found = sorted({v for v in values if v is not None}, key=lambda v: (str(type(v)), v))
    if len(found) != concepts:
        shown = ", ".join(map(repr, found[:8])) + (", …" if len(found) > 8 else "")
        raise ConfigError(
            f"{_KEY} = '{how}' finds {len(found)} values ({shown}), but the stream has {concepts} "
            "experiences"
        )
    return found


def _times(values: list[Any], concepts: int, how: str) -> list[Any]:
    """Return the times at which the second and later groups begin."""
    times = np.sort([v for v in values if v is not None])
    edges = times[np.arange(1, concepts) * len(times) // concepts]
    if len(np.unique(edges)) < len(edges) or (len(edges) and edges[0] == times[0]):
        raise ConfigError(f"{_KEY} = '{how}': too few different times for {concepts} experiences")
    return [float(edge) for edge in edges]
