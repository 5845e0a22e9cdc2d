"""The optimizer, its learning rate within a round, its reset between rounds, and its state."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from distcl import registry
from distcl.config import OptimizerConfig
from distcl.config.learning import ParameterGroup
from distcl.errors import ConfigError
from distcl.parallel.partition import Partition
from distcl.parallel.sliced_state import SavedSlices
from distcl.registry import nearest


def create_optimizer(
    config: OptimizerConfig, params: Iterable[nn.Parameter], names: Sequence[str] = ()
) -> torch.optim.Optimizer:
    """Return the optimizer of the configuration over ``params``. Local.

    ``names``: of the parameters, in their order; ``optimizer.groups`` goes by them. A user's own is
    a function of the list of parameters. Raises ConfigError for a group that none is in, or an own
    one that is no optimizer of all parameters.
    """
    fused = config.fused or None  # None: torch decides
    what: Any = params
    if config.groups:
        what = parameter_groups(config, dict(zip(names, params, strict=True)))
    factory = registry.resolve("optimizer", config.name)
    if config.own:
        return _own(factory, config.name, list(params))
    options: dict[str, Any] = {"betas": tuple(config.betas)}
    if config.name == "sgd":
        options = {"momentum": config.momentum, "nesterov": config.nesterov}
    made: torch.optim.Optimizer = factory(
        what, lr=config.lr, weight_decay=config.weight_decay, fused=fused, **options
    )
    return made


def _own(
    factory: Callable[..., Any], name: str, params: list[nn.Parameter]
) -> torch.optim.Optimizer:
    """Return the optimizer that the user's function makes of exactly these parameters."""
    made = factory(params)
    if not isinstance(made, torch.optim.Optimizer):
        raise ConfigError(
            f"optimizer '{name}' must return a torch.optim.Optimizer, not {type(made).__name__}"
        )
    closure = inspect.signature(made.step).parameters.get("closure")
    if closure is not None and closure.default is closure.empty:
        raise ConfigError(
            f"optimizer '{name}': {type(made).__name__} steps by a closure, and gets none here"
        )
    held = {id(p) for group in made.param_groups for p in group["params"]}
    if held != {id(p) for p in params}:
        raise ConfigError(
            f"optimizer '{name}' has {len(held)} parameters, not the {len(params)} that it was "
            "given; model.freeze names those that are not to train"
        )
    return made


def parameter_groups(
    config: OptimizerConfig, parameters: Mapping[str, nn.Parameter]
) -> list[dict[str, Any]]:
    """Return torch's parameter groups, each with the ``names`` of what is in it. Local.

    The first group that matches a name has it; the last, if it is not empty, what none matches.
    """
    groups = [ParameterGroup.of(table) for table in config.groups]
    members: list[list[str]] = [[] for _ in (*groups, None)]
    for name in parameters:
        fits = (k for k, group in enumerate(groups) if fnmatchcase(name, group.pattern))
        members[next(fits, len(groups))].append(name)
    found = []
    for group, held in zip((*groups, None), members, strict=True):
        if group is not None and not held:
            taken = any(fnmatchcase(name, group.pattern) for name in parameters)
            why = "all that it matches are in groups before it"
            if not taken:
                why = f"it matches no parameter that trains{nearest(group.pattern, parameters)}"
            raise ConfigError(f"optimizer.groups: '{group.pattern}': {why}")
        if held:
            found.append({"params": [parameters[n] for n in held], "names": held})
        if group is not None:
            found[-1] |= group.model_dump(include={"lr", "weight_decay"}, exclude_none=True)
    return found


def rate_factor(config: OptimizerConfig, step: int, steps: int) -> float:
    """Return what to multiply the learning rate by at ``step`` (from 0) of a round of ``steps``.

    Warm-up w rises linearly from 1/warmup_steps to 1, which it reaches at the last of its steps,
    anew in every round. Decay d is 1 - step/steps (linear) or (1 + cos(π step/steps))/2 (cosine;
    Loshchilov & Hutter 2017, eq. 5): it begins at 1 and never reaches 0. With the floor
    f = min_lr/lr the factor is w (f + (1 - f) d).
    """
    warmup, floor, share = config.warmup_steps, config.min_lr / config.lr, step / steps
    factor = min(1.0, (step + 1) / warmup) if warmup else 1.0
    if config.decay == "none":
        return factor
    decay = 1.0 - share if config.decay == "linear" else (1.0 + math.cos(math.pi * share)) / 2
    return factor * (floor + (1.0 - floor) * decay)


def reset(optimizer: torch.optim.Optimizer) -> None:
    """Drop momenta, moments and step counts: as if it had never stepped; options stay. Local."""
    optimizer.state.clear()


def place_steps(optimizer: torch.optim.Optimizer) -> None:
    """Move loaded step counts to where torch keeps them: fused kernels count on the device. Local.

    As ``Optimizer.load_state_dict`` does; other kernels count on the CPU.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"] if group.get("fused") else ():
            state = optimizer.state.get(parameter, {})
            if "step" in state:
                state["step"] = state["step"].to(parameter.device)


class OptimizerSlices:
    """An optimizer's state by parameter, my slices of it: now and, if kept, as a round began."""

    def __init__(self, partition: Partition, optimizer: torch.optim.Optimizer) -> None:
        self._partition = partition
        self._optimizer = optimizer
        self._kept: dict[Any, Any] | None = None

    def keep(self) -> None:
        """Keep a copy of the state as it is. Local."""
        self._kept = {p: cloned(state) for p, state in self._optimizer.state.items()}

    def forget(self) -> None:
        """Let go of what is kept. Local."""
        self._kept = None

    def put_back(self) -> None:
        """Make the state what was kept, if any was, and forget it. Local."""
        self._exchange()
        self.forget()

    def _exchange(self) -> None:
        if self._kept is not None:
            now = dict(self._optimizer.state)
            self._optimizer.state.clear()
            self._optimizer.state.update(self._kept)
            self._kept = now

    def state_dict(self) -> dict[str, Any]:
        """Return what :meth:`load_slices` needs of each rank. Local."""
        now, kept = self._slices(), None
        if self._kept is not None:
            self._exchange()
            kept = self._slices()
            self._exchange()
        return {"now": now, "kept": kept}

    def _slices(self) -> dict[str, Any]:
        found = self._partition.optimizer_state(self._optimizer)
        return {"slices": found.slices, "plain": found.plain}

    def load_slices(self, saved: SavedSlices) -> None:
        """Restore my slices of what was saved on any number of ranks. Collective.

        The state of another kind of optimizer is left: this one begins anew.
        """
        self.forget()
        if saved.states[0]["kept"] is not None:
            self._optimizer.state.clear()
            self._load(saved, "kept")
            self._kept = dict(self._optimizer.state)
            self._optimizer.state.clear()
        self._load(saved, "now")

    def _load(self, saved: SavedSlices, which: str) -> None:
        states = [state[which] for state in saved.states]
        fetch = {key: saved.fetch(which, "slices", key) for s in states for key in s["slices"]}
        is_adam = "betas" in self._optimizer.param_groups[0]
        if fetch and ("exp_avg" in fetch) != is_adam:
            return
        plain = {name: values for s in states for name, values in s["plain"].items()}
        self._partition.load_optimizer_state(self._optimizer, fetch, plain)
        place_steps(self._optimizer)


def cloned(state: Any) -> Any:
    """Return a copy of a tree of tensors and plain values."""
    return tree_map_only(torch.Tensor, torch.Tensor.clone, state)
