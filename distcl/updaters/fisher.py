"""The diagonal of the empirical Fisher information, shared among ranks."""

from __future__ import annotations

import torch
from torch import nn

from distcl.data.loader import iterate_chunks
from distcl.inference import evaluating
from distcl.partition.base import Partition
from distcl.runtime import Runtime
from distcl.types import Ids, PyTree, Source, UnreducedLoss

CHUNK_ELEMENTS = 1 << 24
"""Most elements of per-sample gradients held at a time."""


def diagonal_fisher(
    runtime: Runtime,
    model: nn.Module,
    partition: Partition,
    criterion: UnreducedLoss,
    source: Source,
    ids: Ids,
) -> dict[str, torch.Tensor]:
    """Return my slices of F = 1/N · sum_i (dL(x_i, y_i)/dw)², elementwise, over ``ids`` [N].

    Per-sample gradients of the labelled loss, squared (the *empirical* Fisher; Kirkpatrick et al.
    2017, eq. 3 with observed labels): never the square of a batch's mean gradient. Eval mode.
    Each rank takes its share of the samples; sums are reduced bucket by bucket. Collective.
    """
    module = runtime.unwrap(model)
    weights = {n: p.detach() for n, p in module.named_parameters() if p.requires_grad}
    buffers = dict(module.named_buffers())

    def loss_of_one(w: dict[str, torch.Tensor], x: PyTree, y: PyTree) -> torch.Tensor:
        one = torch.utils._pytree.tree_map(lambda t: t.unsqueeze(0), (x, y))
        outputs = torch.func.functional_call(module, (w, buffers), (one[0],))
        return criterion(outputs, one[1]).sum()

    per_sample = torch.func.vmap(torch.func.grad(loss_of_one), in_dims=(None, 0, 0))
    total = {name: torch.zeros_like(w) for name, w in weights.items()}
    size = max(1, CHUNK_ELEMENTS // max(1, sum(w.numel() for w in weights.values())))
    start, stop = runtime.share(len(ids))
    partition.sync_buffers()
    with evaluating(module):
        for batch in iterate_chunks(source, ids[start:stop], min(size, 256)):
            batch = batch.to(runtime.device, runtime.dtype)
            for name, grad in per_sample(weights, batch.x, batch.y).items():
                total[name] += grad.square().sum(dim=0)
    return {name: value / len(ids) for name, value in partition.reduce_owned(total).items()}
