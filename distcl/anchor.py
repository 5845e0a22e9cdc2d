"""theta_star: the weights at the start of the round before, held as owned slices, 1/W per rank."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import nn

from distcl.partition.base import Partition, create_partition
from distcl.runtime import Runtime


class Anchor:
    """theta_star over parameters and buffers. A new anchor equals the weights as they are.

    ``theta_star``: name -> 1-D tensor, the slices that this rank owns (``Partition.owned``).
    """

    def __init__(self, partition: Partition) -> None:
        self._partition = partition
        self.theta_star = {name: view.clone() for name, view in partition.owned().items()}

    @classmethod
    def of(cls, runtime: Runtime, model: nn.Module) -> Anchor:
        """Return the anchor of a model that ``runtime.prepare`` returned. Local."""
        return cls(create_partition(runtime, model))

    def refresh(self) -> None:
        """theta_star <- the current weights. Local.

        Call it after the round's priorities are computed and before its first step; see
        ``Updater.cl_preprocessing``.
        """
        with torch.no_grad():
            for name, view in self._partition.owned().items():
                self.theta_star[name].copy_(view)

    def swapped_in(self) -> AbstractContextManager[None]:
        """Return a context in which the model computes with theta_star, in place. Collective.

        The weights are put back exactly, also when the body raises. Enter
        ``torch.inference_mode`` inside it, not outside.
        """
        return self._partition.swapped(self.theta_star)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return this rank's slices (not copies)."""
        return dict(self.theta_star)

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Restore the slices of the same rank of the same number of ranks."""
        for name, value in self.theta_star.items():
            value.copy_(state[name])
