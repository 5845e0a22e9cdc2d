"""State of an optimizer that steps flat tensors, each of many parameters' slices, by parameter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from distcl.partition.base import Fetch, OptimizerState

Place = tuple[int, int, int]
"""(group, start, stop): elements of the flat tensor of a group, of this rank."""


def read_flat_state(
    optimizer: torch.optim.Optimizer,
    flats: Sequence[torch.Tensor],
    places: Mapping[str, Place],
) -> OptimizerState:
    """Return the state of ``flats`` cut up by parameter; see ``Partition``. Local."""
    found = OptimizerState({}, {})
    for name, (group, start, stop) in places.items():
        flat = flats[group]
        if flat not in optimizer.state:
            continue
        plain = found.plain.setdefault(name, {})
        for key, value in optimizer.state[flat].items():
            if value is None:
                continue
            value = torch.as_tensor(value)
            if value.shape != flat.shape or value.dim() == 0:
                plain[key] = value
            else:
                found.slices.setdefault(key, {})[name] = value[start:stop]
    return found


def write_flat_state(
    optimizer: torch.optim.Optimizer,
    flats: Sequence[torch.Tensor],
    places: Mapping[str, Place],
    ranges: Mapping[str, tuple[int, int]],
    fetch: Mapping[str, Fetch],
    plain: Mapping[str, Mapping[str, torch.Tensor]],
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
