"""The state of an optimizer by name of parameter, whatever tensors it steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

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


class SteppedParameters:
    """A partition and its optimizer. ``_spans``: where in each parameter my slice lies."""

    _spans: dict[str, tuple[int, int]]

    def _stepped(self) -> dict[str, Stepped]:
        """Return what the optimizer steps, by name of parameter. Local."""
        raise NotImplementedError

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
