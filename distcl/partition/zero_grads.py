"""Where DeepSpeed's ZeRO-1 and ZeRO-2 optimizers keep weights and gradients."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from distcl.partition.flat_state import Place


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
