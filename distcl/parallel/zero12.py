"""ZeRO-1 and ZeRO-2: whole weights on every rank; DeepSpeed cuts gradients and optimizer state.

DeepSpeed lays the trainable parameters of a group end to end in one flat buffer and gives each rank
an equal range of it, in float32, to its optimizer. Those ranges are the owned slices here: a
regularizer's gradient is added where it is needed, without communication. Buffers are cut as under
DDP.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from operator import itemgetter
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from distcl.distributed.runtime import Runtime
from distcl.parallel.flat_shards import Cut, Whole
from distcl.parallel.partition import Partition
from distcl.parallel.sliced_state import Fetch, Stepped

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

Place = tuple[int, int, int]
"""(group, start, stop): elements of the flat tensor of a group, of this rank."""


class Zero12(Partition):
    """The partition of a DeepSpeed engine of stage 1 or 2."""

    def __init__(self, runtime: Runtime, engine: DeepSpeedEngine) -> None:
        super().__init__(runtime, engine.module)
        self._zero: Any = engine.optimizer
        names = {id(p): name for name, p in self._parameters.items()}
        self._place: dict[str, Place] = {}
        cuts: list[Cut] = []
        for i, (parameters, buffer) in enumerate(groups(self._zero)):
            starts = {
                names[id(p)]: int(p.storage_offset() - buffer.storage_offset()) for p in parameters
            }
            sizes = {names[id(p)]: p.numel() for p in parameters}
            each = buffer.numel() // runtime.world_size
            cut = Cut(runtime, buffer.dtype, sizes, starts, each)
            for name, (a, b) in cut.mine.items():
                at = starts[name] + a - runtime.rank * each
                self._place[name] = (i, at, at + b - a)
            cuts.append(cut)
        self._whole = Whole(self._trained, cuts)
        self._spans = self._whole.ranges()

    def _slices(self) -> dict[str, torch.Tensor]:
        """My slices, of the float32 master weights where there are any."""
        flats = masters(self._zero)
        mine = {n: flats[i][a:b] for n, (i, a, b) in self._place.items()}
        return {name: mine[name] for name in self._trained if name in mine}

    def _exchange(self, slices: dict[str, torch.Tensor], back: bool) -> None:
        """Spread ``slices`` over the weights; back, spread the master weights.

        The masters are the truth: after every step the weights are made from them.
        """
        self._whole.put(self.trainable() if back else slices)

    def load(self, fetch: Fetch) -> None:
        """Replace weights, masters and buffers. Local."""
        for whole in (self._whole, Whole(self._frozen, []), self._rest):
            whole.load(fetch)
        flats = masters(self._zero)
        for name, (group, a, b) in self._place.items():
            flats[group][a:b] = fetch(name, *self._spans[name]).to(flats[group])

    def _stepped(self) -> dict[str, Stepped]:
        flats = master_parameters(self._zero)
        return {
            name: Stepped(flats[i], itemgetter(slice(a, b)), self._spans[name][0])
            for name, (i, a, b) in self._place.items()
        }

    def grads(self) -> dict[str, torch.Tensor]:
        """My slices of the gradients as the optimizer will get them."""
        return {
            name: gradient(self._zero, self._parameters[name], place)
            for name, place in self._place.items()
        }

    def reduce_owned(self, full: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Sum over ranks, bucket by bucket; keep my slices. Collective."""
        return {**self._whole.reduce(full), **self._rest.reduce(full)}

    def gather(self, name: str) -> torch.Tensor:
        """Return the weights, whole here; from the masters where there are any. Collective."""
        tensor = (self._buffers if name in self._buffers else self._parameters)[name].detach()
        if name not in self._trained or tensor.dtype == torch.float32:
            return tensor.clone()
        whole = torch.zeros(tensor.numel(), dtype=torch.float32, device=tensor.device)
        if name in self._place:
            group, a, b = self._place[name]
            master = masters(self._zero)[group][a:b]
            whole[slice(*self._spans[name])] = master.to(tensor.device)
        return self._runtime.all_reduce(whole).view(tensor.shape)


# Where DeepSpeed's optimizers keep weights and gradients.


def groups(zero: Any) -> Iterator[tuple[list[nn.Parameter], torch.Tensor]]:
    """Yield each group's parameters and the flat buffer whose views they are. Local."""
    if hasattr(zero, "bit16_groups"):
        yield from zip(zero.bit16_groups, zero.bit16_groups_flat, strict=True)
    else:  # ZeRO-1 in bf16
        yield from zip(zero.bf16_groups, zero.bf16_groups_flat, strict=True)


def master_parameters(zero: Any) -> list[torch.Tensor]:
    """Return what the optimizer inside steps: each group's range of this rank, float32. Local."""
    if hasattr(zero, "single_partition_of_fp32_groups"):
        return list(zero.single_partition_of_fp32_groups)
    return list(zero.fp32_groups_flat_partition)


def masters(zero: Any) -> list[torch.Tensor]:
    """Return :func:`master_parameters` as plain tensors, 1-D, live. Local."""
    return [flat.detach() for flat in master_parameters(zero)]


def gradient(zero: Any, parameter: nn.Parameter, place: Place) -> torch.Tensor:
    """Return this rank's slice of a parameter's averaged gradient, 1-D, live. Local."""
    group, start, stop = place
    if hasattr(zero, "fp32_groups_gradient_flat_partition"):  # ZeRO-1 in bf16
        partition: torch.Tensor = zero.fp32_groups_gradient_flat_partition[group]
        return partition[start:stop]
    if zero.cpu_offload:
        partition = zero.single_partition_of_fp32_groups[group].grad
        return partition[start:stop]
    fragment: torch.Tensor = parameter._hp_mapping.get_lp_grad_fragment(  # type: ignore[attr-defined]
        parameter._index_in_param_group  # type: ignore[attr-defined]
    )
    return fragment.view(-1)
