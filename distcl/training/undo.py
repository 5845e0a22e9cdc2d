"""What a round began with, so that it can be taken back (``training.accept = "improves"``)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from distcl.parallel.anchor import Anchor
from distcl.sampling.round_loader import RoundLoader
from distcl.training.optimizer import OptimizerSlices, cloned
from distcl.updaters import Updater


class Undo:
    """Keeps the start of a round: the optimizer's state, and the table of ``source = "online"``.

    Weights and buffers of then are theta_star; what that was before, the anchor keeps. Statistics
    of the updater change at the commit only. Random generators are not turned back: a round after
    it has draws, and dropout masks, of its own.
    """

    def __init__(
        self, optimizer: OptimizerSlices, anchor: Anchor, updater: Updater, loader: RoundLoader
    ) -> None:
        self._optimizer = optimizer
        self._anchor = anchor
        self._updater = updater
        self._loader = loader
        self._table: dict[str, Any] | None = None

    def take(self) -> None:
        """Note the start of a round; before its first step. Collective."""
        self._optimizer.keep()
        self._table = cloned(self._loader.ledger_state())

    def settle(self, better: bool, buffers: Iterable[torch.Tensor]) -> None:
        """Let the round stay if it is ``better``; else make everything what it was. Collective.

        ``buffers``: all of the model's.
        """
        if not better:
            self._anchor.put_back(buffers)
            self._optimizer.put_back()
            self._loader.load_ledger(self._table)
            self._updater.taken_back()
        self._optimizer.forget()
        self._table = None

    def state_dict(self) -> dict[str, Any]:
        """Return the table as it is and as it was, the same on every rank. Collective."""
        return {"now": self._loader.ledger_state(), "kept": self._table}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned. Local."""
        self._loader.load_ledger(state["now"])
        self._table = state["kept"]
