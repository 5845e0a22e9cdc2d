"""The diagonal of the empirical Fisher information, shared among ranks."""

from __future__ import annotations

from typing import cast

import torch
from torch import nn
from torch.utils._pytree import tree_map

from distcl.data.loader import iterate_chunks
from distcl.inference import evaluating
from distcl.partition.base import Partition, ShardedPartition
from distcl.runtime import Runtime
from distcl.types import Batch, Ids, PyTree, Source, UnreducedLoss
from distcl.updaters.squares import known_layers, squared_gradients

CHUNK = 256
"""Most samples of one forward."""
CHUNK_ELEMENTS = 1 << 24
"""Most elements of per-sample gradients held at a time."""


def diagonal_fisher(
    runtime: Runtime,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    partition: Partition,
    criterion: UnreducedLoss,
    source: Source,
    ids: Ids,
) -> dict[str, torch.Tensor]:
    """Return my slices of F = 1/N · sum_i (dL(x_i, y_i)/dw)², elementwise, over ``ids`` [N].

    Per-sample gradients of the labelled loss, squared (the *empirical* Fisher; Kirkpatrick et al.
    2017, eq. 3 with observed labels): never the square of a batch's mean gradient. Eval mode.
    Each rank takes its share of the samples. Collective.

    Whole weights: from what the layers see of a chunk (``updaters/squares.py``), or, where that is
    not possible, from its per-sample gradients; sums are reduced bucket by bucket. Sharded weights:
    one sample a rank at a time, whose gradient is squared before it is averaged over ranks;
    ``optimizer`` forgets the gradients afterwards.
    """
    partition.sync_buffers()
    if partition.sharded:
        shards = cast(ShardedPartition, partition)
        return _one_by_one(runtime, model, optimizer, shards, criterion, source, ids)
    module = runtime.unwrap(model)
    squares = Squares(module, criterion, runtime.dtype)
    weights = {n: p for n, p in module.named_parameters() if p.requires_grad}
    total = {name: torch.zeros_like(w, dtype=runtime.dtype) for name, w in weights.items()}
    start, stop = runtime.share(len(ids))
    with evaluating(module):
        for batch in iterate_chunks(source, ids[start:stop], squares.chunk):
            for name, value in squares.of(batch.to(runtime.device, runtime.dtype)).items():
                total[name] += value
    return {name: value / len(ids) for name, value in partition.reduce_owned(total).items()}


class Squares:
    """Sums over a batch of squared per-sample gradients: by layers, or sample by sample."""

    def __init__(self, module: nn.Module, criterion: UnreducedLoss, dtype: torch.dtype) -> None:
        self.module = module
        self.criterion = criterion
        self.dtype = dtype
        self.layers = known_layers(module)
        weights = sum(p.numel() for p in module.parameters() if p.requires_grad)
        self.size = min(CHUNK, max(1, CHUNK_ELEMENTS // max(1, weights)))
        """Samples whose gradients are held at a time, where they are made."""

    @property
    def chunk(self) -> int:
        """Return how many samples to read at a time."""
        return self.size if self.layers is None else CHUNK

    def of(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Return sum_i (dL_i/dw)² of each trainable parameter. Local."""
        if self.layers is not None:
            found = squared_gradients(self.module, self.layers, self.criterion, batch, self.dtype)
            if found is not None:
                return found
            self.layers = None
        return self.vectorized(batch)

    def vectorized(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Return the same from the gradients of single samples, made for a part at a time."""
        weights = {n: p.detach() for n, p in self.module.named_parameters() if p.requires_grad}
        buffers = dict(self.module.named_buffers())

        def loss_of_one(w: dict[str, torch.Tensor], x: PyTree, y: PyTree) -> torch.Tensor:
            one = tree_map(lambda t: t.unsqueeze(0), (x, y))
            outputs = torch.func.functional_call(self.module, (w, buffers), (one[0],))
            return self.criterion(outputs, one[1]).sum()

        per_sample = torch.func.vmap(torch.func.grad(loss_of_one), in_dims=(None, 0, 0))
        total = {name: torch.zeros_like(w, dtype=self.dtype) for name, w in weights.items()}
        for k in range(parts := -(-len(batch) // self.size)):
            part = batch.part(k, parts)
            for name, grad in per_sample(weights, part.x, part.y).items():
                # not in place: weights may share one gradient, and samples a gradient of zeros
                total[name] += grad.to(self.dtype).square().sum(dim=0)
        return total


def _one_by_one(
    runtime: Runtime,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    partition: ShardedPartition,
    criterion: UnreducedLoss,
    source: Source,
    ids: Ids,
) -> dict[str, torch.Tensor]:
    """See :func:`diagonal_fisher`. Every rank runs equally many samples, some of weight zero."""
    start, stop = runtime.share(len(ids))
    mine = ids[start:stop]
    rounds = -(-len(ids) // runtime.world_size)
    with evaluating(runtime.unwrap(model)), partition.squares():
        for k in range(rounds):
            one, weight = (mine[k : k + 1], 1.0) if k < len(mine) else (ids[:1], 0.0)
            batch = source.read(one).to(runtime.device, runtime.dtype)
            with runtime.accumulating(model, last=k + 1 == rounds):
                runtime.backward(weight * criterion(model(batch.x), batch.y).sum())
    scale = runtime.world_size / len(ids)  # gradients are averaged over ranks
    total = {name: grad.to(runtime.dtype) * scale for name, grad in partition.grads().items()}
    optimizer.zero_grad(set_to_none=True)
    return total
