"""Loss weights that undo the skew of the draws (``priority.correction``)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch.utils._pytree import tree_leaves

from distcl.priority.weighting import Weights, WeightVector
from distcl.sampling.groups import Part
from distcl.types import Batch, Ids


class Correction:
    """Corrects as prioritized replay does (Schaul et al. 2016).

    c_i = (N p_i)^-β / Σ_j p_j (N p_j)^-β  for a sample drawn from a group of N with probability
    p_i; 1 for a sample drawn uniformly. Their mean over draws is 1, so the step keeps its length:
    Schaul et al. divide by max_j c_j instead, which scales the learning rate. β = 1 makes the mean
    of corrected losses an unbiased estimate of the uniform mean.
    """

    def __init__(self, beta: float, dtype: torch.dtype) -> None:
        self._beta = beta
        self._dtype = dtype
        self._groups: Sequence[Part] | None = None  # those that what follows was made of
        self._ids: Ids = np.empty(0, dtype=np.int64)  # sorted
        self._values: Weights = np.empty(0)

    def applied(self, batch: Batch, groups: Sequence[Part]) -> Batch:
        """Return the batch with the loss weights of its samples, drawn from ``groups``.

        Collective at the first batch from new groups, if their weights lie in slices.
        """
        if not self._beta:
            return batch
        device = tree_leaves(batch.y)[0].device
        return replace(batch, weights=self._of(batch.ids, groups).to(device, self._dtype))

    def _of(self, ids: torch.Tensor, groups: Sequence[Part]) -> torch.Tensor:
        if groups is not self._groups:
            self._groups = groups
            weighted = [group for group in groups if group.values is not None]
            held = np.concatenate([np.empty(0, np.int64), *(group.ids for group in weighted)])
            values = [np.empty(0), *(self._loss_weights(group) for group in weighted)]
            order = np.argsort(held, kind="stable")
            self._ids, self._values = held[order], np.concatenate(values)[order]
        found = np.ones(len(ids))
        if len(self._ids):
            at = np.searchsorted(self._ids, ids.numpy()).clip(max=len(self._ids) - 1)
            found = np.where(self._ids[at] == ids.numpy(), self._values[at], found)
        return torch.from_numpy(found)

    def _loss_weights(self, weights: WeightVector) -> Weights:
        share = weights.held / weights.sum()
        with np.errstate(divide="ignore"):
            raw = np.where(share > 0, (weights.number * share) ** -self._beta, 0.0)
        loss_weights: Weights = raw / weights.sum(share * raw)
        return loss_weights
