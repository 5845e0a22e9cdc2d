"""A look at what the user brings, before anything is trained: the dry run.

Two samples of the stream, then one, go through model, loss and signal on every rank, as they will
in scoring and in training; a rank without samples trains on none, which a stand-in is for. What
could not work is told at once, by name, and on all ranks. Nothing is left behind: no gradient, no
buffer, no random number, no count.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from distcl import registry
from distcl.config import Config
from distcl.distributed.failure import PeerFailure, cause_of
from distcl.distributed.runtime import Runtime
from distcl.errors import ConfigError, DistclError, line_of_theirs, named
from distcl.losses import unreduced
from distcl.parallel.inference import evaluating
from distcl.priority.scoring import score_of_each
from distcl.training.scores import Score
from distcl.types import (
    Batch,
    Outputs,
    PrioritySignal,
    PyTree,
    Stream,
    UnreducedLoss,
    info_of,
)
from distcl.updaters.jvp_reg import buffers_kept

log = logging.getLogger("distcl")

_SHARDED = ("zero3", "fsdp2")


class DryRun:
    """What is found out of a model, loss and signal. Making one reads two samples; local.

    ``criterion`` and ``signal`` (None if nothing is scored) are of this look alone: they may count
    what they are asked. ``x``: the inputs, on the CPU, or None if the stream has no samples;
    ``unused``: parameters that got no gradient in one of the forwards; ``alone``: why the model
    cannot train on one sample, or "".
    """

    def __init__(
        self,
        config: Config,
        runtime: Runtime,
        stream: Stream,
        criterion: UnreducedLoss,
        signal: PrioritySignal | None,
        scores: Mapping[str, Score] | None = None,
    ) -> None:
        self._config = config
        self._runtime = runtime
        self._criterion = criterion
        self._signal = signal
        self._scores = scores or {}
        self._sharded = runtime.strategy.name in _SHARDED
        self._name = config.model.name
        self._batch = _two(stream)
        self.x: PyTree = None
        if self._batch is not None:
            self.x = self._batch.to(torch.device("cpu"), torch.float32).x
            self._batch = self._batch.to(runtime.device, runtime.dtype)
        self.unused: list[str] = []
        self.alone = ""
        self._failure: Exception | None = None

    @property
    def stand_in(self) -> PyTree:
        """The inputs [1, ...] of one sample, on the device, or None."""
        return None if self._batch is None else self._batch.part(0, 2).x

    def before(self, model: nn.Module) -> None:
        """Look at a model that is not yet prepared for training. Collective.

        Raises ConfigError naming a tensor of a dtype that would not stay; what else is wrong is for
        :meth:`conclude` to tell.
        """
        _refuse_dtypes(model, self._runtime.dtype)
        if not any(p.requires_grad for p in model.parameters()):
            raise ConfigError(f"model '{self._name}' has no parameter that takes gradients")
        if self._sharded:
            return
        model.to(self._runtime.device, self._runtime.dtype)
        self._failure = together(self._runtime, lambda: self._look(model))
        if self.unused and self._runtime.is_main:
            log.info(
                f"[dry run] no gradient reaches {', '.join(self.unused)} in some forwards; where "
                "none does, nothing but weight decay may move them"
            )

    def after(self, model: nn.Module) -> None:
        """Look at a prepared model whose weights are sharded; settle any other. Collective.

        Raises as :meth:`conclude`.
        """
        if self._batch is None or self._failure is not None:
            return
        if self._sharded:
            self._look(model)
            return
        with untouched(self._runtime.strategy.unwrap(model), self._runtime.device):
            model.train()
            self._runtime.strategy.settle(model, self._batch.x)

    def conclude(self) -> None:
        """Raise what :meth:`before` found: a part's own refusal, which may say more, comes first.

        ConfigError naming what cannot work, or whatever the user's code raised; where only other
        ranks have found it, PeerFailure. Local.
        """
        if self._failure is not None:
            raise self._failure

    # -- one look ------------------------------------------------------------------------------

    def _look(self, model: nn.Module) -> None:
        """Take all forwards; training first, so that what a model caches may take gradients.

        Where weights are sharded, forwards are collective, none has a gradient, and none is risked
        that may be cut short.
        """
        if self._batch is None:
            return
        module = self._runtime.strategy.unwrap(model)
        grad = _trains(self._config) and not self._sharded
        one = self._batch.part(0, 2)
        with untouched(module, self._runtime.device), evaluating(model):
            model.train()
            with torch.set_grad_enabled(grad), _lone_channels(module) as lone:
                outputs, losses = self._forward(model, self._batch)
            if grad:
                self._gradients(module, outputs, losses)
            if lone:
                self.alone = f"BatchNorm '{lone[0]}' cannot train on one sample"
            elif not self._sharded:
                self.alone = self._why_not_alone(model, one, losses)
            model.eval()
            if grad:  # the forward of a rank without samples
                self._gradients(module, *self._forward(model, one))
            for batch in (self._batch, one):
                with torch.no_grad() if self._sharded else torch.inference_mode():
                    outputs, losses = self._forward(model, batch)
                    self._score(batch, Outputs(losses, outputs))
                    self._measure(batch, Outputs(losses, outputs))

    def _forward(self, model: nn.Module, batch: Batch) -> tuple[PyTree, torch.Tensor]:
        """Return outputs and losses of a batch, once both are what they must be."""
        n = len(batch)
        given = f"{n} samples, {_form(batch.x)}" if n > 1 else f"one sample, {_form(batch.x)}"
        with self._runtime.strategy.autocast():
            with _naming(f"model '{self._name}' fails on {given}"):
                outputs = model(batch.x)
            for leaf in tree_leaves(outputs):
                if not isinstance(leaf, torch.Tensor) or leaf.shape[:1] != (n,):
                    raise ConfigError(
                        f"model '{self._name}' returned {_form(outputs)} for {given}; it must "
                        "return a tensor [B, ...], something that has one as 'logits', or, for a "
                        "loss of your own, a dict or tuple of them"
                    )
            name = self._config.model.loss
            one = isinstance(outputs, torch.Tensor)
            if not one and name.count(":") == 0:
                raise ConfigError(
                    f"model '{self._name}' returned {_form(outputs)}, of which model.loss = "
                    f"'{name}' does not know what to take: return one tensor, or name it 'logits'"
                )
            with _naming(
                f"model.loss = '{name}' fails on outputs {_form(outputs)} and targets "
                f"{_form(batch.y)}"
            ):
                losses = unreduced(self._criterion(outputs, batch.y), n, f"model.loss = '{name}'")
        if not losses.is_floating_point():
            raise ConfigError(f"model.loss = '{name}' returned {losses.dtype}; numbers are needed")
        return outputs, losses

    def _score(self, batch: Batch, now: Outputs) -> None:
        if (signal := self._signal) is None:
            return
        older = (now,) * (getattr(signal, "anchors", 1) - 1)
        anchor = Outputs(now.loss, now.logits, older) if signal.needs_anchor else None
        online = self._config.priority.source == "online"
        if online and not getattr(signal, "needs_inputs", True):
            batch = Batch(batch.ids, None, batch.y, batch.total)
        with _naming(f"priority.signal = '{self._config.priority.signal}' fails"):
            score_of_each(signal, signal.score(batch, now, anchor), len(batch))

    def _measure(self, batch: Batch, outputs: Outputs) -> None:
        """Try the rows of all scores."""
        for name, score in self._scores.items():
            with _naming(f"model.score = '{name}' fails on outputs {_form(outputs.logits)}"):
                rows = score.rows(outputs, batch.y)
            if (
                not isinstance(rows, torch.Tensor)
                or rows.ndim != 2
                or len(rows) != len(batch)
                or rows.is_complex()
            ):
                raise ConfigError(
                    f"model.score = '{name}' made rows {_form(rows)} of {len(batch)} samples; they "
                    "must be real numbers [B, K]"
                )

    def _gradients(self, module: nn.Module, outputs: PyTree, losses: torch.Tensor) -> None:
        """Note which parameters, and which outputs, get no gradient."""
        if not losses.requires_grad:
            raise ConfigError(
                f"the loss has no gradient: model '{self._name}' or model.loss = "
                f"'{self._config.model.loss}' detaches what it returns, or computes it without"
            )
        weights = {n: p for n, p in module.named_parameters() if p.requires_grad}
        leaves, _ = tree_flatten(outputs)
        tracked = [k for k, leaf in enumerate(leaves) if leaf.requires_grad]
        wanted = [*weights.values(), *(leaves[k] for k in tracked)]
        with _naming(f"the backward pass of model '{self._name}' fails"):
            grads = torch.autograd.grad(losses.sum(), wanted, allow_unused=True)
        missing = {n for n, g in zip(weights, grads, strict=False) if g is None}
        self.unused = [n for n in weights if n in missing or n in self.unused]
        idle = [k for k, g in zip(tracked, grads[len(weights) :], strict=True) if g is None]
        if idle and not isinstance(outputs, torch.Tensor):  # DDP would wait for their gradients
            module.register_forward_hook(_detaching(idle))

    def _why_not_alone(self, model: nn.Module, one: Batch, losses: torch.Tensor) -> str:
        """Return why a training forward of one sample does not work, as that of two did."""
        try:
            _, loss = self._forward(model, one)
        except Exception as error:  # whatever a user's model raises
            return f"the model cannot train on one ({named(error)})"
        if losses.isfinite().all() and not loss.isfinite().all():
            return "the loss is not finite when the model trains on one"
        return ""


def together(runtime: Runtime, look: Callable[[], None]) -> Exception | None:
    """Return what ``look``, which is local, raised on this rank, else on another. Collective."""
    raised: Exception | None = None
    try:
        look()
    except Exception as error:  # whatever a user's part raises
        raised = error
    own = None if raised is None else cause_of(raised, runtime.rank)
    causes = [cause for cause in runtime.gather_objects(own) if cause is not None]
    return raised or (PeerFailure(causes[0]) if causes else None)


@contextmanager
def untouched(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Put the module's buffers and all global random numbers back at the end. Local."""
    plain, numpy = random.getstate(), np.random.get_state()
    devices = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices), buffers_kept(module):
            yield
    finally:
        random.setstate(plain)
        np.random.set_state(numpy)


def _two(stream: Stream) -> Batch | None:
    """Return the first two training samples there are; one twice, if there is one. Local."""
    ids = next((e.train[:2] for e in stream.experiences if len(e.train)), None)
    if ids is None:
        return None
    ids = np.asarray(ids, dtype=np.int64)
    replaced = info_of(stream).replaced
    before = set(replaced)
    batch = stream.read(ids)
    if len(ids) == 1:
        batch = batch.joined(batch)
    replaced.intersection_update(before)  # what is skipped is noted where it is used
    return batch


def _trains(config: Config) -> bool:
    updater = registry.resolve("updater", config.continual_learning.update_mode)
    return bool(getattr(updater, "trains", True))


def _refuse_dtypes(model: nn.Module, dtype: torch.dtype) -> None:
    """Raise ConfigError naming a parameter or buffer whose values ``dtype`` would not hold."""
    kinds = (("parameter", model.named_parameters()), ("buffer", model.named_buffers()))
    for kind, tensors in kinds:
        for name, tensor in tensors:
            what = f"the model's {kind} '{name}' is {str(tensor.dtype).removeprefix('torch.')}"
            if tensor.is_complex():
                raise ConfigError(
                    f"{what}, and would lose its imaginary part; keep it as two real numbers, with "
                    "torch.view_as_real, and use torch.view_as_complex in forward"
                )
            cut = tensor.dtype == torch.float64 and tensor.to(dtype)
            if isinstance(cut, torch.Tensor) and (tensor.isfinite() & ~cut.isfinite()).any():
                raise ConfigError(
                    f"{what} and holds values beyond {str(dtype).removeprefix('torch.')}, in which "
                    "models compute; scale it, or set run.precision = 'fp64'"
                )


@contextmanager
def _naming(what: str) -> Iterator[None]:
    """Tell of an exception inside what failed, unless it is told by a line of the user's code."""
    try:
        yield
    except DistclError:
        raise
    except Exception as error:
        if line_of_theirs(error) is not None:
            raise
        raise ConfigError(f"{what}: {named(error)}") from error


@contextmanager
def _lone_channels(module: nn.Module) -> Iterator[list[str]]:
    """Give the BatchNorms in training mode that see one value per sample and channel inside."""
    found: list[str] = []

    def watch(name: str) -> Callable[..., None]:
        def see(norm: Any, args: tuple[torch.Tensor, ...]) -> None:
            if norm.training and args and args[0][0].numel() == args[0].shape[1]:
                found.append(name)

        return see

    norms = [(n, m) for n, m in module.named_modules() if isinstance(m, _BatchNorm)]
    handles = [m.register_forward_pre_hook(watch(n)) for n, m in norms]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _detaching(leaves: Sequence[int]) -> Callable[..., PyTree]:
    """Return a forward hook that takes the gradient from some of a model's outputs."""

    def detach(module: nn.Module, args: Any, outputs: PyTree) -> PyTree:
        found, tree = tree_flatten(outputs)
        return tree_unflatten(
            [leaf.detach() if k in leaves else leaf for k, leaf in enumerate(found)], tree
        )

    return detach


def _form(tree: Any) -> str:
    """Return what something is made of, in a few words: types, shapes, keys."""
    if isinstance(tree, torch.Tensor):
        return f"{str(tree.dtype).removeprefix('torch.')} {list(tree.shape)}"
    kind = type(tree).__name__
    if isinstance(tree, Mapping):
        return f"{kind} with {', '.join(f'{k}: {_form(v)}' for k, v in tree.items()) or 'no keys'}"
    if isinstance(tree, list | tuple):
        return f"{kind} of {len(tree)} ({', '.join(map(_form, tree))})"
    return kind
