"""Dark experience replay, DER++ (Buzzega et al. 2020)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from distcl.types import Batch, Ids, Source, info_of
from distcl.updaters.base import Round, Updater
from distcl.updaters.logits import LastLogits, LogitTable, compute_logits, merged_notes, one_tensor
from distcl.updaters.step import StepResult, UpdaterSetup, weighted


class DarkExperienceReplay(Updater):
    """``der``: replay of history samples along with the logits that they had (DER++, eq. 6).

    mean_cur ℓ + α · mean_hist ‖z - h(x)‖²/C + β · mean_hist ℓ

    z: the logits that the sample got in the last training batch of its own round that held it, as
    in the paper: along the trajectory, not at its end. Those that were never drawn, or are of the
    pretraining, get theirs by a forward at the commit; general data, as their first round begins.
    The squared distance is the mean over a
    sample's C outputs. The paper draws two history batches, one for each term; here one serves
    both, which has the same mean and saves a third of the forwards (batches of equal size).

    Logits are kept of exactly the ids that the history keeps: [H, C] in the host memory of every
    rank, and while a round trains [H_new, C] on the device.
    """

    uses_hist_batch = True
    saved = ("stored", "last")

    def __init__(self, setup: UpdaterSetup) -> None:
        super().__init__(setup)
        self.stored = LogitTable()
        self.last = LastLogits(self.stored.ids, self.runtime)

    def begin_round(self, round_: Round) -> None:
        """Get ready to note the logits of samples that the history will keep. Local."""
        super().begin_round(round_)
        self.last = LastLogits(np.setdiff1d(round_.kept, self.stored.ids), self.runtime)

    def cl_preprocessing(self) -> None:
        """Store the logits of general data that there are none of yet. Collective."""
        source, general = self.round.source, info_of(self.round.source).general
        if general is not None and len(new := np.setdiff1d(general, self.stored.ids)):
            _, logits = compute_logits(self.setup.scorer, source, new, "der")
            self.stored.put(new, logits)
        super().cl_preprocessing()

    def fwd_bwd(self, batch: Batch, hist_batch: Batch | None) -> StepResult:
        """One forward on the union; the losses returned are of both. Collective."""
        return self.accumulated(self._part, batch, hist_batch)

    def passes(self, batch: int, history: int) -> list[int]:
        """See the base class: each part is of both batches."""
        return self.joined_passes(batch, history)

    def _part(self, batch: Batch, hist_batch: Batch | None) -> StepResult:
        both = batch if hist_batch is None else batch.joined(hist_batch)
        outputs = one_tensor(self.forward(both), "der")
        losses = self.losses_of(outputs, both)
        n = len(batch)
        loss = weighted(losses[:n], batch).sum() / batch.total
        if hist_batch is not None:
            z = self.stored.of(hist_batch.ids, outputs)
            squares = weighted((outputs[n:] - z).square(), hist_batch).sum()
            distance = squares / outputs.shape[1:].numel()
            past = weighted(losses[n:], hist_batch).sum()
            replay = self.config.der_alpha * distance + self.config.der_beta * past
            loss = loss + replay / hist_batch.total
        self.runtime.strategy.backward(loss * self.runtime.world_size)
        self.last.note(batch.ids, outputs[:n])
        return StepResult(losses.detach(), both.ids, both.total)

    def cl_postprocessing(self, source: Source, ids: Ids) -> None:
        """Store the logits of what the history keeps, forget the others'. Collective."""
        noted, logits = self.last.merge()
        unseen = self.last.ids[~noted.numpy()]
        self.stored.keep(self.round.kept)
        if logits is not None:
            self.stored.put(self.last.ids[noted.numpy()], logits[noted.to(logits.device)])
        if len(unseen):
            _, logits = compute_logits(self.setup.scorer, source, unseen, "der")
            self.stored.put(unseen, logits)
        self.taken_back()

    def taken_back(self) -> None:
        """Forget the logits that the round has noted. Local."""
        self.last = LastLogits(self.last.ids[:0], self.runtime)

    def merged(
        self,
        states: Sequence[dict[str, Any]],
        cut: Callable[[str], dict[str, torch.Tensor]],
    ) -> dict[str, Any]:
        """Return the state: what all ranks noted last goes to rank 0. See the base class."""
        noted = [state["last"] for state in states]
        return super().merged(states, cut) | {"last": merged_notes(noted, self.runtime.rank)}
