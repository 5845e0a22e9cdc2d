"""Learning without forgetting (Li & Hoiem 2016): distillation from theta_star."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from distcl.errors import ConfigError
from distcl.losses import bce, mse, one_by_one
from distcl.types import Batch, Ids, PyTree, Source
from distcl.updaters.base import Updater
from distcl.updaters.logits import LogitTable, compute_logits, one_tensor
from distcl.updaters.step import StepResult, UpdaterSetup


class LwF(Updater):
    """``lwf``: the model keeps answering on new data as it did before the round.

    mean_cur [ℓ + λ T² KL(softmax(t/T) ‖ softmax(h(x)/T))],  λ = ``lwf_alpha``, T = the temperature

    t: logits of the teacher theta_star. While a round trains, theta_star is the weights at its
    start; so one eval pass over the round's samples as it begins, shared among ranks, gives every
    t exactly, and no step swaps weights. The logits take [N, C] of every rank's host memory until
    the commit (and [H, C] where ``mix_historic_data`` puts history into the batches). The softmax
    is over dimension 1; of several positions the mean counts.

    A model that is not trained yet is no teacher: the first round is plain, unless the weights
    were given (``model.pretrained``).
    """

    saved = ("teacher", "commits")

    def __init__(self, setup: UpdaterSetup) -> None:
        super().__init__(setup)
        for criterion in (mse, bce):
            if self.criterion is criterion:
                raise ConfigError(
                    "continual_learning.update_mode = 'lwf' distils class probabilities, which "
                    f"model.loss = '{criterion.__name__}' has not"
                )
        self.teacher = LogitTable()
        self.commits = 0

    def cl_preprocessing(self) -> None:
        """theta_star <- w_now; ask it about the round's samples. Collective."""
        super().cl_preprocessing()
        if self.commits or self.setup.pretrained:
            mixed = [self.round.history] if self.config.mix_historic_data else []
            ids = np.unique(np.concatenate([self.round.ids, *mixed]))
            read, logits = compute_logits(self.setup.scorer, self.round.source, ids, "lwf")
            if not np.array_equal(read, ids):  # stand-ins may come twice
                read, first = np.unique(read, return_index=True)
                logits = logits[torch.from_numpy(first)]
            self.teacher.put(read, logits)

    def fwd_bwd(self, batch: Batch, hist_batch: Batch | None) -> StepResult:
        """Forward and backward with the distillation; the losses returned are without. Collective.

        Raises ConfigError if the model returns anything but a tensor.
        """
        return self.accumulated(self._part, batch)

    def _part(self, batch: Batch, hist_batch: Batch | None) -> StepResult:
        outputs = one_tensor(self.forward(batch), "lwf")
        losses = self.losses_of(outputs, batch)
        if len(self.teacher.ids):
            t = self.teacher.of(batch.ids, outputs)
            self.backward(
                losses + self.config.lwf_alpha * self._distillation(t, outputs, batch.y), batch
            )
        else:
            self.backward(losses, batch)
        return StepResult(losses.detach(), batch.ids, batch.total)

    def cl_postprocessing(self, source: Source, ids: Ids) -> None:
        """Forget the teacher's answers. Local."""
        self.taken_back()
        self.commits += 1

    def taken_back(self) -> None:
        """Forget the teacher's answers. Local."""
        self.teacher = LogitTable()

    def _distillation(
        self, teacher: torch.Tensor, student: torch.Tensor, y: PyTree
    ) -> torch.Tensor:
        """Return T² KL(softmax(teacher/T) ‖ softmax(student/T)), [B]."""
        temperature = self.config.lwf_temperature
        teacher, gather = one_by_one(teacher, y, self.criterion)
        student, _ = one_by_one(student, y, self.criterion)
        target = (teacher / temperature).log_softmax(1)
        answer = (student / temperature).log_softmax(1)
        each = F.kl_div(answer, target, reduction="none", log_target=True).sum(1)
        return temperature**2 * gather(each)
