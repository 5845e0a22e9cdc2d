"""Losses of a round, kept on the device and looked at only at poll points."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch

from distcl.errors import DivergenceError
from distcl.runtime import Runtime
from distcl.updaters.base import StepResult

_NAMED_IDS = 5


class LossWatch:
    """Collects step results; ``poll`` reduces them over ranks and stops a run that diverged.

    ``weights`` returns the slices of the weights that this rank owns.
    """

    def __init__(
        self,
        runtime: Runtime,
        round_index: int,
        weights: Callable[[], Mapping[str, torch.Tensor]],
        steps: int = 0,
    ) -> None:
        self._runtime = runtime
        self._round = round_index
        self._weights = weights
        self._window: list[StepResult] = []
        self._steps = steps  # of the round, before the window

    def add(self, result: StepResult) -> None:
        """Take one step's losses. No host synchronization."""
        self._window.append(result)

    def poll(self, flags: Sequence[float] = ()) -> tuple[list[float], list[float]]:
        """Return the global mean loss of every step since the last poll, and summed flags.

        ``flags``: numbers of this rank that are summed over ranks on the way. Collective.

        Raises DivergenceError, the same on every rank, naming round, step (from 1), rank and
        sample ids, if a loss is not finite, or if a step has left weights that are not: its
        gradient was not finite, or too large.
        """
        sums = [r.losses.sum(dtype=torch.float64) / r.total for r in self._window]
        bad = _count_bad(self._weights().values(), self._runtime.device)
        words = torch.tensor(flags, dtype=torch.float64, device=self._runtime.device)
        together = torch.cat([torch.stack([*sums, bad]), words])
        values: list[float] = self._runtime.all_reduce(together).tolist()
        means, words_sum = values[: len(sums)], values[len(sums) + 1 :]
        for k, mean in enumerate(means):
            if not math.isfinite(mean):
                self._diverged(k, mean)
        if values[len(sums)]:
            self._gradient_diverged()
        self._steps += len(self._window)
        self._window.clear()
        return means, words_sum

    def _diverged(self, k: int, mean: float) -> None:
        result = self._window[k]
        bad = ~torch.isfinite(result.losses)
        every = int(self._runtime.all_reduce(bad.sum())) == result.total
        rank, named = self._shared(result.ids[bad.cpu()], float(-self._runtime.rank))
        where = f"on rank {rank} (sample ids: {named})" if named else "over all ranks together"
        why = ""
        if k and every:
            why = f"; every sample's did: the step before, {self._largest(k - 1)}, was too large, "
            why += "or its gradient was not finite"
        raise DivergenceError(
            f"the loss became {mean} in round {self._round}, step {self._steps + k + 1}, "
            f"{where}{why}; try a smaller optimizer.lr"
        )

    def _gradient_diverged(self) -> None:
        k = len(self._window) - 1
        raise DivergenceError(
            f"the gradient was not finite, or too large, in round {self._round}, step "
            f"{self._steps + k + 1}, {self._largest(k)}: it left weights that are not finite; try "
            "a smaller optimizer.lr"
        )

    def _largest(self, k: int) -> str:
        """Return which samples had the largest losses of a step, in words. Collective."""
        result = self._window[k]
        order = torch.argsort(result.losses, descending=True)
        most = float(result.losses[order[0]]) if len(order) else 0.0
        rank, named = self._shared(result.ids[order.cpu()], most)
        return f"whose largest losses are on rank {rank} (sample ids: {named})"

    def _shared(self, ids: torch.Tensor, rating: float) -> tuple[int, str]:
        """Return the rank with ids of the highest rating, and the first of them. Collective."""
        mine = (rating, ids[:_NAMED_IDS].tolist())
        every = self._runtime.gather_objects(mine if len(ids) else (float("-inf"), []))
        rank = max(range(len(every)), key=lambda r: every[r][0])
        return rank, ", ".join(map(str, every[rank][1]))


def _count_bad(tensors: Iterable[torch.Tensor], device: torch.device) -> torch.Tensor:
    """Return how many of the tensors hold a NaN or an infinity. No host synchronization."""
    found = [~torch.isfinite(t).all() for t in tensors if t.is_floating_point()]
    count = torch.zeros((), dtype=torch.float64, device=device)
    return count + torch.stack([f.to(device) for f in found]).sum() if found else count
