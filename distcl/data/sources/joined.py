"""Several sources as one, each of them an experience."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch.utils._pytree import tree_map

from distcl.config import StreamConfig
from distcl.data.ids import checked_rows
from distcl.errors import ConfigError, DataError
from distcl.types import Batch, Ids, Source, SourceInfo, info_of


def join_sources(config: StreamConfig, sources: Sequence[Source]) -> JoinedSource:
    """Return the sources that ``stream.experiences`` lists as one, with a group for each."""
    names = [each.path and Path(each.path).stem for each in config.listed]
    if len(set(names)) < len(names):
        names = [each.path or each.source for each in config.listed]
    return JoinedSource(sources, names)


class JoinedSource:
    """Samples of sources one after the other; ids are rows. ``names``: one of each.

    Classes that have names are numbered anew, in the order in which the sources bring them; others
    stay. Raises ConfigError on sources that are streamed or grow, or of which only some name their
    classes; ``read`` raises DataError if samples do not go together.
    """

    def __init__(self, sources: Sequence[Source], names: Sequence[str]) -> None:
        self._sources = sources
        infos = [info_of(source) for source in sources]
        for info in infos:
            if info.sequential or info.live_seconds or info.known_usable() is not None:
                raise ConfigError(
                    f"stream.experiences: {info.name} cannot be one of several sources: it is "
                    "streamed, or grows, or has bad samples"
                )
        shapes = [_shapes(source) for source in sources]
        for info, shape in zip(infos, shapes, strict=True):
            if shape != shapes[0]:
                raise DataError(
                    f"stream.experiences: samples of {info.name} are {shape}, but those of "
                    f"{infos[0].name} {shapes[0]}"
                )
            _check_same(infos[0], info)
        sizes = [len(source) for source in sources]
        self._firsts = np.cumsum([0, *sizes])
        named = [tuple(info.class_names) for info in infos]
        if any(named) and not all(named):
            raise ConfigError("stream.experiences: some of the sources name their classes, not all")
        classes = tuple(dict.fromkeys(name for some in named for name in some))
        self._numbers = [np.array([classes.index(name) for name in some]) for some in named]
        labels = [self._renumbered(k, info.known_labels()) for k, info in enumerate(infos)]
        known = [found for found in labels if found is not None]
        most = max(infos, key=lambda info: info.longest)
        self.info = replace(
            most,
            name=" + ".join(info.name or name for info, name in zip(infos, names, strict=True)),
            labels=np.concatenate(known) if len(known) == len(labels) else None,
            classes=0 if any(not info.classes for info in infos) else max(i.classes for i in infos),
            class_names=classes,
            usable=None,
            groups=np.repeat(np.arange(len(sizes)), sizes),
            group_names=tuple(names),
            columns={},
            tokens=max(info.tokens for info in infos),
            varies=any(info.varies for info in infos),
            replaces=any(info.replaces for info in infos),
            positions=None,
            transformed=True,
        )

    def __len__(self) -> int:
        return int(self._firsts[-1])

    def _renumbered(self, k: int, y: Ids | None) -> Ids | None:
        return y if y is None or not len(self._numbers[k]) else self._numbers[k][y]

    def read(self, ids: Ids) -> Batch:
        """Read rows. Local. Raises DataError naming samples that do not go together."""
        ids = checked_rows(ids, len(self), self.info.name)
        which = np.searchsorted(self._firsts, ids, side="right") - 1
        places = [np.flatnonzero(which == k) for k in range(len(self._sources))]
        parts = [
            self._part(k, ids[at] - self._firsts[k])
            for k, at in enumerate(places)
            if len(at) or (not len(ids) and not k)
        ]
        whole = parts[0]
        try:
            for part in parts[1:]:
                whole = whole.joined(part)
        except (ConfigError, RuntimeError, ValueError, KeyError) as error:
            raise DataError(f"stream.experiences: {self.info.name}: {error}") from error
        back = torch.from_numpy(np.argsort(np.concatenate(places), kind="stable"))
        read, x, y = tree_map(lambda t: t.index_select(0, back), (whole.ids, whole.x, whole.y))
        return Batch(read, x, y, len(ids))

    def _part(self, k: int, rows: Ids) -> Batch:
        batch = self._sources[k].read(rows)
        batch = replace(batch, ids=batch.ids + int(self._firsts[k]))  # others than asked, maybe
        if not isinstance(batch.y, torch.Tensor) or batch.y.ndim != 1:
            return batch
        return replace(batch, y=torch.from_numpy(self._renumbered(k, batch.y.numpy())))


def _check_same(first: SourceInfo, other: SourceInfo) -> None:
    """Raise DataError if columns or token ids of two sources mean different things."""
    for ours, theirs in zip(first.features, other.features, strict=False):
        if ours != theirs:
            raise DataError(
                f"stream.experiences: {other.name} has feature '{theirs}' where {first.name} has "
                f"'{ours}': name them in one order (stream.options.features)"
            )
    if first.tokenizer and other.tokenizer and first.tokenizer != other.tokenizer:
        raise DataError(
            f"stream.experiences: the tokenizer of {other.name} is {other.tokenizer}, that of "
            f"{first.name} is {first.tokenizer}: give both the same (options.tokenizer)"
        )


def _shapes(source: Source) -> str:
    nothing = source.read(np.empty(0, dtype=np.int64))
    return str(tree_map(lambda t: list(t.shape[1:]), (nothing.x, nothing.y)))
