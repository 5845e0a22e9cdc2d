"""The updater's hooks, and the two simplest methods: plain training, and none at all.

A round calls them in this order: ``begin_round``, ``cl_preprocessing``; for every step
``update_pre_fwd_bwd``, ``fwd_bwd``, ``update_post_fwd_bwd``, the optimizer's step,
``update_post_optimizer_call``; at the end ``cl_postprocessing``. Pretraining calls the same but for
``cl_preprocessing``, and takes the plain ``fwd_bwd``. All are called on every rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from distcl.config import ContinualLearningConfig
from distcl.distributed.runtime import Runtime
from distcl.errors import ConfigError
from distcl.losses import unreduced
from distcl.parallel.anchor import Anchor
from distcl.parallel.inference import evaluating
from distcl.parallel.partition import Partition
from distcl.priority.online import Ledger
from distcl.priority.scoring import Scorer, priorities
from distcl.priority.weighting import Weights
from distcl.types import Batch, Ids, PyTree, Source, UnreducedLoss


@dataclass(frozen=True, slots=True)
class UpdaterSetup:
    """What an updater works with. ``model`` is the prepared one (DDP inside).

    ``pretrained``: the model started from trained weights (``model.pretrained``). ``ledger``: takes
    the scores of training batches, under ``priority.source = "online"``.
    ``accumulate``: in how many parts a step's batches are computed (``training.accumulate``).
    ``min_score``: the least score that priorities are made of (``priority.min_score``).
    ``stand_in``: inputs [1, ...] of a sample, on the device, for forwards of ranks that have none;
    None: zeros. ``alone``: why the model cannot train on one sample, as BatchNorm cannot; or "".
    """

    config: ContinualLearningConfig
    runtime: Runtime
    model: nn.Module
    optimizer: torch.optim.Optimizer
    partition: Partition
    anchor: Anchor
    criterion: UnreducedLoss
    scorer: Scorer
    seed: int
    pretrained: bool = False
    ledger: Ledger | None = None
    accumulate: int = 1
    min_score: float = 1e-8
    stand_in: PyTree = None
    alone: str = ""


@dataclass(frozen=True, slots=True)
class StepResult:
    """Per-sample losses [B] of this rank's part, detached, on the device; and their ids [B].

    ``total``: the number of losses over all ranks together.
    """

    losses: torch.Tensor
    ids: torch.Tensor
    total: int


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


class Updater:
    """Plain training (``base``), and the base class of every method."""

    uses_hist_batch = False
    """Whether ``fwd_bwd`` wants a batch of history too."""
    trains = True
    """Whether rounds take steps."""
    sliced: tuple[str, ...] = ()
    """Entries of ``state_dict`` that are owned slices, name -> 1-D tensor."""
    dealt: tuple[str, ...] = ()
    """Entries that are dicts of which every rank holds some keys (layers)."""

    def __init__(self, setup: UpdaterSetup) -> None:
        self.setup = setup
        self.config = setup.config
        self.runtime = setup.runtime
        self.model = setup.model
        self.partition = setup.partition
        self.anchor = setup.anchor
        self.first_part = True
        """Whether this is the first part of a step's batches; see :meth:`accumulated`."""
        self._stands_in = False  # whether the last training forward was of no sample
        self.trained = 0
        """Samples that went forward and backward so far, over all ranks: 3 units of compute each"""

    @property
    def theta_star(self) -> dict[str, torch.Tensor]:
        """The weights at the start of the round before, as owned slices; see :class:`Anchor`."""
        return self.anchor.theta_star

    def compute_sample_priorities(self, source: Source, ids: Ids) -> tuple[Ids, Weights]:
        """Return (ids [N], priorities float64 [N]). Collective.

        priority_i = max(L(w_now, x_i) - L(theta_star, x_i), min_score) ** importance_alpha, or
        another signal in the place of the difference: before cap, min_ess and floor.
        """
        scores = self.setup.scorer.score(source, ids)
        return ids, priorities(scores, self.config.importance_alpha, self.setup.min_score)

    def begin_round(self, round_: Round) -> None:
        """Learn what the round (or the pretraining) trains on; comes first. Local."""
        self.round = round_

    def cl_preprocessing(self) -> None:
        """Begin a round: theta_star <- w_now, *after* the round's priorities were computed."""
        self.anchor.refresh()

    def update_pre_fwd_bwd(self) -> None:
        """Run before the forward pass of a step."""

    def fwd_bwd(self, batch: Batch, hist_batch: Batch | None) -> StepResult:
        """Forward and backward of one step; gradients are the global batch's mean. Collective."""
        return self.accumulated(self._plain, batch)

    def _plain(self, batch: Batch, hist_batch: Batch | None) -> StepResult:
        losses = self.losses(batch)
        self.backward(losses, batch)
        return StepResult(losses.detach(), batch.ids, batch.total)

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
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""

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

    # -- for the methods -----------------------------------------------------------------------

    def accumulated(
        self,
        fwd_bwd: Callable[[Batch, Batch | None], StepResult],
        batch: Batch,
        hist_batch: Batch | None = None,
    ) -> StepResult:
        """Call ``fwd_bwd`` on the parts of a step's batches; their gradients add up. Collective.

        There are ``training.accumulate`` parts on every rank, some of which may be empty. ``total``
        of each is that of the whole. Returns the results together, in order.
        """
        parts = self.setup.accumulate
        results: list[StepResult] = []
        strategy = self.runtime.strategy
        with ExitStack() as stack:
            if batch.total // self.runtime.world_size < parts:  # some part has no sample
                reduce = self.runtime.all_reduce
                stack.enter_context(strategy.only_used(self.model, lambda: self._stands_in, reduce))
            for k in range(parts):
                self.first_part = k == 0
                with strategy.accumulating(self.model, last=k + 1 == parts):
                    past = hist_batch.part(k, parts) if hist_batch is not None else None
                    results.append(fwd_bwd(batch.part(k, parts), past))
        self.first_part = True
        if parts == 1:
            return results[0]
        losses = torch.cat([r.losses for r in results])
        return StepResult(losses, torch.cat([r.ids for r in results]), results[0].total)

    def passes(self, batch: int, history: int) -> list[int]:
        """Return the sizes of a step's training forwards, for a rank's parts of such sizes. Local.

        Override it where ``fwd_bwd`` puts history samples through the model in training mode.
        """
        return cut(batch, self.setup.accumulate)

    def _unreduced_criterion(self, outputs: PyTree, y: PyTree) -> torch.Tensor:
        """Return the loss of each sample, [B]; of no sample, [0] with a gradient (of zero)."""
        leaves = [outputs] if isinstance(outputs, torch.Tensor) else tree_leaves(outputs)
        if len(leaves[0]) == 0:
            return torch.stack([leaf.sum() for leaf in leaves]).sum().expand(0)
        return self.setup.criterion(outputs, y)

    def forward(self, batch: Batch) -> PyTree:
        """Return the outputs [B, ...] of a training forward. Collective.

        A rank without samples runs a stand-in through the model in eval mode and cuts the outputs
        to none, so that it joins the collectives of forward and backward; its gradient is exactly
        zero, or none where no sample gives one. Raises ConfigError for one sample, where the model
        cannot train on one.
        """
        if self.first_part:  # its total is that of all parts
            self.trained += batch.total
        if len(batch) == 1 and self.setup.alone and self.model.training:
            raise ConfigError(
                f"a training forward of one sample, id {int(batch.ids[0])}, of a global batch of "
                f"{batch.total}: {self.setup.alone}"
            )
        self._stands_in = len(batch) == 0
        if len(batch):
            return self.model(batch.x)
        x = self.setup.stand_in
        if x is None:
            x = tree_map_only(torch.Tensor, lambda t: t.new_zeros((1, *t.shape[1:])), batch.x)
        with evaluating(self.model):
            outputs = self.model(x)
        return tree_map(lambda t: t[:0], outputs)

    def losses(self, batch: Batch) -> torch.Tensor:
        """Return the losses [B] of a training forward; see :meth:`forward`. Collective."""
        return self.losses_of(self.forward(batch), batch)

    def losses_of(self, outputs: PyTree, batch: Batch) -> torch.Tensor:
        """Return the losses [B] of a training forward's outputs, and note their scores. Local."""
        losses = unreduced(self._unreduced_criterion(outputs, batch.y), len(batch))
        if self.setup.ledger is not None:
            self.setup.ledger.observe(batch, outputs, losses)
        return losses

    def backward(self, losses: torch.Tensor, batch: Batch) -> None:
        """Backward of sum(losses) · W / B_global: averaging over ranks gives the global mean.

        Each loss counts as much as ``batch.weights`` says.
        """
        losses = weighted(losses, batch)
        self.runtime.strategy.backward(losses.sum() * (self.runtime.world_size / batch.total))


def cut(number: int, parts: int) -> list[int]:
    """Return the sizes of the parts of a batch; see :meth:`distcl.types.Batch.part`."""
    return [number * (k + 1) // parts - number * k // parts for k in range(parts)]


def weighted(losses: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Return losses [B, ...] times the batch's loss weights, if it has any."""
    if batch.weights is None:
        return losses
    return losses * batch.weights.view(-1, *[1] * (losses.ndim - 1))


class Frozen(Updater):
    """Evaluates and never trains (``none``): what happens if nothing is done about drift."""

    trains = False
