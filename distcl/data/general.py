"""General data: samples that no experience has, there to be replayed from the first round on."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch.utils._pytree import tree_map

from distcl.data.labels import SourceSplit, data_spec
from distcl.errors import ConfigError, DataError
from distcl.types import (
    GENERAL,
    Batch,
    DataSpec,
    Ids,
    Mask,
    Source,
    frozen,
    info_of,
    pack_ids,
    unpack_ids,
)


class General:
    """Samples of ``source`` as they are, under ids of an experience that is none, ``GENERAL``.

    Raises ConfigError if the source cannot be read in any order, DataError if its samples do not
    fit those of the stream: ``train``, whose spec is ``spec``.
    """

    def __init__(self, source: Source, train: SourceSplit, spec: DataSpec) -> None:
        self.source = source
        for info in (train.info, info_of(source)):
            if info.sequential or info.live_seconds:
                raise ConfigError(
                    "stream.general needs sources that are read in any order: not streamed shards, "
                    "and no folder that grows"
                )
        split = SourceSplit(source, "general")
        if split.info.replaces:
            raise ConfigError("stream.general does not go with data.on_bad_sample = 'skip'")
        try:
            found = data_spec(train, split)
        except DataError as error:
            raise DataError(f"stream.general does not fit the stream: {error}") from None
        if found.classes > spec.classes:
            raise DataError(
                f"stream.general has {found.classes} classes, counted to its largest label, but "
                f"the stream {spec.classes}"
            )
        ours, theirs = train.info.tokenizer, split.info.tokenizer
        if ours and theirs and ours != theirs:
            raise DataError(
                f"the tokenizer of stream.general is {theirs}, that of the stream is {ours}: give "
                "both the same (options.tokenizer)"
            )
        self.spec = replace(spec, longest=found.longest, lone=spec.lone or found.lone)
        rows = np.arange(len(source))
        self.ids = frozen(pack_ids(GENERAL, rows if split.usable is None else rows[split.usable]))

    def holds(self, ids: Ids) -> Mask:
        """Return which ids [N] are of these samples, bool [N]. Local."""
        there: Mask = unpack_ids(ids)[0] == GENERAL
        return there

    def others(self, ids: Ids) -> Ids:
        """Return the ids that are not of these samples; DataError if one of these is unknown."""
        there = self.holds(ids)
        _, rows, test = unpack_ids(ids[there])
        if (bad := (rows >= len(self.source)) | test).any():
            raise DataError(
                f"sample {ids[there][bad.argmax()]} is not in stream.general: row "
                f"{rows[bad.argmax()]} of {len(self.source)}"
            )
        return ids[~there]

    def read(self, ids: Ids, stream: Source) -> Batch:
        """Read samples, these and the stream's, in the order asked. Local."""
        there = self.holds(ids)
        others = stream.read(self.others(ids))
        base = self.source.read(unpack_ids(ids[there])[1])
        mine = Batch(torch.from_numpy(ids[there]), base.x, base.y, len(base))
        both = others.joined(mine)
        back = torch.from_numpy(np.argsort(np.argsort(there, kind="stable")))
        x, y = tree_map(lambda t: t[back], (both.x, both.y))
        return Batch(both.ids[back], x, y, len(ids))
