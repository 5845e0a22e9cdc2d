"""The loss cache: exact losses by id, so that a sample scored last round costs one forward now.

The L(w_now) pass of round k is the L(theta_star) pass of round k+1, since theta_star is refreshed
to exactly those weights. A checksum of the weights is kept with the losses; the cache is used only
if theta_star still has it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from distcl.data.ids import BLOCK, IdIndex
from distcl.distributed.runtime import Runtime
from distcl.parallel.partition import Partition
from distcl.types import Ids, as_tensor


def weights_checksum(
    slices: Mapping[str, torch.Tensor], partition: Partition, runtime: Runtime
) -> int:
    """Return a 64-bit checksum of weights, from all ranks' slices of them. Collective.

    A sum of the words of all tensors, each under a factor of its tensor's name and its place in it:
    so it is exact in every bit, and the same however the tensors are cut into slices.
    """
    ranges = partition.ranges()
    total = torch.zeros((), dtype=torch.int64, device=runtime.device)
    for name, value in slices.items():
        size = value.element_size()
        words = value.detach().contiguous().view(_WORDS[min(size, 8)])
        start = ranges[name][0] * (len(words) // max(1, len(value)))
        key = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), signed=True)
        total += (_checksum(words, start) * (key | 1)).to(runtime.device)
    return int(runtime.all_reduce(total))


_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_PERIOD = 1021  # a prime: rows of equal length do not repeat it


@lru_cache(maxsize=8)
def _factors(device: torch.device) -> torch.Tensor:
    """Return the factors of the places in a period, odd, int64 [P]."""
    raw = np.random.PCG64(0).random_raw(_PERIOD) | np.uint64(1)
    return torch.from_numpy(raw.view(np.int64)).to(device)


def _checksum(words: torch.Tensor, start: int) -> torch.Tensor:
    """Return the sum of words [n] that begin at place ``start``, under the places' factors."""
    factors = _factors(words.device).roll(-start % _PERIOD)
    even = len(words) // _PERIOD * _PERIOD
    columns = words[:even].view(-1, _PERIOD).sum(dim=0, dtype=torch.int64)
    columns[: len(words) - even] += words[even:]
    return (columns * factors).sum()


class LossCache:
    """Losses [N] by id under two sets of weights: theta_star's and those being scored now.

    The same on every rank, or those of each rank's own samples. A third set of weights drops the
    oldest.
    """

    def __init__(self) -> None:
        self._tables: dict[int, tuple[Ids, torch.Tensor]] = {}

    def __len__(self) -> int:
        return sum(len(ids) for ids, _ in self._tables.values())

    def clear(self) -> None:
        """Forget everything."""
        self._tables.clear()

    def put(self, weights: int, ids: Ids, losses: torch.Tensor) -> None:
        """Add losses [N] of ``ids`` under the weights with that fingerprint.

        ``ids`` are not copied, and must stay as they are. Losses that are there already stay.
        """
        if weights in self._tables:
            fresh = np.flatnonzero(~self.get(weights, ids)[0].numpy())
            old_ids, old_losses = self._tables.pop(weights)
            ids = np.concatenate([old_ids, ids[fresh]])
            losses = losses[torch.from_numpy(fresh).to(losses.device)]
            losses = torch.cat([old_losses.to(losses), losses])
        self._tables[weights] = ids, losses
        while len(self._tables) > 2:
            del self._tables[next(iter(self._tables))]

    def get(self, weights: int, ids: Ids) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (known bool [N], losses [N], 0 where unknown) under those weights."""
        held, losses = self._tables.get(weights, (np.empty(0, dtype=np.int64), torch.empty(0)))
        if len(held) == 0:
            return torch.zeros(len(ids), dtype=torch.bool), losses.new_zeros(len(ids))
        if np.array_equal(held, ids):  # the usual case, at no memory
            return torch.ones(len(ids), dtype=torch.bool), losses.clone()
        index, known = IdIndex(held), np.empty(len(ids), dtype=np.bool_)
        found = losses.new_zeros(len(ids))
        for start in range(0, len(ids), BLOCK):
            rows, there = index.locate(ids[start : start + BLOCK])
            known[start : start + BLOCK] = there
            at = torch.from_numpy(start + np.flatnonzero(there)).to(losses.device)
            found[at] = losses[torch.from_numpy(rows[there]).to(losses.device)]
        return torch.from_numpy(known), found

    def state_dict(self) -> dict[str, Any]:
        """Return fingerprints, ids and losses, oldest first."""
        return {
            "tables": [
                {"weights": weights, "ids": as_tensor(ids), "losses": losses}
                for weights, (ids, losses) in self._tables.items()
            ]
        }

    def load_parts(
        self, states: Sequence[dict[str, Any]], own: Callable[[Ids], npt.NDArray[np.bool_]]
    ) -> None:
        """Restore what several caches held under the same weights, of ids [N] that ``own`` says."""
        self._tables = {}
        for parts in zip(*(state["tables"] for state in states), strict=True):
            ids = np.concatenate([part["ids"].numpy() for part in parts])
            losses = torch.cat([part["losses"] for part in parts])
            mine = own(ids)
            order = np.flatnonzero(mine)[np.argsort(ids[mine], kind="stable")]
            self._tables[parts[0]["weights"]] = ids[order], losses[torch.from_numpy(order)]

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        self._tables = {t["weights"]: (t["ids"].numpy(), t["losses"]) for t in state["tables"]}
