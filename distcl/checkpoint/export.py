"""Commands on what a run has left: evaluate, inspect, verify, export."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import save_file
from torch import nn

from distcl.checkpoint.reader import load_weights
from distcl.checkpoint.store import MODEL, SHARED, load, newest_good, read_manifest, verify
from distcl.config import Config
from distcl.config.load import load_config, to_toml
from distcl.data.stream import create_stream
from distcl.distributed.runtime import Runtime
from distcl.errors import CheckpointError
from distcl.models.build import create_model, load_pretrained
from distcl.models.lora import ADAPTER_KEY, split_adapter
from distcl.models.transformers import CONFIG_KEY
from distcl.models.weights import WeightsFile
from distcl.registry import OBJECT, resolve
from distcl.training.build import assemble
from distcl.training.parts import Parts
from distcl.training.trainer import ContinuousTrainer
from distcl.types import DataSpec

log = logging.getLogger("distcl")

FINAL = "final.safetensors"


def checkpoints(path: Path) -> list[Path]:
    """Return the checkpoints of a run folder, oldest first, or the one that ``path`` is. Local.

    Raises CheckpointError if it is neither.
    """
    if (path / "manifest.json").is_file():
        return [path]
    if not (path / "config.toml").is_file():
        raise CheckpointError(
            f"'{path}' is neither a run folder (no config.toml) nor a checkpoint (no manifest.json)"
        )
    return sorted((path / "checkpoints").glob("step-*"))


def configuration(path: Path) -> Config:
    """Return the configuration of a run folder or a checkpoint. Local. Raises CheckpointError."""
    if checkpoints(path) == [path]:
        return Config.model_validate(read_manifest(path)["config"])
    return load_config(path / "config.toml", environ={})


def find(path: Path, warn: Callable[[str], None], runtime: Runtime | None = None) -> Path:
    """Return the weights file of a run folder or a checkpoint.

    Of a run: the final weights, else those of its newest checkpoint; ``warn`` tells of what is
    damaged, and was passed over. Collective with a ``runtime``. Raises CheckpointError.
    """
    found = checkpoints(path)
    final = path / "checkpoints" / FINAL
    whole, fault = False, ""
    if found != [path] and final.exists():
        try:
            whole = bool(WeightsFile(final).specs)
        except (CheckpointError, OSError) as error:
            fault = str(error)
    if runtime is not None:
        found, whole, fault = runtime.broadcast((found, whole, fault))
    if whole:
        return final
    if found == [path]:
        verify(path, runtime)
        return path / MODEL
    if not found:
        raise CheckpointError(fault or f"run folder '{path}' has no weights yet")
    if fault:
        warn(f"{fault}; falling back to the newest checkpoint")
    return newest_good(found, warn, runtime)[0] / MODEL


def evaluate(path: Path, warn: Callable[[str], None] = log.warning) -> dict[str, Any]:
    """Return how good a run's weights are on every experience of its stream. Collective.

    The result has ``weights``, ``metric``, ``accuracy`` (a list, one value an experience),
    ``average_accuracy``, and ``scores``: a list of each further one. ``warn``: see
    :func:`find`; called on every rank.
    """
    config = configuration(path)
    runtime = Runtime(config.run, config.parallel, config.training)
    with runtime.guard():
        parts, quiet, weights = assemble_trained(path, config, runtime, warn)
        trainer = ContinuousTrainer(parts, quiet)
        found = [trainer.measure(e) for e in parts.stream.experiences]
        row, *others = (list(values) for values in zip(*found, strict=True))
        further = dict(zip(list(parts.scores)[1:], others, strict=True))
    return {
        "weights": str(weights),
        "metric": trainer.metric,
        "accuracy": row,
        "average_accuracy": sum(row) / len(row),
        "scores": further,
    }


def assemble_trained(
    path: Path, config: Config, runtime: Runtime, warn: Callable[[str], None]
) -> tuple[Parts, Config, Path]:
    """Return the parts of a run with its weights, the configuration that they have, and the file.

    Nothing is tracked, and no pretrained weights are read. ``warn``: see :func:`find`. Collective.
    """
    weights = find(path, warn, runtime)
    stream = create_stream(config.stream, config.run.seed, config.data)
    quiet = config.model_copy(
        update={
            "tracking": config.tracking.model_copy(update={"kind": "none"}),
            "model": config.model.model_copy(update={"pretrained": ""}),
        }
    )
    parts = assemble(quiet, runtime, stream, path)
    load_weights(parts.forward.partition, weights)
    return parts, quiet, weights


def trained_model(path: Path, config: Config, warn: Callable[[str], None]) -> nn.Module:
    """Return the model that ``config`` names with a run's weights, on the CPU, in eval. Local.

    A module that was given as an object needs no stream. ``warn``: see :func:`find`.
    """
    weights, x, spec = find(path, warn), None, DataSpec((), 0)
    there = config.model.name.startswith(OBJECT) and resolve("model", config.model.name)
    if not isinstance(there, nn.Module):
        stream = create_stream(config.stream, config.run.seed, config.data)
        spec, x = stream.spec, stream.read(np.asarray(stream.experiences[0].test[:2])).x
    plain = config.model.model_copy(update={"pretrained": "", "pretrained_skip": []})
    model = create_model(plain, spec, config.run.seed, x)
    if config.run.precision == "fp64":
        model.double()
    load_pretrained(model, weights)
    return model.eval()


def describe_checkpoint(path: Path) -> dict[str, Any]:
    """Return what a checkpoint, or a run's newest, holds, after verifying it. Local."""
    path = _some(path)[-1]
    manifest = verify(path)
    trainer = load(path / SHARED)["trainer"]
    stage = trainer["stage"]
    within = "between rounds"
    if stage is not None:
        name = f"round {stage['number']}" if stage["number"] else "pretraining"
        within = f"in {name}, step {stage['done']} of {stage['steps']}"
    return {
        "checkpoint": str(path),
        "step": manifest["step"],
        "rounds": manifest["round"],
        "where": within,
        "world_size": manifest["world_size"],
        f"average_{manifest.get('metric', 'accuracy')}": manifest["score"],
        "files": {name: entry["bytes"] for name, entry in manifest["files"].items()},
    }


def verify_all(path: Path) -> dict[str, int]:
    """Verify a checkpoint, or all of a run; return their numbers of files. Local.

    Raises CheckpointError naming the first file that is not as it was written.
    """
    return {str(one): len(verify(one)["files"]) for one in _some(path)}


def _some(path: Path) -> list[Path]:
    found = checkpoints(path)
    if not found:
        raise CheckpointError(f"run folder '{path}' has no checkpoints")
    return found


def export(path: Path, destination: Path, warn: Callable[[str], None] = log.warning) -> list[Path]:
    """Write the weights as one safetensors file, and config.toml beside it. Local.

    None needs distcl to be read. Of a model of transformers there is its config.json too, so that
    ``from_pretrained`` takes the folder. Of one with adapters (``model.lora``) it is a folder that
    peft's ``PeftModel.from_pretrained`` takes, with the model they belong to under ``base``, unless
    it was read from a folder or the hub. ``warn``: see :func:`find`. Raises CheckpointError if a
    file is in the way.
    """
    config, weights = configuration(path), find(path, warn)
    file = WeightsFile(weights)
    texts = {"config.toml": to_toml(config)}
    tensors: dict[str, dict[str, str]] = {}  # file -> name of a tensor there -> here
    if (adapter := file.header.get(ADAPTER_KEY)) is not None:
        about = json.loads(adapter)
        texts["adapter_config.json"] = adapter
        tensors["adapter_model.safetensors"], base = split_adapter(file.specs, about)
        if not about.get("base_model_name_or_path"):
            tensors[f"base/{MODEL}"] = base
    if CONFIG_KEY in file.header and (adapter is None or f"base/{MODEL}" in tensors):
        texts["config.json" if adapter is None else "base/config.json"] = file.header[CONFIG_KEY]
    names = [*(tensors or [MODEL]), *texts]
    for name in names:
        if (destination / name).exists():
            raise CheckpointError(f"'{destination / name}' exists; export to another folder")
    for name in names:
        (destination / name).parent.mkdir(parents=True, exist_ok=True)
    if not tensors:
        shutil.copyfile(weights, destination / MODEL)
    for name, given in tensors.items():
        held = {new: file.read(old).view(file.specs[old].shape) for new, old in given.items()}
        save_file(held, destination / name, {"format": "pt"})
    for name, text in texts.items():
        (destination / name).write_text(text, encoding="utf-8")
    return [destination / name for name in names]
