"""A model as the configuration names it: made, given its weights, and checked."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from copy import deepcopy
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from distcl import registry
from distcl.config import ModelConfig
from distcl.errors import CheckpointError, ConfigError
from distcl.models import reference
from distcl.models.freezing import freeze
from distcl.models.lora import ADAPTER_KEY, add_lora
from distcl.models.transformers import PREFIX, create_transformer
from distcl.models.weights import WeightsFile, check_fit, tensor_spec
from distcl.registry import nearest
from distcl.types import DataSpec, PyTree

log = logging.getLogger("distcl")


def create_model(config: ModelConfig, spec: DataSpec, seed: int, x: PyTree = None) -> nn.Module:
    """Build the configured model on the CPU, in float32. Local; equal on every rank.

    A factory is called as ``factory(spec, **options)``; of a module there is made a copy;
    ``timm:NAME`` is a model of the package
    timm, ``hf:AutoModelFor…`` one of transformers. Weights depend on ``seed`` alone and the global
    random numbers are left as they were. Then ``model.pretrained``, if given, is loaded, adapters
    of ``model.lora`` are added, and what ``model.freeze`` names is frozen.

    ``x``: inputs [B, ...] on the CPU, equal on every rank, of which lazy modules learn their
    shapes; without, they stay lazy.

    Where the model returns something with ``logits`` (a ModelOutput, a named tuple, a dict), its
    outputs are those logits.

    Raises ConfigError if the factory does not take an option or returns no module, if there is no
    such file, or no such package, if a lazy module is not used, if a pattern of ``model.freeze``
    matches nothing or nothing is left to train; CheckpointError if the file does
    not hold finite weights for this model.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        if config.name.startswith("timm:"):
            model = _timm(config.name.removeprefix("timm:"), spec, config.options)
        elif config.name.startswith(PREFIX):
            name = config.name.removeprefix(PREFIX)
            model = create_transformer(name, spec, config.options)
        else:
            model = _made(config, spec)
        if not isinstance(model, nn.Module):
            raise ConfigError(
                f"model '{config.name}' must return a torch.nn.Module, not {type(model).__name__}"
            )
        if x is not None:
            _make_real(model, config.name, x)
    if type(model).__module__ != reference.__name__:
        model.register_forward_hook(_logits_alone)
    path = Path(config.pretrained)
    adapted = bool(config.pretrained) and ADAPTER_KEY in _opened(path).header
    if adapted and not config.lora:
        raise ConfigError(f"model.pretrained = '{path}' has adapters: it needs the same model.lora")
    if config.pretrained and not adapted:
        load_pretrained(model, path, config.pretrained_skip)
    if config.lora:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            add_lora(model, config)
    if adapted:
        load_pretrained(model, path, config.pretrained_skip)
    freeze(model, config.freeze)
    return model


def _made(config: ModelConfig, spec: DataSpec) -> Any:
    """Return what a factory makes, or a copy of a module that is there, which stays as it is."""
    found = registry.resolve("model", config.name)
    if not isinstance(found, nn.Module):
        return registry.create("model", config.name, spec, options=config.options)
    if config.options:
        raise ConfigError(f"model.options are for a factory, but '{config.name}' is made already")
    try:
        return deepcopy(found).cpu()
    except RuntimeError as error:  # a tensor that is the result of others has no copy
        raise ConfigError(
            f"model '{config.name}' cannot be copied ({error}): give a function that makes one"
        ) from error


def _logits_alone(module: nn.Module, args: Any, outputs: Any) -> Any:
    """Return the logits of what a model returned; what has none is left as it is."""
    if isinstance(outputs, torch.Tensor):
        return outputs
    held = outputs.get("logits") if isinstance(outputs, Mapping) else None
    logits = getattr(outputs, "logits", None) if held is None else held
    return outputs if logits is None else logits


def _make_real(model: nn.Module, name: str, x: PyTree) -> None:
    """Give lazy modules (nn.LazyLinear and its like) their weights, by a forward in eval mode."""

    def lazy() -> list[str]:
        both = (*model.named_parameters(), *model.named_buffers())
        return [n for n, tensor in both if is_lazy(tensor)]

    if not lazy():
        return
    modes = [(module, module.training) for module in model.modules()]
    with torch.no_grad():
        model.eval()(x)
    for module, mode in modes:
        module.training = mode
    if left := lazy():
        raise ConfigError(
            f"model '{name}': a forward does not use the lazy module that has '{left[0]}', so its "
            "shape is not known; give it one, or leave it out"
        )


def _timm(name: str, spec: DataSpec, options: dict[str, Any]) -> Any:
    """Return timm's model for the stream's images and outputs; ``options`` go to its factory."""
    if len(spec.x_shape) != 3:
        raise ConfigError(
            f"model 'timm:{name}' takes images [C, H, W], but a sample of this stream has shape "
            f"{list(spec.x_shape)}"
        )
    try:
        import timm
    except (ImportError, RuntimeError) as error:  # RuntimeError: torchvision of another torch
        raise ConfigError(
            f"model 'timm:{name}' needs the package 'timm', which cannot be imported ({error}); "
            "type: pip install timm"
        ) from error
    if not timm.is_model(name):
        raise ConfigError(f"timm has no model '{name}'{nearest(name, timm.list_models())}")
    keys = {"num_classes": spec.outputs, "in_chans": spec.x_shape[0], **options}
    try:
        return timm.create_model(name, **keys)
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        raise ConfigError(f"model 'timm:{name}' with {options}: {error}") from error


def _opened(path: Path) -> WeightsFile:
    if path.suffix != ".safetensors":
        raise ConfigError(f"model.pretrained must be a .safetensors file, not '{path}'")
    try:
        return WeightsFile(path)
    except FileNotFoundError as error:
        raise ConfigError(f"model.pretrained: there is no file '{path}'") from error
    except OSError as error:
        raise ConfigError(f"model.pretrained: cannot read '{path}': {error.strerror}") from error


def load_pretrained(model: nn.Module, path: Path, skip: Sequence[str] = ()) -> None:
    """Fill parameters and buffers from a safetensors file, all of them or none. Local.

    Tied weights may be there under one of their names. Tensors whose name matches a pattern of
    ``skip`` (as of files: ``head.*``) are left as they are, and named in the log. Raises
    ConfigError if there is no such file, if it is of another kind (pickled files are never read),
    or a pattern matches nothing; CheckpointError naming file and key if it is damaged, lacks or
    adds a tensor, or one has another shape, kind or is not finite.
    """
    file = _opened(path)
    own = model.state_dict()
    names = own.keys() | file.specs.keys()
    for pattern in skip:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ConfigError(
                f"model.pretrained_skip: '{pattern}' matches nothing in the model or '{path}'"
            )
    left = {name for name in names if any(fnmatchcase(name, pattern) for pattern in skip)}
    saved = {name: spec for name, spec in file.specs.items() if name not in left}
    wanted = {name: tensor for name, tensor in own.items() if name not in left}
    if not saved:
        raise ConfigError(f"model.pretrained_skip leaves nothing of '{path}' to load")
    present = {own[name].data_ptr() for name in own.keys() & saved.keys()}
    specs = {name: tensor_spec(tensor) for name, tensor in wanted.items()}
    check_fit(path, saved, specs, lambda name: wanted[name].data_ptr() not in present)
    loaded = {name: file.read(name).view(spec.shape) for name, spec in saved.items()}
    first: dict[int, str] = {}
    for name, tensor in loaded.items():
        if not torch.isfinite(tensor).all():
            raise CheckpointError(f"'{path}': '{name}' holds NaN or infinite weights")
        tied = first.setdefault(own[name].data_ptr(), name)
        if own[tied].shape == tensor.shape and not torch.equal(tensor, loaded[tied]):
            raise CheckpointError(
                f"'{path}': '{tied}' and '{name}' differ, but the model ties them"
            )
    model.load_state_dict(loaded, strict=False)  # names were checked above
    if left:
        log.info(
            "[model] of '%s', model.pretrained_skip leaves out %s", path, ", ".join(sorted(left))
        )
