"""State in slices: of the optimizer by parameter, and of whatever each rank has its own part of.

It is saved by each rank, and found again by name and place. So any layout on any number of ranks
can go on: who reads asks for elements [start, stop) of a tensor and gets them from whichever ranks'
files have them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch

from distcl.errors import CheckpointError

Fetch = Callable[[str, int, int], torch.Tensor]
"""(name, start, stop) -> those elements of a saved tensor, 1-D, on the CPU."""

PlainState = Mapping[str, Mapping[str, torch.Tensor]]
"""Parameter -> state key ("step") -> what does not have the parameter's shape."""


@dataclass(frozen=True, slots=True)
class OptimizerState:
    """An optimizer's state by name of parameter, of any layout.

    slices: state key ("exp_avg") -> this rank's slices; plain: see :data:`PlainState`.
    """

    slices: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)
    plain: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Stepped:
    """What an optimizer steps for a parameter on this rank.

    ``view``: of a tensor like ``tensor``, the elements of the parameter from ``start`` on, 1-D,
    live; they include this rank's slice.
    """

    tensor: torch.Tensor
    view: Callable[[torch.Tensor], torch.Tensor]
    start: int


class SteppedParameters(ABC):
    """A partition and its optimizer. ``_spans``: where in each parameter my slice lies."""

    _spans: dict[str, tuple[int, int]]

    @abstractmethod
    def _stepped(self) -> dict[str, Stepped]:
        """Return what the optimizer steps, by name of parameter. Local."""

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> OptimizerState:
        """Return my slices of the optimizer's state, not copied, and what is no slice. Local."""
        found = OptimizerState()
        for name, stepped in self._stepped().items():
            if stepped.tensor not in optimizer.state:
                continue
            plain = found.plain.setdefault(name, {})
            for key, value in optimizer.state[stepped.tensor].items():
                if value is None:
                    continue
                value = value if isinstance(value, torch.Tensor) else torch.as_tensor(value)
                if value.shape != stepped.tensor.shape or value.dim() == 0:
                    plain[key] = value
                elif name in self._spans:
                    start, stop = (at - stepped.start for at in self._spans[name])
                    found.slices.setdefault(key, {})[name] = stepped.view(value)[start:stop]
        return found

    def load_optimizer_state(
        self, optimizer: torch.optim.Optimizer, fetch: Mapping[str, Fetch], plain: PlainState
    ) -> None:
        """Restore the optimizer's state; ``fetch`` has a reader for each of its keys. Local.

        ``plain`` is what the saving ranks had in ``OptimizerState.plain``, put together.
        """
        made: dict[torch.Tensor, dict[str, Any]] = {}
        for name, stepped in self._stepped().items():
            if name not in plain:
                continue
            tensor = stepped.tensor
            if tensor not in made:
                made[tensor] = {key: value.clone() for key, value in plain[name].items()}
                made[tensor] |= {k: torch.zeros_like(tensor, requires_grad=False) for k in fetch}
                optimizer.state[tensor] = made[tensor]
            for key, read in fetch.items():
                view = stepped.view(made[tensor][key])
                if view.numel():
                    view.copy_(read(name, stepped.start, stepped.start + view.numel()))


Ranges = Mapping[str, Sequence[int]]
"""Name -> [start, stop) of the elements of a tensor that a rank owns."""


@dataclass(frozen=True, slots=True)
class SavedSlices:
    """What the ranks have saved of one part, in order of rank. Local; memory-mapped.

    ``saved_ranges``: what each of them owned; ``ranges``: what this one owns now; ``own``: this
    rank's state if there were as many ranks, else None.
    """

    path: Path
    states: list[Any]
    saved_ranges: list[Ranges]
    ranges: Ranges
    rank: int
    world_size: int

    @property
    def own(self) -> Any:
        """This rank's state if the run had as many ranks, else None."""
        return self.states[self.rank] if len(self.states) == self.world_size else None

    @property
    def same_layout(self) -> bool:
        """Whether :attr:`own` is of the slices that this rank owns now."""
        if self.own is None:
            return False
        saved = self.saved_ranges[self.rank]
        return {n: tuple(span) for n, span in saved.items()} == dict(self.ranges)

    def fetch(self, *keys: str | int) -> Fetch:
        """Return the reader of the slices under ``keys`` of the ranks' states."""
        parts = [*zip(self._under(keys), self.saved_ranges, strict=True)]

        def fetch(name: str, start: int, stop: int) -> torch.Tensor:
            out: torch.Tensor | None = None
            found = 0
            for slices, ranges in parts:
                if name not in slices:
                    continue
                data, at = slices[name], ranges[name][0]
                lo, hi = max(start, at), min(stop, at + data.numel())
                if lo < hi:
                    out = data.new_empty(stop - start) if out is None else out
                    out[lo - start : hi - start] = data[lo - at : hi - at]
                    found += hi - lo
            if out is None or found != stop - start:
                where = "/".join(str(k) for k in keys)
                raise CheckpointError(f"checkpoint '{self.path}' lacks {where} of '{name}'")
            return out

        return fetch

    def cut(self, *keys: str | int) -> dict[str, torch.Tensor]:
        """Return my slices of what lies under ``keys``, under the partition in force."""
        fetch = self.fetch(*keys)
        saved = {name for slices in self._under(keys) for name in slices}
        return {name: fetch(name, *span) for name, span in self.ranges.items() if name in saved}

    def _under(self, keys: tuple[str | int, ...]) -> list[dict[str, torch.Tensor]]:
        found = []
        for state in self.states:
            for key in keys:
                state = {} if isinstance(key, str) and key not in state else state[key]
            found.append(state)
        return found


@runtime_checkable
class SlicedStateful(Protocol):
    """What must survive a restart, and of which each rank has its own."""

    def state_dict(self) -> Any:
        """Return this rank's state: tensors and plain values. Called on every rank."""
        ...

    def load_slices(self, saved: SavedSlices) -> None:
        """Restore this rank's state from what all had. Called on every rank."""
        ...
