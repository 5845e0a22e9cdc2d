"""Losses of a round, kept on the device and looked at only at poll points."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from distcl.errors import DivergenceError
from distcl.runtime import Runtime
from distcl.updaters.base import StepResult

_NAMED_IDS = 5


class LossWatch:
    """Collects step results; ``poll`` reduces them over ranks and stops a run that diverged."""

    def __init__(self, runtime: Runtime, round_index: int, steps: int = 0) -> None:
        self._runtime = runtime
        self._round = round_index
        self._window: list[StepResult] = []
        self._steps = steps  # of the round, before the window

    def add(self, result: StepResult) -> None:
        """Take one step's losses. No host synchronization."""
        self._window.append(result)

    def poll(self, flags: Sequence[float] = ()) -> tuple[list[float], list[float]]:
        """Return the global mean loss of every step since the last poll, and summed flags.

        ``flags``: numbers of this rank that are summed over ranks on the way. Collective.

        Raises DivergenceError, the same on every rank, naming round, step (from 1), rank and
        sample ids, if a loss is not finite.
        """
        sums = [r.losses.sum(dtype=torch.float64) / r.total for r in self._window]
        words = torch.tensor(flags, dtype=torch.float64, device=self._runtime.device)
        together = torch.cat([torch.stack(sums) if sums else words[:0], words])
        values: list[float] = self._runtime.all_reduce(together).tolist()
        means, words_sum = values[: len(sums)], values[len(sums) :]
        for k, mean in enumerate(means):
            if not math.isfinite(mean):
                self._diverged(k, mean)
        self._steps += len(self._window)
        self._window.clear()
        return means, words_sum

    def _diverged(self, k: int, mean: float) -> None:
        result = self._window[k]
        bad = result.ids[~torch.isfinite(result.losses).cpu()][:_NAMED_IDS]
        mine = torch.full((1, _NAMED_IDS), -1, dtype=torch.int64, device=self._runtime.device)
        mine[0, : len(bad)] = bad
        every = self._runtime.all_gather(mine, self._runtime.world_size).tolist()
        rank = next((r for r, ids in enumerate(every) if ids[0] >= 0), 0)
        named = ", ".join(str(i) for i in every[rank] if i >= 0) or "none alone"
        raise DivergenceError(
            f"the loss became {mean} in round {self._round}, step {self._steps + k + 1}, "
            f"on rank {rank} (sample ids: {named}); try a smaller optimizer.lr"
        )
