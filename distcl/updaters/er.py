"""Experience replay (Chaudhry et al. 2019, "On tiny episodic memories in continual learning")."""

from __future__ import annotations

from distcl.types import Batch
from distcl.updaters.base import Updater
from distcl.updaters.step import StepResult


class ExperienceReplay(Updater):
    """``er``: every step trains on a current and a history batch together.

    Loss: the mean over their union, (Σ_cur ℓ + Σ_hist ℓ) / (B_cur + B_hist), in one forward. The
    history is the reservoir of ``buffer_size`` ids; its batch has ``replay_batch_size`` samples,
    drawn by priority if ``importance_weighting`` is on. Without history: plain training.
    """

    joins_batches = True
    uses_hist_batch = True

    def fwd_bwd(self, batch: Batch, hist_batch: Batch | None) -> StepResult:
        """Forward and backward on the union; the losses returned are of both. Collective."""
        return super().fwd_bwd(batch if hist_batch is None else batch.joined(hist_batch), None)

    def passes(self, batch: int, history: int) -> list[int]:
        """See the base class."""
        return super().passes(batch + history, 0)
