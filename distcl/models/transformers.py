"""Models of the package transformers, with the stream's ids as inputs and logits as outputs.

They stay what they are, so parameters have the names that plain transformers knows: hooks turn a
batch's x into keywords, and outputs into their logits. They are never given labels: the loss is
computed by us, of each sample.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import nn

from distcl.config.paths import reachable
from distcl.errors import ConfigError
from distcl.models.lora import adapter_header
from distcl.registry import checked, nearest
from distcl.types import DataSpec, PyTree

log = logging.getLogger("distcl")

PREFIX = "hf:"
CONFIG_KEY = "transformers_config"
"""Under it, a weights file has the configuration of its model, as JSON, in its header."""

_OPTIONS = ("path", "config", "dtype", "attn_implementation", "gradient_checkpointing")
_LABELLED = ("ForSequenceClassification", "ForTokenClassification", "ForImageClassification")
_POOLED = "ForSequenceClassification"
_SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "cls_token_id")


def load_transformers(what: str) -> Any:
    """Import the package. Local. Raises ConfigError, saying ``what`` needs it, if it cannot."""
    try:
        import transformers
    except (ImportError, RuntimeError) as error:  # RuntimeError: torchvision of another torch
        raise ConfigError(
            f"{what} needs the package 'transformers', which cannot be imported ({error}); "
            "type: pip install 'distcl[transformers]'"
        ) from error
    return transformers


def create_transformer(name: str, spec: DataSpec, options: Mapping[str, Any]) -> nn.Module:
    """Return ``name``, an AutoModel class, made from a config or read from a folder. Local.

    ``options``: see :func:`_make`. Heads of classes get the stream's number of outputs; where the
    config says no other, the vocabulary has as many tokens as the stream. Weights are float32.

    Raises ConfigError if the package or class is missing, if options do not fit, or if the stream
    has tokens that the model has not.
    """
    transformers = load_transformers(f"model '{PREFIX}{name}'")
    known = [n for n in transformers.models.auto.__all__ if n.startswith("AutoModel")]
    if name not in known:
        raise ConfigError(f"transformers has no class '{name}'{nearest(name, known)}")
    for key in options:
        if key not in _OPTIONS:
            raise ConfigError(
                f"model '{PREFIX}{name}' has no option '{key}'{nearest(key, _OPTIONS)}"
            )
    with _quiet(transformers):
        model: Any = _make(transformers, name, spec, **options)
    vocabulary = getattr(model.config.get_text_config(), "vocab_size", None)
    if isinstance(vocabulary, int) and vocabulary < (needed := _tokens(name, spec)):
        raise ConfigError(
            f"model '{PREFIX}{name}' has a vocabulary of {vocabulary} tokens, but the stream has "
            f"tokens up to {needed - 1}; "
            + (
                f"its vocab_size must be {needed} or more"
                if options.get("config")
                else "use the model's own tokenizer (stream.options.tokenizer)"
            )
        )
    model.config.architectures = [type(model).__name__]
    if name.endswith(_POOLED):
        _give_padding(name, model.config.get_text_config())
    call = _Call(name, model)
    call.refuse_longer(spec.longest)
    model.register_forward_pre_hook(call, with_kwargs=True)
    made: nn.Module = model
    return made


@checked("model")
def _make(
    transformers: Any,
    name: str,
    spec: DataSpec,
    path: str = "",
    config: dict[str, Any] | None = None,
    dtype: Literal["float32"] = "float32",
    attn_implementation: str = "eager",
    gradient_checkpointing: bool = False,
) -> Any:
    """Return the model. path: a local folder, or a name on the hub.

    config: ``model_type`` and whatever else such a configuration has.

    dtype is that of the weights; ``run.precision`` says in which type they compute.
    attn_implementation: as transformers has it; "sdpa" is faster, but not every update mode and
    signal works with it. gradient_checkpointing: activations are made anew in the backward pass.
    """
    if bool(path) == bool(config):
        raise ConfigError(
            f"model '{PREFIX}{name}' needs {'only one of' if path else 'one of'} "
            "model.options.path, a folder or a name on the hub, and model.options.config, a table "
            "with model_type and sizes"
        )
    auto = getattr(transformers, name)
    labels = {"num_labels": spec.outputs} if name.endswith(_LABELLED) else {}
    if config:
        given = _config(transformers, name, spec, {**labels, **config})
    try:
        if config:
            model = auto.from_config(
                given, attn_implementation=attn_implementation, dtype=torch.float32
            )
        else:
            local = reachable(path)
            model = auto.from_pretrained(
                str(local) if local.exists() else path,
                attn_implementation=attn_implementation,
                dtype=torch.float32,
                **labels,
            )
        if gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
    except (OSError, ValueError, TypeError, ImportError, RuntimeError, AttributeError) as error:
        where = f"'{path}'" if path else "model.options.config"
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ConfigError(f"model '{PREFIX}{name}' of {where}: {reason[0]}") from error
    return model


def _config(transformers: Any, name: str, spec: DataSpec, given: dict[str, Any]) -> Any:
    """Return transformers' configuration object of the keys ``given``."""
    known = sorted(transformers.models.auto.configuration_auto.CONFIG_MAPPING_NAMES)
    kind = given.pop("model_type", None)
    if kind not in known:
        near = nearest(kind, known) if isinstance(kind, str) else ""
        raise ConfigError(f"model.options.config.model_type: transformers has no {kind!r}{near}")
    default = transformers.AutoConfig.for_model(kind)
    for key in given:
        if not hasattr(default, key):
            names = sorted([*default.to_dict(), *default.attribute_map])
            raise ConfigError(
                f"model.options.config: model type '{kind}' has no '{key}'{nearest(key, names)}"
            )
    if "vocab_size" not in given and hasattr(default, "vocab_size") and _tokens(name, spec):
        given["vocab_size"] = _tokens(name, spec)
    if name == "AutoModelForCausalLM" and getattr(default, "is_decoder", None) is False:
        given.setdefault("is_decoder", True)  # else it would see the tokens that it foretells
    size = given.get("vocab_size")
    for key in _SPECIAL:
        default_id = getattr(default, key, None)
        if size and isinstance(default_id, int) and default_id >= size:
            given.setdefault(key, None)
    try:
        return transformers.AutoConfig.for_model(kind, **given)
    except Exception as error:  # of several packages
        reason = " ".join(str(error).split())
        raise ConfigError(f"model.options.config: {reason}") from error


def _tokens(name: str, spec: DataSpec) -> int:
    """Return how many tokens the stream has, as far as is known; else 0."""
    targets = spec.classes if name == "AutoModelForCausalLM" and len(spec.y_shape) == 1 else 0
    return max(spec.tokens, targets)


def _give_padding(name: str, config: Any) -> None:
    """Give a classifier of texts, which may look for the last token before it, a padding token."""
    vocabulary = getattr(config, "vocab_size", None)
    if not isinstance(vocabulary, int) or getattr(config, "pad_token_id", None) is not None:
        return
    end = getattr(config, "eos_token_id", None)
    known = isinstance(end, int) and 0 <= end < vocabulary
    config.pad_token_id = end if known else vocabulary - 1
    log.info(
        f"[model] '{PREFIX}{name}' has no pad_token_id; it is token {config.pad_token_id}, "
        f"{'its eos_token_id' if known else 'the last of its vocabulary'}"
    )


class _Call:
    """A forward pre-hook: x, ids [B, T] or a dict of tensors, becomes the model's keywords.

    Where ``attention_mask`` is 0, ids become the model's own padding token: some models tell by the
    ids where a text ends, so what the stream or a joined batch has there must not matter.
    """

    def __init__(self, name: str, model: Any) -> None:
        from inspect import signature

        known = signature(model.forward).parameters
        self._name = name
        self._always = {"use_cache": False} if "use_cache" in known else {}
        self._main = str(model.main_input_name)
        config = model.config.get_text_config()
        self._longest = _longest(model, getattr(config, "max_position_embeddings", None))
        pad, size = (getattr(config, key, None) for key in ("pad_token_id", "vocab_size"))
        usable = isinstance(pad, int) and isinstance(size, int) and 0 <= pad < size
        self._pad: int | None = pad if usable else None

    def __call__(
        self, module: nn.Module, args: tuple[PyTree, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[()], dict[str, Any]]:
        x = args[0] if args else {}
        given = dict(x) if isinstance(x, Mapping) else {self._main: x}
        ids = given.get("input_ids")
        if ids is not None:
            self.refuse_longer(ids.shape[-1])
        mask, pad = given.get("attention_mask"), self._pad
        if ids is not None and mask is not None and pad is not None and mask.shape == ids.shape:
            given["input_ids"] = ids.where(mask != 0, pad)
        return (), {**self._always, **given, **kwargs}

    def refuse_longer(self, length: int) -> None:
        """Raise ConfigError if a sample of ``length`` tokens is longer than the model reads."""
        if 0 < self._longest < length:
            raise ConfigError(
                f"model '{PREFIX}{self._name}' reads at most {self._longest} tokens "
                f"(max_position_embeddings), but a sample has {length}; cut them with "
                "stream.options.length"
            )


def _longest(model: nn.Module, limit: Any) -> int:
    """Return how many tokens a model reads; 0: any number.

    Where positions have a padding of their own, as RoBERTa's, they count from behind it.
    """
    limits = [limit] if isinstance(limit, int) and limit > 0 else []
    for module in model.modules():
        table = getattr(module, "position_embeddings", None)
        if isinstance(table, nn.Embedding) and table.padding_idx is not None:
            limits.append(table.num_embeddings - table.padding_idx - 1)
    return min(limits, default=0)


def header(model: nn.Module) -> dict[str, str]:
    """Return what the header of a file with this model's weights says of it; {} of others."""
    config: Any = getattr(model, "config", None)
    if not (hasattr(config, "model_type") and hasattr(config, "to_json_string")):
        return adapter_header(model)
    return {"format": "pt", CONFIG_KEY: config.to_json_string(), **adapter_header(model)}


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Keep the package from printing, and from sharding as the last DeepSpeed plugin would."""
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset: Any = unset_hf_deepspeed_config
    unset()  # prepare shards the model, once it is whole and has its weights
    logging = transformers.utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
