"""Replicated weights (plain process, DDP): every rank computes with all, owns 1/W of them.

The tensors of one dtype, end to end, form a flat index space; rank r owns [r·c, (r+1)·c) of it with
c = ceil(total / W). Whatever must reach all ranks moves through buckets: bucket j holds elements
[j, j+b) of every rank's range, so no more than W·b elements are in flight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from distcl.errors import UsageError
from distcl.partition.base import Fetch, OptimizerState
from distcl.runtime import Runtime

BUCKET_ELEMENTS = 1 << 20


def flat(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Return a live 1-D view of a dense tensor, in the order of its memory (any memory format)."""
    data = tensor.detach()
    if data.is_contiguous():
        return data.view(-1)
    expected = data.numel()
    for stride, size in sorted(zip(data.stride(), data.shape, strict=True), reverse=True):
        expected //= size
        if size > 1 and stride != expected:
            raise UsageError(
                f"model: '{name}' is an expanded or sliced view; it cannot be partitioned"
            )
    return data.as_strided((data.numel(),), (1,), data.storage_offset())


@dataclass(frozen=True, slots=True)
class _Piece:
    """One tensor's place [start, stop) in the flat index space of its group."""

    name: str
    start: int
    stop: int


class _Group:
    """All tensors of one dtype, laid end to end and cut into W equal ranges."""

    def __init__(self, sizes: Mapping[str, int], rank: int, world: int) -> None:
        self.pieces: list[_Piece] = []
        at = 0
        for name, size in sizes.items():
            self.pieces.append(_Piece(name, at, at + size))
            at += size
        self.total = at
        self.each = -(-at // world)
        lo, hi = min(rank * self.each, at), min((rank + 1) * self.each, at)
        self.mine = {n: (a, b) for n, a, b, _ in self.overlaps(lo, hi)}

    def overlaps(self, lo: int, hi: int) -> Iterator[tuple[str, int, int, int]]:
        """Yield (name, a, b, offset): flat [lo, hi) holds name[a:b] from ``offset`` on."""
        for piece in self.pieces:
            a, b = max(lo, piece.start), min(hi, piece.stop)
            if a < b:
                yield piece.name, a - piece.start, b - piece.start, a - lo


class Replicated:
    """The partition of a model whose weights are whole on every rank. See ``base.Partition``."""

    def __init__(self, runtime: Runtime, model: nn.Module) -> None:
        module = runtime.unwrap(model)
        self._runtime = runtime
        self._parameters = dict(module.named_parameters())
        self._buffers = dict(module.named_buffers())
        self._tensors = {**self._parameters, **self._buffers}
        by_dtype: dict[torch.dtype, dict[str, int]] = {}
        for name, tensor in self._tensors.items():
            flat(name, tensor)  # refuses what cannot be cut
            by_dtype.setdefault(tensor.dtype, {})[name] = tensor.numel()
        rank, world = runtime.rank, runtime.world_size
        self._groups = {d: _Group(sizes, rank, world) for d, sizes in by_dtype.items()}

    def owned(self) -> dict[str, torch.Tensor]:
        """My slices, live views."""
        mine = self.ranges()
        return {
            name: flat(name, self._tensors[name])[slice(*mine[name])]
            for name in self._tensors
            if name in mine
        }

    def ranges(self) -> dict[str, tuple[int, int]]:
        """Where in each tensor my slice lies."""
        return {n: ab for group in self._groups.values() for n, ab in group.mine.items()}

    def load(self, fetch: Fetch) -> None:
        """Replace every weight and buffer. Local."""
        with torch.no_grad():
            for name, tensor in self._tensors.items():
                flat(name, tensor).copy_(fetch(name, 0, tensor.numel()))

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> OptimizerState:
        """My slices of what has a parameter's shape, copies not taken. Local."""
        mine = self.ranges()
        found = OptimizerState({}, {})
        for name, parameter in self._parameters.items():
            if parameter not in optimizer.state:
                continue
            plain = found.plain.setdefault(name, {})
            for key, value in optimizer.state[parameter].items():
                if value is None:
                    continue
                value = torch.as_tensor(value)
                if value.shape != parameter.shape or value.dim() == 0:
                    plain[key] = value
                elif name in mine:
                    part = flat(name, value)[slice(*mine[name])]
                    found.slices.setdefault(key, {})[name] = part
        return found

    def load_optimizer_state(
        self,
        optimizer: torch.optim.Optimizer,
        fetch: Mapping[str, Fetch],
        plain: Mapping[str, Mapping[str, torch.Tensor]],
    ) -> None:
        """Restore whole states on every rank. Local."""
        for name, parameter in self._parameters.items():
            if name not in plain:
                continue
            state = {key: value.clone() for key, value in plain[name].items()}
            for key, read in fetch.items():
                whole = torch.empty_like(parameter)
                flat(name, whole).copy_(read(name, 0, parameter.numel()))
                state[key] = whole
            optimizer.state[parameter] = state

    def trainable(self) -> dict[str, torch.Tensor]:
        """My slices of the parameters that take gradients, live views."""
        grads = {n for n, p in self._parameters.items() if p.requires_grad}
        return {name: view for name, view in self.owned().items() if name in grads}

    def grads(self) -> dict[str, torch.Tensor]:
        """My slices of the gradients, live views."""
        mine = self.ranges()
        return {
            name: self._flat_grad(name, parameter)[slice(*mine[name])]
            for name, parameter in self._parameters.items()
            if name in mine and parameter.grad is not None
        }

    def add_grad_(self, slices: Mapping[str, torch.Tensor]) -> None:
        """Add my slices, gathered from all ranks, to the gradients. Collective."""
        grads: dict[str, torch.Tensor] = {}
        for name, parameter in self._parameters.items():
            if parameter.requires_grad:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                grads[name] = self._flat_grad(name, parameter)

        def add(name: str, a: int, b: int, values: torch.Tensor) -> None:
            if name in grads:
                grads[name][a:b] += values

        def take(name: str, a: int, b: int) -> torch.Tensor | None:
            return slices[name][a:b] if name in slices else None

        for dtype, group in self._groups.items():
            if dtype.is_floating_point:
                self._spread(dtype, group, take, add)

    def add_full_grads_(self, grads: Mapping[str, torch.Tensor], owners: Mapping[str, int]) -> None:
        """Broadcast each rank's tensors, a bucket at a time, and add them. Collective."""
        buckets: dict[tuple[int, torch.dtype], list[list[str]]] = {}
        for name, owner in owners.items():
            parameter = self._parameters[name]
            given = buckets.setdefault((owner, parameter.dtype), [[]])
            filled = sum(self._parameters[n].numel() for n in given[-1])
            if given[-1] and filled + parameter.numel() > BUCKET_ELEMENTS:
                given.append([])
            given[-1].append(name)
        for (owner, dtype), given in buckets.items():
            for names in given:
                sizes = [self._parameters[n].numel() for n in names]
                if owner == self._runtime.rank:
                    bucket = torch.cat([grads[n].reshape(-1).to(dtype) for n in names])
                else:
                    bucket = torch.empty(sum(sizes), dtype=dtype, device=self._runtime.device)
                if self._runtime.world_size > 1:
                    dist.broadcast(bucket, owner)
                for name, values in zip(names, torch.split(bucket, sizes), strict=True):
                    parameter = self._parameters[name]
                    if parameter.grad is None:
                        parameter.grad = torch.zeros_like(parameter)
                    parameter.grad += values.view(parameter.shape)

    def reduce_owned(self, full: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Sum over ranks, bucket by bucket; keep my slices. Collective."""
        mine: dict[str, torch.Tensor] = {}
        for group in self._groups.values():
            for name, (a, b) in group.mine.items():
                if name in full:
                    mine[name] = torch.empty_like(flat(name, full[name])[a:b])
        for name, tensor in full.items():
            values = flat(name, tensor)
            group = self._groups[self._tensors[name].dtype]
            a, b = group.mine.get(name, (0, 0))
            for lo in range(0, values.numel(), BUCKET_ELEMENTS):
                hi = min(lo + BUCKET_ELEMENTS, values.numel())
                bucket = self._runtime.all_reduce(values[lo:hi].clone())
                x, y = max(lo, a), min(hi, b)
                if x < y:
                    mine[name][x - a : y - a] = bucket[x - lo : y - lo]
        return mine

    @contextmanager
    def swapped(self, slices: dict[str, torch.Tensor]) -> Iterator[None]:
        """Exchange the weights with ``slices``, and back. Collective."""
        self._exchange(slices)
        try:
            yield
        finally:
            self._exchange(slices)

    def gather(self, name: str) -> torch.Tensor:
        """Weights are whole here: a copy. Local."""
        return self._tensors[name].detach().clone()

    def sync_buffers(self) -> None:
        """Average floating-point buffers; others (counters) take the largest. Collective."""
        for buffer in self._buffers.values():
            if buffer.is_floating_point():
                self._runtime.all_reduce(buffer.data).div_(self._runtime.world_size)
            elif buffer.dtype != torch.bool:
                self._runtime.all_reduce(buffer.data, "max")

    @staticmethod
    def _flat_grad(name: str, parameter: nn.Parameter) -> torch.Tensor:
        """Return the gradient as a live 1-D view in the order of the parameter's memory."""
        assert parameter.grad is not None
        if parameter.grad.stride() != parameter.stride():
            parameter.grad = torch.empty_like(parameter).copy_(parameter.grad)
        return flat(name, parameter.grad)

    # -- moving slices to all ranks ------------------------------------------------------------

    def _exchange(self, slices: dict[str, torch.Tensor]) -> None:
        with torch.no_grad():
            for dtype, group in self._groups.items():

                def take(name: str, a: int, b: int, group: _Group = group) -> torch.Tensor:
                    start = group.mine[name][0]
                    live = flat(name, self._tensors[name])[start + a : start + b]
                    other = slices[name][a:b]
                    given = other.to(live.device, copy=True)
                    other.copy_(live)
                    return given

                self._spread(dtype, group, take, self._write)

    def _write(self, name: str, a: int, b: int, values: torch.Tensor) -> None:
        flat(name, self._tensors[name])[a:b] = values

    def _spread(
        self,
        dtype: torch.dtype,
        group: _Group,
        take: Callable[[str, int, int], torch.Tensor | None],
        write: Callable[[str, int, int, torch.Tensor], None],
    ) -> None:
        """Send every rank's range to all ranks, bucket by bucket.

        ``take(name, a, b)`` gives elements [a, b) of my slice of a tensor (None: zeros);
        ``write(name, a, b, values)`` receives elements [a, b) of the whole tensor.
        """
        rank, world = self._runtime.rank, self._runtime.world_size
        for at in range(0, group.each, BUCKET_ELEMENTS):
            size = min(BUCKET_ELEMENTS, group.each - at)
            bucket = torch.zeros(size, dtype=dtype, device=self._runtime.device)
            lo = rank * group.each + at
            for name, a, b, offset in group.overlaps(lo, min(lo + size, group.total)):
                start = group.mine[name][0]
                values = take(name, a - start, b - start)
                if values is not None:
                    bucket[offset : offset + b - a] = values
            everyone = bucket
            if world > 1:  # as bytes: backends gather few dtypes
                everyone = bucket.new_empty(world * size)
                dist.all_gather_single(everyone.view(torch.uint8), bucket.view(torch.uint8))
            for r in range(world):
                lo = r * group.each + at
                part = everyone[r * size : (r + 1) * size]
                for name, a, b, offset in group.overlaps(lo, min(lo + size, group.total)):
                    write(name, a, b, part[offset : offset + b - a])
