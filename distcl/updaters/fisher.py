"""The diagonal of the empirical Fisher information, shared among ranks."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional
from torch.utils._pytree import tree_map

from distcl.data.loader import iterate_chunks
from distcl.distributed.runtime import Runtime
from distcl.errors import named
from distcl.parallel.inference import evaluating
from distcl.parallel.partition import EqualShards, Partition
from distcl.types import Batch, Ids, PyTree, Source, UnreducedLoss

log = logging.getLogger("distcl")

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

    Whole weights: from what the layers see of a chunk (``updaters/fisher.py``), or, where that is
    not possible, from its per-sample gradients; sums are reduced bucket by bucket. Sharded weights:
    one sample a rank at a time, whose gradient is squared before it is averaged over ranks;
    ``optimizer`` forgets the gradients afterwards.
    """
    partition.sync_buffers()
    if isinstance(partition, EqualShards):
        return _one_by_one(runtime, model, optimizer, partition, criterion, source, ids)
    module = runtime.strategy.unwrap(model)
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
        self.single = False
        """Whether the model has shown not to work under vmap."""

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
        if self.single:
            return self.one_by_one(batch)
        try:
            return self.vectorized(batch)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # vmap has no error of its own, and shows models other tensors
            found = self.one_by_one(batch)
            self.single = True
            log.warning(
                f"[fisher] gradients of single samples are made one at a time, which is slower: "
                f"the model does not work under torch.func.vmap ({named(error)})"
            )
            return found

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

    def one_by_one(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Return the same by a forward and backward of each sample."""
        weights = {n: p for n, p in self.module.named_parameters() if p.requires_grad}
        total = {name: torch.zeros_like(w, dtype=self.dtype) for name, w in weights.items()}
        for k in range(len(batch)):
            one = batch.part(k, len(batch))
            loss = self.criterion(self.module(one.x), one.y).sum()
            grads = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
            for name, grad in zip(weights, grads, strict=True):
                if grad is not None:
                    total[name] += grad.to(self.dtype).square()
        return total


def _one_by_one(
    runtime: Runtime,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    partition: EqualShards,
    criterion: UnreducedLoss,
    source: Source,
    ids: Ids,
) -> dict[str, torch.Tensor]:
    """See :func:`diagonal_fisher`. Every rank runs equally many samples, some of weight zero."""
    start, stop = runtime.share(len(ids))
    mine = ids[start:stop]
    rounds = -(-len(ids) // runtime.world_size)
    with evaluating(runtime.strategy.unwrap(model)), partition.squares():
        for k in range(rounds):
            one, weight = (mine[k : k + 1], 1.0) if k < len(mine) else (ids[:1], 0.0)
            batch = source.read(one).to(runtime.device, runtime.dtype)
            with runtime.strategy.accumulating(model, last=k + 1 == rounds):
                runtime.strategy.backward(weight * criterion(model(batch.x), batch.y).sum())
    scale = runtime.world_size / len(ids)  # gradients are averaged over ranks
    total = {n: torch.zeros_like(w, dtype=runtime.dtype) for n, w in partition.trainable().items()}
    total |= {name: grad.to(runtime.dtype) * scale for name, grad in partition.grads().items()}
    optimizer.zero_grad(set_to_none=True)
    return total


# Sums of squared per-sample gradients of a perceptron, from one pass over a batch.
#
# A layer's part of the gradient of sample i is made of the layer's input a_i and the gradient g_i
# of its output, dL_i/dW = g_i a_iᵀ. The square of that, elementwise, is g_i² (a_i²)ᵀ: the sum over
# samples is one matrix product, and no sample's gradient is ever made (Goodfellow 2015; Dangel et
# al., "BackPACK", ICLR 2020). So for inputs that are vectors; convolutions, and layers with several
# positions a sample, would still have to make each gradient, and gain nothing by it on a CPU.
#
# It holds only if row i of all a and g is of sample i, and if weights are used by their layers
# alone. Neither can be read off a model, so both are checked on each batch: samples get different
# weights in the loss, which are taken out of each g_i again; then the sum over samples of what was
# found must be the gradient that autograd gives.


class Call(NamedTuple):
    """A layer's input and output in one use of it."""

    a: torch.Tensor
    output: torch.Tensor


class Moments(NamedTuple):
    """Of the gradients of a batch's samples: their sum, and that of their squares."""

    first: torch.Tensor
    second: torch.Tensor


def known_layers(model: nn.Module) -> dict[str, nn.Module] | None:
    """Return the layers whose own weights train, by name; None if one is of no known kind.

    Known: Linear, LayerNorm, and BatchNorm1d with running statistics, each with its own forward and
    with weights that no other layer has.
    """
    seen: set[int] = set()
    layers: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None:
            return None  # samples see each other
        own = {n: p for n, p in module.named_parameters(recurse=False) if p.requires_grad}
        if not own:
            continue
        kind = _kind(module)
        if kind is nn.Module or type(module).forward is not kind.forward:
            return None
        if own.keys() - {"weight", "bias"} or seen & {id(p) for p in own.values()}:
            return None
        seen |= {id(p) for p in own.values()}
        layers[name] = module
    return layers


def squared_gradients(
    model: nn.Module,
    layers: dict[str, nn.Module],
    criterion: UnreducedLoss,
    batch: Batch,
    dtype: torch.dtype,
) -> dict[str, torch.Tensor] | None:
    """Return sum_i (dL_i/dw)², elementwise, in ``dtype``, for each trainable parameter. Local.

    ``layers`` are those of :func:`known_layers`. None if it cannot be had from what they saw, see
    above. Takes the model in the mode it is in, and leaves ``.grad`` alone.
    """
    weights = {n: p for n, p in model.named_parameters() if p.requires_grad}
    with _watching(layers) as calls:
        losses = criterion(model(batch.x), batch.y)
    if not (calls and losses.requires_grad):
        return None
    for seen in calls.values():
        a, output = seen[0]
        if len(seen) > 1 or a.dim() != 2 or len(a) != len(batch) or not output.requires_grad:
            return None
    outputs = [seen[0].output for seen in calls.values()]
    scale = 1 + torch.arange(len(losses), dtype=losses.dtype, device=losses.device) / len(losses)
    scaled = torch.autograd.grad(losses, outputs, scale, retain_graph=True, allow_unused=True)
    expected = torch.autograd.grad(losses.sum(), list(weights.values()), allow_unused=True)
    found: dict[str, Moments] = {}
    for (name, seen), g in zip(calls.items(), scaled, strict=True):
        layer = layers[name]
        if g is not None:
            g = g.to(dtype) / scale[:, None]
            for n, moments in _MOMENTS[_kind(layer)](layer, seen[0].a.to(dtype), g).items():
                found[f"{name}.{n}" if name else n] = moments
    for (name, p), gradient in zip(weights.items(), expected, strict=True):
        if name not in found:
            found[name] = Moments(*torch.zeros(2, *p.shape, dtype=dtype, device=p.device))
        first, second = found[name]
        error = torch.linalg.vector_norm(first if gradient is None else first - gradient)
        size = (second.sum() * len(losses)).sqrt()  # no less than the sum of the samples' norms
        if not error <= math.sqrt(torch.finfo(p.dtype).eps) * size:
            return None
    return {name: found[name].second for name in weights}


@contextmanager
def _watching(layers: dict[str, nn.Module]) -> Iterator[dict[str, list[Call]]]:
    """Give what the layers are called with inside, of those that are called."""
    calls: dict[str, list[Call]] = {}

    def watch(name: str) -> Callable[..., torch.Tensor]:
        def see(module: nn.Module, args: Any, kwargs: Any, output: torch.Tensor) -> torch.Tensor:
            a = args[0] if args else kwargs["input"]
            calls.setdefault(name, []).append(Call(a.detach(), output))
            return output.clone()  # what is changed in place, by a ReLU say, is the copy

        return see

    handles = [m.register_forward_hook(watch(n), with_kwargs=True) for n, m in layers.items()]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _linear(m: nn.Linear, a: torch.Tensor, g: torch.Tensor) -> dict[str, Moments]:
    """Take a [B, n] and g [B, m]."""
    return {"weight": Moments(g.T @ a, g.square().T @ a.square()), "bias": _sums(g)}


def _norm(m: Any, a: torch.Tensor, g: torch.Tensor) -> dict[str, Moments]:
    """Take a and g [B, n]; what the weight multiplies is made again from a."""
    if isinstance(m, nn.LayerNorm):
        x = functional.layer_norm(a, m.normalized_shape, eps=m.eps)
    else:
        x = functional.batch_norm(a, m.running_mean, m.running_var, eps=m.eps)
    return {"weight": _sums(g * x), "bias": _sums(g)}


def _sums(gradients: torch.Tensor) -> Moments:
    return Moments(gradients.sum(dim=0), gradients.square().sum(dim=0))


_MOMENTS: dict[type[nn.Module], Callable[..., dict[str, Moments]]] = {
    nn.Linear: _linear,
    nn.LayerNorm: _norm,
    nn.BatchNorm1d: _norm,
}


def _kind(module: nn.Module) -> type[nn.Module]:
    """Return the known kind of a layer; nn.Module if there is none."""
    return next((kind for kind in _MOMENTS if isinstance(module, kind)), nn.Module)
