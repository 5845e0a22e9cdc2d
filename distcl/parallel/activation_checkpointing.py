"""Recomputing activations in the backward pass instead of keeping them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from distcl.errors import ConfigError


def checkpoint_blocks(model: nn.Module) -> int:
    """Make a model's blocks keep their inputs only, in training mode; return how many. Local.

    Blocks are what stands in the outermost ``nn.Sequential`` or ``nn.ModuleList`` and has modules
    of its own (a single layer keeps its input anyway). Chen et al. 2016, "Training deep nets with
    sublinear memory cost". Raises ConfigError if the model has none.
    """
    blocks = list(_blocks(model))
    if not blocks:
        raise ConfigError(
            f"parallel.activation_checkpointing: the model ({type(model).__name__}) has no blocks, "
            "that is modules with layers of their own inside an nn.Sequential or nn.ModuleList"
        )
    for block in blocks:
        block.forward = _recomputed(block, block.forward)
    return len(blocks)


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        if isinstance(module, nn.Sequential | nn.ModuleList) and list(child.children()):
            yield child
        else:
            yield from _blocks(child)


def _recomputed(block: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        if not block.training:  # scoring, evaluation, per-sample gradients
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    return run
