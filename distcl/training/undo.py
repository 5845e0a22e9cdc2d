"""What a round began with, so that it can be taken back (``training.accept = "improves"``)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from distcl.parallel.anchor import Anchor
from distcl.parallel.partition import OptimizerState, Partition
from distcl.sampling.round_loader import RoundLoader
from distcl.updaters import Updater


class Undo:
    """Keeps the start of a round: the optimizer's state, and the table of ``source = "online"``.

    Weights and buffers of then are theta_star; what that was before, the anchor keeps. Statistics
    of the updater change at the commit only. Random generators are not turned back: a round after
    it has draws, and dropout masks, of its own.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        partition: Partition,
        anchor: Anchor,
        updater: Updater,
        loader: RoundLoader,
    ) -> None:
        self._model = model
        self._optimizer = optimizer
        self._partition = partition
        self._anchor = anchor
        self._updater = updater
        self._loader = loader
        self._state: dict[Any, Any] | None = None
        self._ledger: dict[str, Any] | None = None

    def take(self) -> None:
        """Note the start of a round; before its first step. Collective."""
        self._state = {p: _cloned(state) for p, state in self._optimizer.state.items()}
        self._ledger = _cloned(self._loader.ledger_state())

    def forget(self) -> None:
        """Let go of it: the round stays. Local."""
        self._state = self._ledger = None

    def settle(self, before: float, after: float) -> bool:
        """Take a round back that made held-out data worse; whether it stays. Collective."""
        if after >= before:
            self.forget()
        else:
            self.put_back()
        return after >= before

    def put_back(self) -> None:
        """Make everything what it was at the start of the round. Collective."""
        self._anchor.put_back(self._model.buffers())
        self._exchange()
        self._loader.load_ledger(self._ledger)
        self._updater.taken_back()
        self.forget()

    def _exchange(self) -> None:
        """Swap the optimizer's state and the one that is kept, if there is one."""
        if self._state is not None:
            now = dict(self._optimizer.state)
            self._optimizer.state.clear()
            self._optimizer.state.update(self._state)
            self._state = now

    def optimizer_state(self) -> OptimizerState | None:
        """Return what is kept of the optimizer; None outside of such a round. Local."""
        if self._state is None:
            return None
        self._exchange()
        found = self._partition.optimizer_state(self._optimizer)
        self._exchange()
        return found

    def ledger_state(self) -> dict[str, Any] | None:
        """Return what is kept of the table, the same on every rank. Local."""
        return self._ledger

    def load(self, load: Callable[[], None], ledger: dict[str, Any] | None) -> None:
        """Keep again what was saved: ``load`` puts it into the optimizer. Collective."""
        self._optimizer.state.clear()
        load()
        self._state, self._ledger = dict(self._optimizer.state), ledger
        self._optimizer.state.clear()


def _cloned(state: Any) -> Any:
    return tree_map_only(torch.Tensor, torch.Tensor.clone, state)
