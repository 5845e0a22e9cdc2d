"""Parameters that do not train (``model.freeze``), and norms that stay as they are."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from distcl.errors import ConfigError
from distcl.registry import nearest


def freeze(model: nn.Module, patterns: Sequence[str]) -> None:
    """Make parameters whose name matches a pattern take no gradients. Local.

    Patterns are as of files (``encoder.*``). A tied weight is frozen under any of its names. A norm
    with running statistics that match (BatchNorm: ``encoder.norm.running_mean``) stays in eval
    mode: it computes with these, and leaves them as they are; of others they go on, also where its
    weights are frozen.

    Raises ConfigError for a pattern that matches neither, and if no parameter is left to train.
    """
    if not patterns:
        return
    parameters = dict(model.named_parameters(remove_duplicate=False))
    norms = {
        f"{name}.running_mean".lstrip("."): module
        for name, module in model.named_modules()
        if isinstance(module, _NormBase) and module.running_mean is not None
    }
    names = [*parameters, *norms]
    for pattern in patterns:
        found = {name for name in names if fnmatchcase(name, pattern)}
        if not found:
            parts = [f"{name}.*" for name, m in model.named_modules() if name and [*m.parameters()]]
            near = nearest(pattern, [*parts, *names])
            raise ConfigError(
                f"model.freeze: '{pattern}' matches no parameter of the model{near or _some(names)}"
            )
        for name in found & parameters.keys():
            parameters[name].requires_grad_(False)
        for name in found & norms.keys():
            stay_in_eval_mode(norms[name])
    if not any(p.requires_grad for p in parameters.values()):
        raise ConfigError(
            f"model.freeze = {list(patterns)} leaves no parameter to train; leave out a pattern, "
            "or use continual_learning.update_mode = 'none' without it"
        )


def _some(names: Sequence[str]) -> str:
    return f"; it has {', '.join(names[:3])}{' and more' if len(names) > 3 else ''}"


def stay_in_eval_mode(module: nn.Module) -> None:
    """Make ``train()`` do nothing to a module, which is in eval mode from now on. Local."""
    module.eval()
    module.train = lambda mode=True: module  # type: ignore[method-assign]


def stays_in_eval_mode(module: nn.Module) -> bool:
    """Tell whether :func:`stay_in_eval_mode` was called for a module. Local."""
    return "train" in vars(module)
