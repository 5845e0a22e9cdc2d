"""What a round began with, so that it can be taken back (``training.accept = "improves"``)."""

from __future__ import annotations

from typing import Any

from distcl.training.optimizer import OptimizerSlices, cloned
from distcl.training.parts import Parts


class Undo:
    """Keeps the start of a round: the optimizer's state, the table of ``source = "online"``.

    And the mean of weights that the round before has left, if there is one. Weights and buffers of
    then are theta_star; what that was before, the anchor keeps. Statistics of the updater change at
    the commit only. Random generators are not turned back: a round after it has draws, and dropout
    masks, of its own.
    """

    def __init__(self, optimizer: OptimizerSlices, parts: Parts) -> None:
        self._optimizer = optimizer
        self._parts = parts
        self._table: dict[str, Any] | None = None

    def take(self) -> None:
        """Note the start of a round; before its first step. Collective."""
        self._optimizer.keep()
        self._parts.average.keep()
        self._table = cloned(self._parts.loader.ledger_state())

    def settle(self, better: bool) -> None:
        """Let the round stay if it is ``better``; else make everything what it was. Collective."""
        if not better:
            model = self._parts.runtime.strategy.unwrap(self._parts.model)
            self._parts.anchor.put_back(model.buffers())
            self._parts.average.put_back()
            self._optimizer.put_back()
            self._parts.loader.load_ledger(self._table)
            self._parts.updater.taken_back()
        self._optimizer.forget()
        self._parts.average.forget()
        self._table = None

    def state_dict(self) -> dict[str, Any]:
        """Return the table as it is and as it was, the same on every rank. Collective."""
        return {"now": self._parts.loader.ledger_state(), "kept": self._table}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned. Local."""
        self._parts.loader.load_ledger(state["now"])
        self._table = state["kept"]
