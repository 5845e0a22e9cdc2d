"""State of an optimizer that steps flat tensors, each of many parameters' slices, by parameter."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from distcl.parallel.partition import Fetch, OptimizerState, PlainState, read_state

Place = tuple[int, int, int]
"""(group, start, stop): elements of the flat tensor of a group, of this rank."""


def read_flat_state(
    optimizer: torch.optim.Optimizer,
    flats: Sequence[torch.Tensor],
    places: Mapping[str, Place],
) -> OptimizerState:
    """Return the state of ``flats`` cut up by parameter; see ``Partition``. Local."""

    def own(name: str, value: torch.Tensor) -> torch.Tensor:
        _, start, stop = places[name]
        return value[start:stop]

    held = {name: flats[group] for name, (group, _, _) in places.items()}
    return read_state(optimizer, held, own, places)


def write_flat_state(
    optimizer: torch.optim.Optimizer,
    flats: Sequence[torch.Tensor],
    places: Mapping[str, Place],
    ranges: Mapping[str, tuple[int, int]],
    fetch: Mapping[str, Fetch],
    plain: PlainState,
) -> None:
    """Restore the state of ``flats``; ``ranges`` says where a parameter's slice lies. Local."""
    for group, flat in enumerate(flats):
        inside = {n: place for n, place in places.items() if place[0] == group and n in plain}
        if not inside:
            continue
        state = {key: value.clone() for key, value in plain[next(iter(inside))].items()}
        for key, read in fetch.items():
            state[key] = torch.zeros_like(flat, requires_grad=False)
            for name, (_, start, stop) in inside.items():
                state[key][start:stop] = read(name, *ranges[name]).to(state[key])
        optimizer.state[flat] = state


# Where DeepSpeed's ZeRO-1 and ZeRO-2 optimizers keep weights and gradients.


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
