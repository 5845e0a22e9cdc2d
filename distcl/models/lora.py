"""Low-rank adapters (LoRA; Hu et al., ICLR 2022), of the package peft: ``model.lora``.

They are put into the model, which stays what it is: parameters keep their names, but for
``base_layer`` in those of a layer that has an adapter. Base weights are frozen, and norms compute
with their running statistics, so that the adapter alone is what a run has learned.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from distcl.config import ModelConfig
from distcl.config.learning import LoraOptions
from distcl.config.paths import reachable
from distcl.errors import ConfigError
from distcl.models.freezing import stay_in_eval_mode
from distcl.registry import nearest

ADAPTER_KEY = "peft_adapter_config"
"""Under it, a weights file has the configuration of the adapter inside, as JSON, in its header."""

_TASKS = {"ForCausalLM": "CAUSAL_LM", "ForSequenceClassification": "SEQ_CLS"}
_TASKS |= {"ForTokenClassification": "TOKEN_CLS"}
_HEADS = ("score", "classifier")
"""What peft trains whole in models of classes: their heads, which are new."""
_PREFIX = "base_model.model."


def add_lora(model: nn.Module, config: ModelConfig) -> None:
    """Put adapters into the layers that ``model.lora`` targets, and freeze the rest. Local.

    ``targets`` are names of Linear and Conv2d layers as peft takes them, whole or their last parts
    (``attn.c_attn``), or patterns; none: every linear layer but the output embeddings and what
    trains whole. ``train``: modules, named alike, that train whole; heads of classes of
    transformers' models do so anyway.

    Raises ConfigError if peft cannot be imported, and for a name that matches nothing.
    """
    try:
        import peft
    except (ImportError, RuntimeError) as error:
        raise ConfigError(
            f"model.lora needs the package 'peft', which cannot be imported ({error}); "
            "type: pip install 'distcl[transformers]'"
        ) from error
    options = LoraOptions.of(config.lora)
    modules = {name: m for name, m in model.named_modules() if name}
    task = next((t for end, t in _TASKS.items() if config.name.endswith(end)), None)
    heads = [n for n in _HEADS if n in modules and task in ("SEQ_CLS", "TOKEN_CLS")]
    train = list(dict.fromkeys([*heads, *options.train]))
    whole = _matching(train, modules, "train", "module")
    inside = {n for n in modules if any(n == w or n.startswith(f"{w}.") for w in whole)}
    layers = {n: m for n, m in modules.items() if _takes_adapters(n, m, modules)}
    if options.targets:
        chosen = _matching(options.targets, layers, "targets", "Linear or Conv2d layer")
        if twice := chosen & inside:
            raise ConfigError(f"model.lora: '{min(twice)}' is in targets and in what trains whole")
    else:
        output = getattr(model, "get_output_embeddings", lambda: None)()
        left = {n for n, m in layers.items() if isinstance(m, nn.Conv2d) or m is output} | inside
        chosen = layers.keys() - left
        if not chosen:
            raise ConfigError(f"model.lora: model '{config.name}' has no linear layer to adapt")
    _refuse_tied(model, {n: modules[n] for n in whole})
    base = str(config.options.get("path", "")) if config.name.startswith("hf:") else ""
    lora = peft.LoraConfig(
        r=options.r,
        lora_alpha=options.alpha,
        lora_dropout=options.dropout,
        target_modules=_shortened(chosen, modules),
        fan_in_fan_out=all(type(layers[name]).__name__ == "Conv1D" for name in chosen),
        task_type=task,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of layers whose weights are the other way round
        peft.inject_adapter_in_model(lora, model)
    for name in whole:
        model.get_submodule(name).requires_grad_(True)
    for name, module in modules.items():
        if isinstance(module, _NormBase) and name not in inside and module.running_mean is not None:
            stay_in_eval_mode(module)
    lora.modules_to_save = train or None
    if base and not config.pretrained:
        local = reachable(base)
        lora.base_model_name_or_path = str(local) if local.exists() else base


def _takes_adapters(name: str, module: nn.Module, modules: Mapping[str, nn.Module]) -> bool:
    if isinstance(modules.get(name.rpartition(".")[0]), nn.MultiheadAttention):
        return False  # it does not call its layers as modules
    return isinstance(module, nn.Linear | nn.Conv2d) or type(module).__name__ == "Conv1D"


def _matching(wanted: Sequence[str], known: Iterable[str], key: str, what: str) -> set[str]:
    """Return the names in ``known`` that a wanted one, or its pattern, is the end of."""
    found: set[str] = set()
    for text in wanted:
        mine = {n for n in known if n == text or n.endswith(f".{text}") or fnmatchcase(n, text)}
        if not mine:
            ends = dict.fromkeys(n.rpartition(".")[2] for n in known)
            near = nearest(text, [*ends, *known]) or f"; it has {', '.join(list(ends)[:5])}"
            raise ConfigError(f"model.lora.{key}: the model has no {what} '{text}'{near}")
        found |= mine
    return found


def _shortened(chosen: set[str], modules: Iterable[str]) -> list[str]:
    """Return the last parts of the chosen names, where no other module has one."""
    ends = {name.rpartition(".")[2] for name in chosen}
    same = {name for name in modules if name.rpartition(".")[2] in ends}
    return sorted(ends if same == chosen else chosen)


def _refuse_tied(model: nn.Module, whole: Mapping[str, nn.Module]) -> None:
    """Raise ConfigError for a module that would train weights of another, which are frozen."""
    for name, module in whole.items():
        own = {id(p) for p in module.parameters()}
        for other, p in model.named_parameters(remove_duplicate=False):
            if id(p) in own and not other.startswith(f"{name}."):
                raise ConfigError(
                    f"model.lora.train: '{name}' shares its weights with '{other}', so it cannot "
                    "train alone"
                )


def adapter_header(model: nn.Module) -> dict[str, str]:
    """Return what the header of a weights file says of the model's adapter; {} without one."""
    config: Any = dict(getattr(model, "peft_config", {})).get("default")
    if config is None or "LORA" not in str(config.peft_type):
        return {}
    about = {**config.to_dict(), "inference_mode": True}
    return {ADAPTER_KEY: json.dumps(about, indent=2, sort_keys=True, default=sorted)}


def split_adapter(
    names: Iterable[str], about: Mapping[str, Any]
) -> tuple[dict[str, str], dict[str, str]]:
    """Return which tensors of a model make peft's adapter, and which its base model. Local.

    Both: name there -> one of ``names``. ``about``: the adapter's configuration.
    """
    trained = [str(end) for end in about.get("modules_to_save") or ()]
    adapter: dict[str, str] = {}
    base: dict[str, str] = {}
    for name in names:
        plain = name.removeprefix(_PREFIX)
        short = re.sub(r"\.(lora_\w+|modules_to_save)\.default\b", r".\1", plain)
        short = short.replace(".modules_to_save.", ".")
        if ".lora_" in short:
            adapter[_PREFIX + short] = name
        elif ".original_module." in short:
            base[short.replace(".original_module.", ".")] = name
        else:
            module = f".{short.rpartition('.')[0]}."
            if any(f".{end}." in module for end in trained):
                adapter[_PREFIX + short] = name
            base.setdefault(short.replace(".base_layer.", "."), name)
    return adapter, base
