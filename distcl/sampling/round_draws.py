"""What one round draws from, and what it has drawn and shown so far."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from distcl.data.ids import ids_tensor
from distcl.distributed.runtime import Runtime
from distcl.priority.population import Dealer
from distcl.priority.round_weights import NAMES, RoundWeights
from distcl.sampling.candidates import Chooser
from distcl.sampling.composition import Mix
from distcl.sampling.draw_log import DrawLog, weight_histogram
from distcl.sampling.groups import Part
from distcl.sampling.sampler import DistributedWeightedSampler
from distcl.sampling.sequential import LaneSampler
from distcl.sampling.staleness import Freshness
from distcl.types import Ids

AnySampler = DistributedWeightedSampler | LaneSampler
"""What draws one pass after another."""


class RoundDraws:
    """A round's data, weights and samplers, the log of its draws, and figures for its report."""

    def __init__(
        self,
        runtime: Runtime,
        mix: Mix,
        dealer: Dealer | None,
        index: int,
        current: Ids,
        history: Ids,
        weights: RoundWeights,
        replayed: bool = False,
    ) -> None:
        self._runtime = runtime
        self._mix = mix
        self._dealer = dealer
        self.index = index
        self.current = current
        self.history = history
        self.weights = weights
        """The weights that the round began with, and their report."""
        self.replayed = replayed
        """Whether there are history batches."""
        self.samplers: dict[int, AnySampler] = {}
        self.choosers: dict[int, Chooser] = {}
        self.log = DrawLog(runtime, dealer)
        self.freshness = Freshness(runtime)
        self.refresh_seconds = 0.0

    def groups(self, weights: RoundWeights | None = None) -> dict[int, list[Part]]:
        """Return what each sampler draws from, by these weights or those of the start."""
        current, history = self.current, self.history
        both = (weights or self.weights).of(current, history, self._dealer).vectors
        known = [vector for vector in both if vector is not None]
        return self._mix.groups(known, len(current), len(history), self.replayed)

    @property
    def windowed(self) -> dict[int, DistributedWeightedSampler]:
        """The samplers that draw in windows."""
        return {
            which: sampler
            for which, sampler in self.samplers.items()
            if isinstance(sampler, DistributedWeightedSampler) and sampler.options.window
        }

    def look(self, step: int, ids: torch.Tensor, losses: torch.Tensor) -> None:
        """Take this rank's losses [B] of the ``step``-th step, if it is looked at. Local.

        Few steps of a round are looked at, and none of a round without weights.
        """
        if self.freshness.wants(step):
            parts = [p for s in self.samplers.values() for p in s.groups((step - 1) % len(s))]
            self.freshness.take(ids, losses, parts)

    # ------------------------------------------------------------ for the report

    @property
    def staleness(self) -> float | None:
        """Rank correlation of weights and the round's losses so far, or None. Collective."""
        return self.freshness.correlation

    @property
    def candidates(self) -> int:
        """How many samples could be drawn."""
        current, history = len(self.current), len(self.history)
        drawn = self.replayed or self._mix.draws(current, history)[1] > 0
        return current + drawn * history

    def histograms(self) -> dict[str, npt.NDArray[np.int64]]:
        """Return histograms of weights between ``EDGES``, by the name of their part. Collective.

        Of the weights that the round began with, or of those of all candidates so far.
        """
        found = {
            name: weight_histogram(part, self._runtime) for name, part in self.weights.parts.items()
        }
        return found | {NAMES[which]: c.histogram for which, c in self.choosers.items()}

    @property
    def forwards(self) -> int:
        """Samples passed through the model to choose batches, over all ranks."""
        return sum(chooser.forwards for chooser in self.choosers.values())

    @property
    def priority_seconds(self) -> float:
        """How much of the time of the steps went into priorities."""
        choosing = sum(chooser.seconds for chooser in self.choosers.values())
        return self.refresh_seconds + choosing

    # ------------------------------------------------------------ state

    def state_dict(self, done: int) -> dict[str, Any]:
        """Return what all ranks share after ``done`` steps. Collective."""
        samplers = {
            which: sampler.state_dict((done - 1) % len(sampler) + 1 if done else 0)
            for which, sampler in self.samplers.items()
        }
        return {
            "round": self.index,
            "current": ids_tensor(self.current),
            "history": ids_tensor(self.history),
            "replayed": self.replayed,
            "weights": self.weights.state_dict(self.history),
            "log": None if self._dealer is not None else self.log.state_dict(),
            "seconds": self.refresh_seconds,
            "samplers": samplers,
            "choosers": {which: c.state_dict() for which, c in self.choosers.items()},
            "freshness": self.freshness.state_dict(),
        }
