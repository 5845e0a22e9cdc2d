"""Batches that a test says, over fifty images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from distcl.data.sources.arrays import ArraySource

X = np.random.default_rng(0).random((50, 1, 4, 4), dtype=np.float32)
Y = np.arange(50) % 5
SOURCE = ArraySource(X, Y)


class Plan:
    """Global batches of given ids, cut among ranks."""

    first_step = 0

    def __init__(self, batches: Sequence[Sequence[int]], rank: int = 0, world: int = 1) -> None:
        self.batches = [np.asarray(b, dtype=np.int64) for b in batches]
        self.rank, self.world = rank, world

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        for batch in self.batches:
            yield batch[self.rank :: self.world].tolist()

    def total(self, step: int) -> int:
        return len(self.batches[step])
