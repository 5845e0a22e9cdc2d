"""The mean of a round's weights over its steps, held as owned slices, 1/W per rank."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from distcl.parallel.partition import Partition
from distcl.parallel.sliced_state import SavedSlices

Held = dict[str, dict[str, torch.Tensor]]
"""What is held of a model: ``weights``, this rank's slices, and ``buffers``, whole."""


class WeightAverage:
    """The mean of the weights after each step of a round, which the model has between rounds.

    Of weights w_1 … w_n, ``decay`` d > 0 makes  m = (1 - d) Σ d^(n-k) w_k / (1 - d^n),  an
    exponential moving average without the bias towards its beginning (Kingma & Ba 2015, section 3);
    ``uniform`` makes Σ w_k / n (SWA, Izmailov et al. 2018). Neither: there is no mean, and every
    method does nothing. Floating-point buffers (the statistics of BatchNorm) have the same mean.

    A round trains on from the weights that the last one ended with, not from their mean: the model
    has either, and the other one is held here, so that it costs 1/W of the weights per rank.
    """

    def __init__(self, partition: Partition, decay: float = 0.0, uniform: bool = False) -> None:
        self._partition = partition
        self._decay = decay
        self.on = uniform or decay > 0
        self._steps = 0
        """Of the round whose weights the mean is of."""
        self._other: Held = {}
        """The mean; while it is shown, what the last round ended with. Empty: there is no mean."""
        self._shown = False
        self._kept: Held | None = None

    def update(self) -> None:
        """Take the weights after one more step into the mean. Local."""
        if not self.on:
            return
        self._steps += 1
        now = self._now()
        if self._steps == 1:
            self._other = {
                kind: {n: _wide(t) for n, t in held.items()} for kind, held in now.items()
            }
            return
        d, n = self._decay, self._steps
        weight = (1 - d) / (1 - d**n) if d else 1 / n
        with torch.no_grad():
            for kind, held in self._other.items():
                if held:
                    new = [now[kind][name].to(mean.dtype) for name, mean in held.items()]
                    torch._foreach_lerp_([*held.values()], new, weight)

    def show(self) -> None:
        """Weights and buffers <- the mean, if there is one, until :meth:`hide`. Collective."""
        if self._other and not self._shown:
            self._exchange()

    def hide(self) -> None:
        """Weights and buffers <- what the last round ended with, bit for bit. Collective."""
        if self._shown:
            self._exchange()

    def begin_round(self) -> None:
        """Begin a new mean with the next step; weights as by :meth:`hide`. Collective."""
        self.hide()
        self._steps = 0

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Compute with the mean inside the context. Collective; a failure ends the run."""
        self.show()
        yield
        self.hide()

    def keep(self) -> None:
        """Keep the mean that there is at the start of a round, for :meth:`put_back`. Local."""
        self._kept = self._other

    def put_back(self) -> None:
        """The mean <- the one that was kept. Local."""
        self._other = self._kept or {}

    def forget(self) -> None:
        """Keep no other mean any more. Local."""
        self._kept = None

    def _now(self) -> Held:
        return {"weights": self._partition.trainable(), "buffers": self._partition.moving()}

    def _exchange(self) -> None:
        self._partition.sync_buffers()  # each rank saw its own samples
        before = {kind: {n: t.detach().clone() for n, t in held.items()}
                  for kind, held in self._now().items()}  # fmt: skip
        self._partition.put(self._other["weights"])
        with torch.no_grad():
            for name, buffer in self._partition.moving().items():
                buffer.copy_(self._other["buffers"][name])
        self._partition.sync_buffers()
        self._other, self._shown = before, not self._shown

    def state_dict(self) -> dict[str, Any]:
        """Return this rank's slices (not copies) and buffers."""
        return {
            "steps": self._steps,
            "shown": self._shown,
            "other": self._other,
            "kept": self._kept,
        }

    def load_slices(self, saved: SavedSlices) -> None:
        """Restore my slices of what was saved on any number of ranks. Local."""
        state = saved.own or saved.states[0]
        self._steps, self._shown = state["steps"], state["shown"]
        self._other = self._mine(saved, state["other"], "other")
        self._kept = None if state["kept"] is None else self._mine(saved, state["kept"], "kept")

    def _mine(self, saved: SavedSlices, held: Held, key: str) -> Held:
        """Return my slices of what is held under ``key``, and its buffers. Local.

        On another number of ranks these are the mean of those that the ranks had.
        """
        if not held:
            return {}
        every = [held] if saved.own is not None else [state[key] for state in saved.states]
        buffers = {
            name: torch.stack([h["buffers"][name] for h in every]).mean(0).to(now.device)
            for name, now in self._partition.moving().items()
        }
        weights = {n: t.clone() for n, t in saved.cut(key, "weights").items()}
        return {"weights": self._partition.placed(weights), "buffers": buffers}


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    """Return a copy, of at least 32 bits a number."""
    wide = torch.promote_types(tensor.dtype, torch.float32)
    return tensor.detach().to(wide, copy=True)
