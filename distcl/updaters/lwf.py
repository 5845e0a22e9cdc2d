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

    ``lwf_top_k`` > 0: of each position only the k most likely classes are kept, and the mass of the
    others; the divergence is then over these k + 1 outcomes, and memory O(k) a position, not O(C).

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
            scorer, source = self.setup.scorer, self.round.source
            read, logits = compute_logits(scorer, source, ids, "lwf", self._kept)
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
        if len(self.teacher.ids) and len(batch):
            wide = outputs.to(self.runtime.dtype)  # half precision would not hold the classes
            t = self.teacher.of(batch.ids, wide)
            self.backward(
                losses + self.config.lwf_alpha * self._distillation(t, wide, batch.y), batch
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

    def _kept(self, outputs: torch.Tensor, y: PyTree) -> torch.Tensor:
        """Return what the teacher keeps of its logits [B, ...]: all, or [B, positions, 2k + 1].

        That is a position's k largest log-probabilities, the log of the others' mass, and the k
        classes.
        """
        k = self.config.lwf_top_k
        each = one_by_one(outputs, y, self.criterion)[0].movedim(1, -1)
        if not 0 < k < each.shape[-1]:
            return outputs
        logs = (each / self.config.lwf_temperature).log_softmax(-1)
        best, classes = logs.topk(k, -1)
        kept = torch.cat([best, _others(logs, classes), classes.to(logs.dtype)], -1)
        return kept.reshape(len(outputs), -1, 2 * k + 1)

    def _distillation(
        self, teacher: torch.Tensor, student: torch.Tensor, y: PyTree
    ) -> torch.Tensor:
        """Return T² KL(softmax(teacher/T) ‖ softmax(student/T)), [B]."""
        temperature, k = self.config.lwf_temperature, self.config.lwf_top_k
        student, gather = one_by_one(student, y, self.criterion)
        answer = (student.movedim(1, -1) / temperature).log_softmax(-1)
        if 0 < k < answer.shape[-1]:
            kept = teacher.view(*answer.shape[:-1], 2 * k + 1)
            target, classes = kept[..., : k + 1], kept[..., k + 1 :].long()
            answer = torch.cat([answer.gather(-1, classes), _others(answer, classes)], -1)
        else:
            whole = one_by_one(teacher, y, self.criterion)[0].movedim(1, -1)
            target = (whole / temperature).log_softmax(-1)
        each = F.kl_div(answer, target, reduction="none", log_target=True).sum(-1)
        return temperature**2 * gather(each)


def _others(logs: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
    """Return the log of the mass that all but ``classes`` [..., k] have together, [..., 1]."""
    return logs.scatter(-1, classes, -torch.inf).logsumexp(-1, keepdim=True)
