"""Reads the batches that plans draw."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from distcl.config import DataConfig
from distcl.data.loader import BatchLoader
from distcl.priority.account import Drawn
from distcl.priority.lanes import LaneSampler
from distcl.priority.sampler import DistributedWeightedSampler
from distcl.priority.weights import Correction
from distcl.priority.windows import Part, WindowPlan
from distcl.runtime import Runtime
from distcl.types import Batch, Source

Plan = DistributedWeightedSampler | LaneSampler | WindowPlan
"""What draws one pass after another, or all of a round."""


class Reader:
    """Reads this rank's part of the batches, with their loss weights (``priority.correction``)."""

    def __init__(
        self, runtime: Runtime, source: Source, data: DataConfig, correction: float
    ) -> None:
        self._runtime = runtime
        self._source = source
        self._data = data
        self._beta = correction

    def batches(self, plan: Plan, groups: Sequence[Part]) -> Iterator[tuple[Batch, Drawn]]:
        """Yield batches and what they drew: of a WindowPlan its steps, of another without end.

        ``groups``: what a plan whose weights stay draws from. Collective if their weights lie in
        slices.
        """
        loader = BatchLoader(
            self._source,
            plan,
            workers=self._data.workers,
            pin_memory=self._data.pin_memory,
            device=self._runtime.device,
            dtype=self._runtime.dtype,
        )
        correction = Correction(self._beta, self._runtime.dtype)
        if isinstance(plan, WindowPlan):
            for step, batch in enumerate(loader, start=plan.first_step):
                yield correction.applied(batch, plan.groups(step)), plan.global_batch(step)
            return
        epoch = plan.epoch
        while True:
            plan.set_epoch(epoch)
            for step, batch in enumerate(loader, start=plan.first_step):
                yield (
                    correction.applied(batch, groups),
                    plan.parts(step) if isinstance(plan, LaneSampler) else plan.global_batch(step),
                )
            epoch += 1
