"""Whole tensors cut into owned ranges, and the way from owned ranges back to whole tensors.

The tensors of a :class:`Cut` lie in one flat index space; rank r owns [r·c, (r+1)·c) of it.
Whatever must reach all ranks moves through buckets: bucket j holds elements [j, j+b) of every
rank's range, so no more than W·b elements are in flight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import nn

from distcl.distributed.runtime import Runtime
from distcl.errors import UsageError

BUCKET_ELEMENTS = 1 << 20

Take = Callable[[str, int, int], torch.Tensor | None]
"""(name, a, b) -> elements [a, b) of my slice of a tensor; None: zeros."""
Write = Callable[[str, int, int, torch.Tensor], None]
"""(name, a, b, values): receives elements [a, b) of a whole tensor."""


def flattened(name: str, tensor: torch.Tensor) -> torch.Tensor:
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


class Cut:
    """Tensors of one dtype in a flat index space that is cut into W equal ranges.

    ``mine``: name -> (a, b): this rank owns elements [a, b) of that tensor.
    """

    def __init__(
        self,
        runtime: Runtime,
        dtype: torch.dtype,
        sizes: Mapping[str, int],
        starts: Mapping[str, int] | None = None,
        each: int = 0,
    ) -> None:
        """Lay tensors of the given ``sizes`` end to end, or at ``starts``; ``each``: the range."""
        self._runtime = runtime
        self.dtype = dtype
        self._places: dict[str, tuple[int, int]] = {}  # [start, stop) in the flat index space
        at = 0
        for name, size in sizes.items():
            at = at if starts is None else starts[name]
            self._places[name] = at, at + size
            at += size
        self._total = max((stop for _, stop in self._places.values()), default=0)
        self._each = each or -(-self._total // runtime.world_size)
        self.names = list(sizes)
        self.mine = {n: (a, b) for n, a, b, _ in self._overlaps(runtime.rank, 0, self._each)}

    def _overlaps(self, rank: int, at: int, size: int) -> Iterator[tuple[str, int, int, int]]:
        """Yield (name, a, b, offset): [at, at+size) of a rank's range has name[a:b] at offset."""
        lo = rank * self._each + at
        hi = min(lo + size, self._total)
        for name, (start, stop) in self._places.items():
            a, b = max(lo, start), min(hi, stop)
            if a < b:
                yield name, a - start, b - start, a - lo

    def spread(self, take: Take, write: Write) -> None:
        """Send every rank's range to all ranks, bucket by bucket. Collective."""
        runtime, world = self._runtime, self._runtime.world_size
        most = min(BUCKET_ELEMENTS, self._each)
        mine = torch.empty(most, dtype=self.dtype, device=runtime.device)
        gathered = mine if world == 1 else mine.new_empty(world * most)
        for at in range(0, self._each, BUCKET_ELEMENTS):
            size = min(BUCKET_ELEMENTS, self._each - at)
            bucket, everyone = mine[:size].zero_(), gathered[: world * size]
            for name, a, b, offset in self._overlaps(runtime.rank, at, size):
                start = self.mine[name][0]
                values = take(name, a - start, b - start)
                if values is not None:
                    bucket[offset : offset + b - a] = values
            if world > 1:  # as bytes: backends gather few dtypes
                dist.all_gather_single(everyone.view(torch.uint8), bucket.view(torch.uint8))
            for rank in range(world):
                part = everyone[rank * size : (rank + 1) * size]
                for name, a, b, offset in self._overlaps(rank, at, size):
                    write(name, a, b, part[offset : offset + b - a])

    def reduce(self, name: str, full: torch.Tensor) -> torch.Tensor | None:
        """Sum a whole tensor over ranks, bucket by bucket; return my slice of it. Collective."""
        values = flattened(name, full)
        a, b = self.mine.get(name, (0, 0))
        mine = torch.empty_like(values[a:b])
        for lo in range(0, values.numel(), BUCKET_ELEMENTS):
            hi = min(lo + BUCKET_ELEMENTS, values.numel())
            bucket = self._runtime.all_reduce(values[lo:hi].clone())
            x, y = max(lo, a), min(hi, b)
            if x < y:
                mine[x - a : y - a] = bucket[x - lo : y - lo]
        return mine if a < b else None


def cut_by_dtype(runtime: Runtime, tensors: Mapping[str, torch.Tensor]) -> list[Cut]:
    """Return the cuts of whole tensors, one a dtype; UsageError naming one that cannot be cut."""
    sizes: dict[torch.dtype, dict[str, int]] = {}
    for name, tensor in tensors.items():
        flattened(name, tensor)
        sizes.setdefault(tensor.dtype, {})[name] = tensor.numel()
    return [Cut(runtime, dtype, members) for dtype, members in sizes.items()]


class Whole:
    """Tensors that lie whole on every rank: what of them this rank owns, and exchanging it."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], cuts: list[Cut]) -> None:
        self.tensors = tensors
        self.cuts = cuts

    def owned(self) -> dict[str, torch.Tensor]:
        """Return my slices, live views, in the order of the tensors. Local."""
        mine = self.ranges()
        return {
            name: flattened(name, tensor)[slice(*mine[name])]
            for name, tensor in self.tensors.items()
            if name in mine
        }

    def ranges(self) -> dict[str, tuple[int, int]]:
        """Return where in each tensor my slice lies. Local."""
        return {name: ab for cut in self.cuts for name, ab in cut.mine.items()}

    def load(self, fetch: Callable[[str, int, int], torch.Tensor]) -> None:
        """Fill the tensors from saved ones; see ``Partition.load``. Local."""
        with torch.no_grad():
            for name, tensor in self.tensors.items():
                tensor.copy_(fetch(name, 0, tensor.numel()).view(tensor.shape))

    def exchange(self, slices: dict[str, torch.Tensor]) -> None:
        """Exchange the tensors with ``slices``, which then hold what was there. Collective."""

        def take(name: str, a: int, b: int) -> torch.Tensor:
            live, other = mine[name][a:b], slices[name][a:b]
            given = other.to(live.device, copy=True)
            other.copy_(live)
            return given

        mine = self.owned()
        self._spread(take)

    def put(self, slices: Mapping[str, torch.Tensor]) -> None:
        """Fill the tensors from the slices of all ranks. Collective."""

        def take(name: str, a: int, b: int) -> torch.Tensor:
            return slices[name][a:b].to(self.tensors[name].device)

        self._spread(take)

    def _spread(self, take: Take) -> None:
        with torch.no_grad():
            for cut in self.cuts:
                cut.spread(take, self._write)

    def _write(self, name: str, a: int, b: int, values: torch.Tensor) -> None:
        flattened(name, self.tensors[name])[a:b] = values

    def copies(self) -> dict[str, torch.Tensor]:
        """Return whole copies of the tensors. Local."""
        return {name: tensor.detach().clone() for name, tensor in self.tensors.items()}

    def put_back(self, copies: Mapping[str, torch.Tensor]) -> None:
        """Fill the tensors from :meth:`copies`. Local."""
        with torch.no_grad():
            for name, tensor in self.tensors.items():
                tensor.copy_(copies[name])

    def reduce(self, full: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Sum whole tensors over ranks, bucket by bucket; return my slices. Collective."""
        mine: dict[str, torch.Tensor] = {}
        for cut in self.cuts:
            for name in cut.names:
                part = cut.reduce(name, full[name]) if name in full else None
                if part is not None:
                    mine[name] = part
        return mine


def persistent_buffers(module: nn.Module) -> dict[str, torch.Tensor]:
    """Return the buffers that belong to a model's state, each under its first name. Local."""
    found: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for prefix, part in module.named_modules():
        for name, buffer in part.named_buffers(prefix, recurse=False):
            lasts = name.rpartition(".")[2] not in part._non_persistent_buffers_set
            if lasts and id(buffer) not in seen:
                found[name] = buffer
                seen.add(id(buffer))
    return found


def average_buffers(runtime: Runtime, buffers: Mapping[str, torch.Tensor]) -> None:
    """Average floating-point buffers; others (counters) take the largest. Collective."""
    for buffer in buffers.values():
        if buffer.is_floating_point():
            runtime.all_reduce(buffer.data).div_(runtime.world_size)
        elif buffer.dtype != torch.bool:
            runtime.all_reduce(buffer.data, "max")


def deliver(
    runtime: Runtime,
    sizes: Mapping[str, int],
    grads: Mapping[str, torch.Tensor],
    owners: Mapping[str, int],
    add: Callable[[str, torch.Tensor], None],
) -> None:
    """Broadcast whole tensors from their owners, a bucket at a time; see ``add_full_grads_``.

    ``add(name, values)`` receives each on every rank, 1-D, in the model's dtype. Collective.
    """
    buckets: dict[int, list[list[str]]] = {}
    for name, owner in owners.items():
        given = buckets.setdefault(owner, [[]])
        filled = sum(sizes[n] for n in given[-1])
        if given[-1] and filled + sizes[name] > BUCKET_ELEMENTS:
            given.append([])
        given[-1].append(name)
    for owner, given in buckets.items():
        for names in given:
            lengths = [sizes[n] for n in names]
            if owner == runtime.rank:
                bucket = torch.cat([grads[n].reshape(-1).to(runtime.dtype) for n in names])
            else:
                bucket = torch.empty(sum(lengths), dtype=runtime.dtype, device=runtime.device)
            if runtime.world_size > 1:
                dist.broadcast(bucket, owner)
            for name, values in zip(names, torch.split(bucket, lengths), strict=True):
                add(name, values)


@contextmanager
def restoring(runtime: Runtime, restore: Callable[[], None]) -> Iterator[None]:
    """Run ``restore`` (collective) after the body, also if it raises on all ranks.

    If it raises on some ranks only, the others are elsewhere, maybe in a forward that gathers: then
    nothing can be restored together, and the exception goes on to end the run.
    """
    try:
        yield
    except BaseException as error:
        if runtime.all_raised():
            restore()
        else:
            error.add_note("weights were not put back: other ranks did not raise")
        raise
    restore()
