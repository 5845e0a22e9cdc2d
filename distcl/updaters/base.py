"""The updater's hooks, and the two simplest methods: plain training, and none at all.

A round calls them in this order: ``begin_round``, ``cl_preprocessing``; for every step
``update_pre_fwd_bwd``, ``fwd_bwd``, ``update_post_fwd_bwd``, the optimizer's step,
``update_post_optimizer_call``; at the end ``cl_postprocessing``. Pretraining calls the same but for
``cl_preprocessing``, and takes the plain ``fwd_bwd``. All are called on every rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from distcl.priority.weighting import Weights
from distcl.types import Batch, Ids, Source
from distcl.updaters.step import Passes, StepResult, UpdaterSetup


@dataclass(frozen=True, slots=True)
class Round:
    """What a round trains on, for methods that look ahead.

    ids: its training samples [N]; history: the ids held as it begins [H]; after: what will be held
    once some ids were added. All are readable from ``source``.
    """

    source: Source
    ids: Ids
    history: Ids
    after: Callable[[Ids], Ids]

    @property
    def kept(self) -> Ids:
        """The ids that will be held after it, worked out anew each time, while it lasts."""
        return self.after(self.ids)


class Updater(Passes):
    """Plain training (``base``), and the base class of every method: its hooks and its state."""

    joins_batches = False
    """Whether a step's loss is one mean over both batches, not one of each."""
    uses_hist_batch = False
    """Whether ``fwd_bwd`` wants a batch of history too."""
    trains = True
    """Whether rounds take steps."""
    saved: tuple[str, ...] = ()
    """Attributes that ``state_dict`` holds: my slices, plain values, or what has a state itself."""
    sliced: tuple[str, ...] = ()
    """Entries of ``state_dict`` that are owned slices, name -> 1-D tensor."""
    dealt: tuple[str, ...] = ()
    """Entries that are dicts of which every rank holds some keys (layers)."""

    def __init__(self, setup: UpdaterSetup) -> None:
        super().__init__(setup)
        self._round: Round | None = None

    @property
    def round(self) -> Round:
        """The round (or the pretraining) in progress."""
        assert self._round is not None
        return self._round

    @property
    def theta_star(self) -> dict[str, torch.Tensor]:
        """The weights at the start of the round before, as owned slices; see :class:`Anchor`."""
        return self.anchor.theta_star

    def compute_sample_priorities(self, source: Source, ids: Ids) -> tuple[Ids, Weights]:
        """Return (ids [N], priorities float64 [N]). Collective.

        priority_i = max(L(w_now, x_i) - L(theta_star, x_i), min_score) ** importance_alpha, or
        another signal in the place of the difference: before cap, min_ess and floor.
        """
        return ids, self.setup.scorer.priorities(source, ids, self.config.importance_alpha)

    def begin_round(self, round_: Round) -> None:
        """Learn what the round (or the pretraining) trains on; comes first. Local."""
        self._round = round_

    def cl_preprocessing(self) -> None:
        """Begin a round: theta_star <- w_now, *after* the round's priorities were computed."""
        self.anchor.refresh()

    def update_pre_fwd_bwd(self) -> None:
        """Run before the forward pass of a step."""

    def fwd_bwd(self, batch: Batch, hist_batch: Batch | None) -> StepResult:
        """Forward and backward of one step; gradients are the global batch's mean. Collective."""
        return self.accumulated(self.plain, batch)

    def update_post_fwd_bwd(self) -> None:
        """Add a regularizer's gradient, between backward and the optimizer's step."""

    def update_post_optimizer_call(self) -> None:
        """Run after the optimizer's step."""

    def cl_postprocessing(self, source: Source, ids: Ids) -> None:
        """Commit the round on its training samples. It never touches theta_star."""

    def taken_back(self) -> None:
        """Forget what the steps of a round have gathered: it is not accepted, nor committed."""

    def state_dict(self) -> dict[str, Any]:
        """Return what must survive a restart: this rank's slices and plain values."""
        values = {name: getattr(self, name) for name in self.saved}
        return {
            name: value.state_dict() if hasattr(value, "state_dict") else value
            for name, value in values.items()
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        for name in self.saved:
            if hasattr(held := getattr(self, name), "load_state_dict"):
                held.load_state_dict(state[name])
            else:
                setattr(self, name, state[name])

    def merged(
        self,
        states: Sequence[dict[str, Any]],
        cut: Callable[[str], dict[str, torch.Tensor]],
    ) -> dict[str, Any]:
        """Return this rank's state from those of another number of ranks, in order of rank. Local.

        ``cut(key)`` returns my slices of a sliced entry. What is neither sliced nor dealt out is
        taken to be the same on every rank.
        """
        state = dict(states[0])
        state |= {key: cut(key) for key in self.sliced}
        for key in self.dealt:
            state[key] = {name: value for s in states for name, value in s[key].items()}
        return state


class Frozen(Updater):
    """Evaluates and never trains (``none``): what happens if nothing is done about drift."""

    trains = False
