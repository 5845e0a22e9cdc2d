"""What a method works with, and the forward and backward passes of a training step."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from distcl.config import ContinualLearningConfig
from distcl.errors import ConfigError
from distcl.losses import unreduced
from distcl.parallel.inference import evaluating
from distcl.priority.online import Ledger
from distcl.priority.scoring import Scorer
from distcl.types import Batch, PyTree


@dataclass(frozen=True, slots=True)
class PassSetup:
    """How the passes of a step are made.

    ``accumulate``: in how many parts its batches are computed (``training.accumulate``).
    ``stand_in``: inputs [1, ...] of a sample, on the device, for forwards of ranks that have none;
    None: zeros. ``alone``: why the model cannot train on one sample, as BatchNorm cannot; or "".
    """

    accumulate: int = 1
    stand_in: PyTree = None
    alone: str = ""


@dataclass(frozen=True, slots=True)
class UpdaterSetup:
    """What an updater works with. ``model`` is the prepared one (DDP inside).

    ``pretrained``: the model started from trained weights (``model.pretrained``). ``ledger``: takes
    the scores of training batches, under ``priority.source = "online"``.
    """

    config: ContinualLearningConfig
    model: nn.Module
    optimizer: torch.optim.Optimizer
    scorer: Scorer
    seed: int
    pretrained: bool = False
    ledger: Ledger | None = None
    passes: PassSetup = PassSetup()


@dataclass(frozen=True, slots=True)
class StepResult:
    """Per-sample losses [B] of this rank's part, detached, on the device; and their ids [B].

    ``total``: the number of losses over all ranks together.
    """

    losses: torch.Tensor
    ids: torch.Tensor
    total: int


class Passes:
    """The forward and backward passes of training steps, for every method to build its own on."""

    def __init__(self, setup: UpdaterSetup) -> None:
        self.setup = setup
        self.config = setup.config
        self.model = setup.model
        forward = setup.scorer.forward
        self.runtime = forward.runtime
        self.partition = forward.partition
        self.criterion = forward.criterion
        self.anchor = setup.scorer.anchor
        self.first_part = True
        """Whether this is the first part of a step's batches; see :meth:`accumulated`."""
        self._stands_in = False  # whether the last training forward was of no sample
        self.trained = 0
        """Samples that went forward and backward so far, over all ranks: 3 units of compute each"""

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
        parts = self.setup.passes.accumulate
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
        return cut(batch, self.setup.passes.accumulate)

    def joined_passes(self, batch: int, history: int) -> list[int]:
        """Return :meth:`passes` where each part is of both batches. Local."""
        both = (cut(number, self.setup.passes.accumulate) for number in (batch, history))
        return [n + past for n, past in zip(*both, strict=True)]

    def plain(self, batch: Batch, hist_batch: Batch | None) -> StepResult:
        """Forward and backward of a part of a batch; its losses. Collective."""
        losses = self.losses(batch)
        self.backward(losses, batch)
        return StepResult(losses.detach(), batch.ids, batch.total)

    def _unreduced_criterion(self, outputs: PyTree, y: PyTree) -> torch.Tensor:
        """Return the loss of each sample, [B]; of no sample, [0] with a gradient (of zero)."""
        leaves = [outputs] if isinstance(outputs, torch.Tensor) else tree_leaves(outputs)
        if len(leaves[0]) == 0:
            return torch.stack([leaf.sum() for leaf in leaves]).sum().expand(0)
        return self.criterion(outputs, y)

    def forward(self, batch: Batch) -> PyTree:
        """Return the outputs [B, ...] of a training forward. Collective.

        A rank without samples runs a stand-in through the model in eval mode and cuts the outputs
        to none, so that it joins the collectives of forward and backward; its gradient is exactly
        zero, or none where no sample gives one. Raises ConfigError for one sample, where the model
        cannot train on one.
        """
        if self.first_part:  # its total is that of all parts
            self.trained += batch.total
        if len(batch) == 1 and self.setup.passes.alone and self.model.training:
            raise ConfigError(
                f"a training forward of one sample, id {int(batch.ids[0])}, of a global batch of "
                f"{batch.total}: {self.setup.passes.alone}"
            )
        self._stands_in = len(batch) == 0
        if len(batch):
            return self.model(batch.x)
        x = self.setup.passes.stand_in
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
