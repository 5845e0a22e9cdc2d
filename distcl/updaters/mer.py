"""Meta-experience replay (Riemer et al. 2019): replay with Reptile's interpolation.

After every k steps of a round  w <- w° + β (w - w°),  w° the weights before these k steps. It is
held as owned slices, 1/W per rank.
"""

from __future__ import annotations

import torch

from distcl.types import Ids, Source
from distcl.updaters.er import ExperienceReplay
from distcl.updaters.step import UpdaterSetup


class MetaExperienceReplay(ExperienceReplay):
    """``mer``: steps as of ``er``; k = ``mer_every``, β = ``mer_rate``; β = 1 is ``er``.

    Intervals are counted from the first step of a round; the steps that its end leaves over stay
    as they are, and so does the pretraining. The optimizer's state and buffers are not touched.
    """

    saved = ("start", "steps")
    sliced = ("start",)

    def __init__(self, setup: UpdaterSetup) -> None:
        super().__init__(setup)
        self.start: dict[str, torch.Tensor] = {}  # w°
        self.steps: int | None = None  # taken from there; None: outside of rounds, or β = 1

    def cl_preprocessing(self) -> None:
        """theta_star <- w_now, and w° too. Local."""
        super().cl_preprocessing()
        if self.config.mer_rate < 1:
            self._begin()

    def update_post_optimizer_call(self) -> None:
        """Interpolate if it is time. Collective then."""
        if self.steps is None:
            return
        self.steps += 1
        if self.steps == self.config.mer_every:
            weights = self.partition.trainable()
            rate = self.config.mer_rate
            self.partition.put({n: torch.lerp(self.start[n], w, rate) for n, w in weights.items()})
            self._begin()

    def _begin(self) -> None:
        self.start = {name: w.clone() for name, w in self.partition.trainable().items()}
        self.steps = 0

    def cl_postprocessing(self, source: Source, ids: Ids) -> None:
        """Forget w°. Local."""
        self.taken_back()

    def taken_back(self) -> None:
        """Forget w°. Local."""
        self.start, self.steps = {}, None
