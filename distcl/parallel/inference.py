"""A forward pass over many samples, shared among ranks: scoring, evaluation and watching use it.

Ids are cut into fixed chunks; whole chunks are dealt contiguously to ranks. So the same forwards
happen at any world size, and per-sample results do not depend on it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar, cast

import torch
from torch import nn
from torch.utils._pytree import tree_map

from distcl.data.loader import iterate_chunks
from distcl.distributed.runtime import Runtime
from distcl.losses import unreduced
from distcl.parallel.partition import Partition
from distcl.types import Batch, Ids, Outputs, PyTree, Source, UnreducedLoss

T = TypeVar("T")


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Eval mode inside; every submodule's own mode is restored, also when the body raises."""
    modes = [(m, m.training) for m in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for m, mode in modes:
            m.training = mode


class ShardedForward:
    """Runs the model over samples by id, each rank its chunks, results gathered on all ranks.

    ``forwards`` counts samples passed through the model, over all ranks together.
    """

    def __init__(
        self,
        runtime: Runtime,
        model: nn.Module,
        partition: Partition,
        criterion: UnreducedLoss,
    ) -> None:
        self.runtime = runtime
        self.module = runtime.strategy.unwrap(model)
        self.partition = partition
        self.criterion = criterion
        self.forwards = 0

    def state_dict(self) -> int:
        """Return the count."""
        return self.forwards

    def load_state_dict(self, state: int) -> None:
        """Restore it."""
        self.forwards = state

    def mine(self, ids: Ids, size: int) -> Ids:
        """Return the part of ``ids`` that lies in this rank's chunks. Local."""
        lo, hi = self.runtime.share(-(-len(ids) // size))
        return ids[lo * size : hi * size]

    def gather(self, mine: torch.Tensor, n: int, size: int) -> torch.Tensor:
        """Put the results of every rank's chunks together: [n, ...] on all ranks. Collective."""
        chunks = -(-n // size)
        return self.runtime.all_gather(mine, n, each=-(-chunks // self.runtime.world_size) * size)

    def outputs(self, batch: Batch) -> Outputs:
        """Return loss [B] and logits of one chunk already on the device; see :meth:`inferring`.

        Raises ConfigError if the loss is not one number a sample.
        """
        with self.runtime.strategy.autocast():
            logits = self.logits(batch)
            loss = unreduced(self.criterion(logits, batch.y), len(batch))
        return Outputs(loss=loss.to(self.runtime.dtype), logits=logits)

    def logits(self, batch: Batch) -> PyTree:
        """Return logits of one chunk, as :meth:`outputs`, for which no target is needed."""
        with self.runtime.strategy.autocast():
            return self.module(batch.x)

    @contextmanager
    def inference(self) -> Iterator[None]:
        """Eval mode, no gradient. All ranks call the model equally often inside. Local."""
        with evaluating(self.module), self.partition.inference():
            yield

    @contextmanager
    def inferring(self, source: Source, ids: Ids, calls: int) -> Iterator[None]:
        """As :meth:`inference`, but inside, this rank calls the model exactly ``calls`` times.

        Where weights are gathered for every forward, ranks with fewer calls then join those of the
        others, with one sample of ``ids``. Collective.
        """
        missing = 0
        if self.partition.sharded:  # known before the first forward: forwards are collectives too
            most = torch.tensor(calls, device=self.runtime.device)
            missing = int(self.runtime.all_reduce(most, "max")) - calls
        with self.inference():
            yield
            for _ in range(missing):
                for batch in self.chunks(source, ids[:1], 1):
                    self.logits(batch)

    def chunks(self, source: Source, ids: Ids, size: int) -> Iterator[Batch]:
        """Yield ``ids`` in chunks of ``size``, on the device. Local."""
        for batch in iterate_chunks(source, ids, size):
            self.runtime.watchdog.beat()
            yield batch.to(self.runtime.device, self.runtime.dtype)

    def per_sample(
        self,
        source: Source,
        ids: Ids,
        size: int,
        measure: Callable[[Outputs, PyTree], torch.Tensor],
    ) -> torch.Tensor:
        """Return ``measure(outputs, y)``, [B, ...] a chunk, for all ids, in their order: [N, ...].

        As :meth:`per_batch`, and counts as a forward pass. Collective.
        """
        self.forwards += len(ids)
        return self.per_batch(
            source, ids, size, lambda batch: measure(self.outputs(batch), batch.y)
        )

    def per_batch(
        self,
        source: Source,
        ids: Ids,
        size: int,
        measure: Callable[[Batch], T],
        sync: bool = True,
    ) -> T:
        """Return ``measure(batch)``, [B, ...] a chunk, for all ids, in their order: [N, ...].

        It may also be a pytree of such tensors. Buffers are averaged over ranks first (``sync``);
        ``measure`` is called in eval and inference mode, on chunks that lie on the device.
        Collective.
        """
        if len(ids) == 0:
            empty = torch.empty(0, dtype=self.runtime.dtype, device=self.runtime.device)
            return cast(T, empty)
        if sync:
            self.partition.sync_buffers()
        parts: list[T] = []
        mine = self.mine(ids, size)
        with self.inferring(source, ids, max(1, -(-len(mine) // size))):
            for batch in self.chunks(source, mine, size):
                parts.append(measure(batch))
            if not parts:  # more ranks than chunks: learn the shape from one sample
                for batch in self.chunks(source, ids[:1], 1):
                    parts.append(tree_map(lambda t: t[:0], measure(batch)))
        found: T = tree_map(lambda *some: self.gather(torch.cat(some), len(ids), size), *parts)
        return found
