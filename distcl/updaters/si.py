"""Synaptic intelligence (Zenke, Poole & Ganguli 2017).

Penalty  c · sum_i Ω_i (w_i - w*_i)²  around the weights w* at the start of the round (theta_star).
Ω, ω and what a step compares are owned slices, 1/W per rank each.
"""

from __future__ import annotations

import torch

from distcl.types import Ids, Source
from distcl.updaters.base import Updater
from distcl.updaters.quadratic_penalty import add_pull
from distcl.updaters.step import UpdaterSetup


class SynapticIntelligence(Updater):
    """``si``: a weight matters as much as its moves lowered the loss (eqs. 3 to 5).

    ω_i <- ω_i - g_i Δw_i at every step, pretraining included: g is the gradient of the loss without
    the penalty, Δw what the optimizer made of both. At the commit
    Ω_i <- Ω_i + max(0, ω_i / ((w_i - w*_i)² + ξ)), and ω begins anew.
    """

    saved = ("path", "importance", "commits")
    sliced = ("path", "importance")

    def __init__(self, setup: UpdaterSetup) -> None:
        super().__init__(setup)
        slices = self.partition.trainable().items()
        self.path = {name: torch.zeros_like(w) for name, w in slices}  # ω
        self.importance = {name: torch.zeros_like(w) for name, w in slices}  # Ω
        self.commits = 0
        self._before: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}  # g and w of this step

    def update_post_fwd_bwd(self) -> None:
        """Keep the loss's gradient and the weights; add 2cΩ(w - w*), damped. Collective."""
        w = self.partition.trainable()
        self._before = {n: (g.clone(), w[n].clone()) for n, g in self.partition.grads().items()}
        if self.commits:
            add_pull(self, self.importance, 2 * self.config.si_c, self.config.penalty_step)

    def update_post_optimizer_call(self) -> None:
        """ω <- ω - g Δw. Local."""
        w = self.partition.trainable()
        for name, (g, before) in self._before.items():
            self.path[name].addcmul_(g, w[name] - before, value=-1)
        self._before = {}

    def cl_postprocessing(self, source: Source, ids: Ids) -> None:
        """Fold ω into Ω. Local."""
        for name, w in self.partition.trainable().items():
            moved = (w - self.theta_star[name].to(w.device)).square()
            gained = self.path[name] / (moved + self.config.si_xi)
            self.importance[name] += gained.clamp(min=0)
        self.taken_back()
        self.commits += 1

    def taken_back(self) -> None:
        """Begin ω anew. Local."""
        for path in self.path.values():
            path.zero_()
