"""Online elastic weight consolidation (Kirkpatrick et al. 2017; online form: Schwarz et al. 2018).

Penalty  λ/2 · sum_i F_i (w_i - w*_i)²  around the committed weights w*. Those are the weights at
the start of the round, which is what theta_star holds while the round trains; so no second copy is
kept. F is held as owned slices, 1/W per rank.
"""

from __future__ import annotations

import torch

from distcl.errors import ConfigError
from distcl.sampling.draws import generator
from distcl.types import Ids, Source
from distcl.updaters.base import Updater
from distcl.updaters.fisher import diagonal_fisher
from distcl.updaters.quadratic_penalty import add_pull
from distcl.updaters.step import UpdaterSetup


class EWCOnline(Updater):
    """``ewc_online``: F <- d·F + (1-d)·F_new at every commit, d = ``ewc_ema_decay``.

    ``ewc_fisher = "sum"``: F <- d·F + F_new instead. The first commit takes F_new whole. F_new
    comes from one uniform pass over at most ``fisher_samples`` training samples of the round, never
    from training batches (their draws may be prioritized) and never from evaluation.
    """

    saved = ("fisher", "commits")
    sliced = ("fisher",)

    def __init__(self, setup: UpdaterSetup) -> None:
        super().__init__(setup)
        if self.partition.sharded and self.runtime.precision == "fp16":
            raise ConfigError(
                "continual_learning.update_mode = 'ewc_online' does not work with run.precision = "
                "'fp16' where weights are sharded: squared gradients leave its range; use 'bf16'"
            )
        self.fisher: dict[str, torch.Tensor] = {}
        self.commits = 0

    def update_post_fwd_bwd(self) -> None:
        """Add λF(w - w*) to the gradient of my slices, damped by ``penalty_step``. Collective."""
        if self.commits:
            add_pull(self, self.fisher, self.config.ewc_lambda, self.config.penalty_step)

    def cl_postprocessing(self, source: Source, ids: Ids) -> None:
        """Fold the round's Fisher in. Collective."""
        limit = self.config.fisher_samples
        if len(ids) > limit:
            draw = generator(self.setup.seed, self.commits, 0xF15E)
            ids = ids[draw.choice(len(ids), size=limit, replace=False)]
        self.trained += len(ids)
        new = diagonal_fisher(
            self.runtime,
            self.model,
            self.setup.optimizer,
            self.partition,
            self.criterion,
            source,
            ids,
        )
        old_share = self.config.ewc_ema_decay
        new_share = 1 - old_share if self.config.ewc_fisher == "mean" else 1.0
        for name, value in new.items():
            old = self.fisher.get(name)
            self.fisher[name] = value if old is None else old_share * old + new_share * value
        self.commits += 1
