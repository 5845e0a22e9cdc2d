"""theta_star: the weights at the start of the round before, held as owned slices, 1/W per rank."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from distcl.distributed.runtime import Runtime
from distcl.parallel.partition import Partition, create_partition
from distcl.parallel.sliced_state import SavedSlices


class Anchor:
    """theta_star over parameters and buffers. A new anchor equals the weights as they are.

    ``theta_star``: name -> 1-D tensor, the slices that this rank owns (``Partition.owned``).
    They stay where the weights are, or on ``device`` (pinned, where that is the host of a GPU).
    ``older``: what theta_star was in earlier rounds, newest first, at most ``keep`` - 1; 1/W each.
    ``undo``: keep what the last :meth:`refresh` replaced, for :meth:`put_back`; 1/W more.
    """

    def __init__(
        self,
        partition: Partition,
        keep: int = 1,
        device: torch.device | None = None,
        undo: bool = False,
    ) -> None:
        self._partition = partition
        self._keep = keep
        self.theta_star = {
            name: _copy(view, device or view.device) for name, view in partition.owned().items()
        }
        self.older: list[dict[str, torch.Tensor]] = []
        self._begun = False  # whether theta_star is the start of a round
        self._undo = undo
        self._replaced: dict[str, Any] | None = None  # a state_dict

    @classmethod
    def of(cls, runtime: Runtime, model: nn.Module) -> Anchor:
        """Return the anchor of a model that ``runtime.prepare`` returned. Local."""
        return cls(create_partition(runtime, model))

    def refresh(self) -> None:
        """theta_star <- the current weights. Local.

        Call it after the round's priorities are computed and before its first step; see
        ``Updater.cl_preprocessing``.
        """
        before: dict[str, torch.Tensor] = {}
        if self._undo or (self._keep > 1 and self._begun):
            before = {n: _copy(v, v.device) for n, v in self.theta_star.items()}
        if self._undo:
            held = {"theta_star": before, "older": [*self.older], "begun": self._begun}
            self._replaced = held
        if self._keep > 1 and self._begun:
            self.older.insert(0, before)
            del self.older[self._keep - 1 :]
        self._begun = True
        self._take()

    def restart(self) -> None:
        """theta_star <- the current weights, and forget what it was before. Local."""
        self.older.clear()
        self._begun = False
        self._replaced = None
        self._take()

    def _take(self) -> None:
        with torch.no_grad():
            for name, view in self._partition.owned().items():
                self.theta_star[name].copy_(view)

    def swapped_in(self, back: int = 0) -> AbstractContextManager[None]:
        """Return a context in which the model computes with theta_star, in place. Collective.

        ``back`` > 0 takes ``older[back - 1]`` instead. The weights are put back exactly, also when
        the body raises. Enter ``torch.inference_mode`` inside it, not outside.
        """
        return self._partition.swapped(self.older[back - 1] if back else self.theta_star)

    def put_back(self, buffers: Iterable[torch.Tensor]) -> None:
        """Weights and buffers <- theta_star, which becomes what it was before. Collective.

        As if the last :meth:`refresh`, and what was trained since, had not been. ``buffers``: all
        of the module's, which :meth:`swapped_in` leaves as they are. Needs ``undo``.
        """
        assert self._replaced is not None
        start = {name: value.clone() for name, value in self.theta_star.items()}
        with self.swapped_in(), torch.no_grad():
            kept = [(buffer, buffer.clone()) for buffer in buffers]
            for name, view in self._partition.owned().items():  # wherever the context keeps those
                view.copy_(start[name])
                self.theta_star[name].copy_(start[name])
        with torch.no_grad():
            for buffer, value in kept:
                buffer.copy_(value)
        self.load_state_dict(self._replaced | {"replaced": None})

    def state_dict(self) -> dict[str, Any]:
        """Return this rank's slices (not copies): theta_star, the older ones, the replaced."""
        return {
            "theta_star": dict(self.theta_star),
            "older": [dict(old) for old in self.older],
            "begun": self._begun,
            "replaced": self._replaced,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the slices of the same rank of the same number of ranks."""
        for name, value in self.theta_star.items():
            value.copy_(state["theta_star"][name])
        self.older = [{n: v.clone() for n, v in old.items()} for old in state["older"]]
        self._begun = state["begun"]
        self._replaced = state["replaced"]

    def load_slices(self, saved: SavedSlices) -> None:
        """Restore my slices of what was saved on any number of ranks. Local."""
        self.load_state_dict(_mine(saved, saved.own or saved.states[0]))


def _mine(saved: SavedSlices, state: dict[str, Any], *keys: str) -> dict[str, Any]:
    """Return my slices of an anchor's ``state``, which lies under ``keys``. Local."""
    replaced = state.get("replaced")
    return {
        "theta_star": saved.cut(*keys, "theta_star"),
        "older": [saved.cut(*keys, "older", k) for k in range(len(state["older"]))],
        "begun": state["begun"],
        "replaced": replaced and _mine(saved, replaced, *keys, "replaced"),
    }


def _copy(view: torch.Tensor, device: torch.device) -> torch.Tensor:
    pinned = device.type == "cpu" and view.device.type == "cuda"
    return torch.empty_like(view, device=device, pin_memory=pinned).copy_(view)
