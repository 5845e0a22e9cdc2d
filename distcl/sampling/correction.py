"""Loss weights that undo the skew of the draws (``priority.correction``)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch.utils._pytree import tree_leaves

from distcl.data.ids import IdIndex
from distcl.priority.weighting import Sums, Weights
from distcl.sampling.groups import Part
from distcl.types import Batch


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
        self._groups: Sequence[Part] | None = None

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
            weighted = [(g.ids, g.weights, g.over) for g in groups if g.weights is not None]
            held = np.concatenate([i for i, *_ in weighted]) if weighted else ids.numpy()[:0]
            values = [self._loss_weights(w, over) for _, w, over in weighted]
            self._index = IdIndex(held)
            self._values = np.concatenate(values) if weighted else np.empty(0)
        found = np.ones(len(ids))
        at, there = self._index.locate(ids.numpy())
        found[there] = self._values[at[there]]
        return torch.from_numpy(found)

    def _loss_weights(self, weights: Weights, over: Sums) -> Weights:
        share = weights / over.total(weights)
        with np.errstate(divide="ignore"):
            raw = np.where(share > 0, (over.number(share) * share) ** -self._beta, 0.0)
        loss_weights: Weights = raw / over.total(share * raw)
        return loss_weights
