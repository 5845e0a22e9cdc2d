"""Datasets that are there already, a pair (train, held-out) for each experience, as two sources."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import reduce
from typing import Any

import numpy as np
import torch
from torch.utils._pytree import tree_map

from distcl.config import StreamConfig
from distcl.data.ids import checked_rows
from distcl.data.loader import as_source
from distcl.errors import DataError
from distcl.types import Batch, Ids, Source, SourceInfo, info_of


def source_of(pairs: Sequence[Any]) -> Callable[[StreamConfig], tuple[Source, Source]]:
    """Return a stream's factory, by the name of the datasets' class; see :func:`joined_pairs`."""

    def made(config: StreamConfig) -> tuple[Source, Source]:
        return joined_pairs(pairs)

    first: Any = pairs
    while isinstance(first, list | tuple) and first:
        first = first[0]
    made.__module__, made.__name__ = type(first).__module__, type(first).__name__
    return made


def joined_pairs(pairs: Sequence[Any]) -> tuple[Source, Source]:
    """Return (train, test) of pairs (train, held-out) of map-style datasets, or sources. Local.

    A sample's group is its pair, from 0. Raises DataError naming the pair that is none, or that has
    a dataset without samples, or one that is read from front to back.
    """
    made: list[tuple[Source, Source]] = []
    for k, pair in enumerate(pairs, 1):
        if not isinstance(pair, Sequence) or len(pair) != 2:
            raise DataError(
                f"stream: experience {k} must be a pair (train, held-out) of datasets, not "
                f"{type(pair).__name__}"
            )
        try:
            made.append((as_source(pair[0]), as_source(pair[1])))
        except DataError as error:
            raise DataError(f"stream: experience {k}: {error}") from error
        if any(info_of(source).sequential for source in made[-1]):
            raise DataError(f"stream: experience {k} is read from front to back: it has no pairs")
    if not made:
        raise DataError("stream: there is no pair (train, held-out) of datasets in it")
    train, test = zip(*made, strict=True)
    return _Joined(train), _Joined(test)


class _Joined:
    """Sources one after another; ids count on."""

    def __init__(self, parts: Sequence[Source]) -> None:
        self._parts = parts
        sizes = [len(part) for part in parts]
        self._ends = np.cumsum(sizes)
        every = [info_of(part) for part in parts]
        names = [info.class_names for info in every]
        most = max(range(len(names)), key=lambda k: len(names[k]))
        for k, some in enumerate(names, 1):
            for i, (one, other) in enumerate(zip(some, names[most], strict=False)):
                if one != other:
                    raise DataError(
                        f"stream: experience {k}'s class {i} is '{one}', experience "
                        f"{most + 1}'s is '{other}'"
                    )
        labels = [info.known_labels() for info in every]
        usable = [info.known_usable() for info in every]
        self.info = SourceInfo(
            labels=None if any(y is None for y in labels) else np.concatenate(labels),  # type: ignore[arg-type]
            classes=max(i.classes for i in every) if all(i.classes for i in every) else 0,
            class_names=names[most],
            usable=None
            if all(one is None for one in usable)
            else np.concatenate(
                [np.ones(n, bool) if u is None else u for u, n in zip(usable, sizes, strict=True)]
            ),
            groups=np.repeat(np.arange(len(parts)), sizes),
            group_names=[f"experience {k + 1}" for k in range(len(parts))],
            replaces=any(info.replaces for info in every),
            tokens=max(info.tokens for info in every),
            longest=max(info.longest for info in every),
            varies=any(info.varies for info in every),
        )

    def __len__(self) -> int:
        return int(self._ends[-1])

    def read(self, ids: Ids) -> Batch:
        """See :meth:`distcl.types.Source.read`."""
        ids = checked_rows(ids, len(self), "stream")
        of = np.searchsorted(self._ends, ids, side="right")
        places = [np.flatnonzero(of == k) for k in np.unique(of)] or [np.arange(0)]
        batch = reduce(Batch.joined, [self._part(ids[p], int(of[p[:1]].sum())) for p in places])
        if len(places) == 1:
            return batch
        back = torch.from_numpy(np.argsort(np.concatenate(places)))
        found, x, y = tree_map(lambda t: t.index_select(0, back), (batch.ids, batch.x, batch.y))
        return Batch(found, x, y, len(ids))

    def _part(self, ids: Ids, k: int) -> Batch:
        """Read samples of one part."""
        begin = int(self._ends[k]) - len(self._parts[k])
        batch = self._parts[k].read(ids - begin)
        return replace(batch, ids=batch.ids + begin, total=len(ids))
