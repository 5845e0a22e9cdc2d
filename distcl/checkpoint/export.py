"""Commands on what a run has left: evaluate, inspect, verify, export."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from safetensors import safe_open

from distcl.checkpoint.store import MODEL, SHARED, load, verify
from distcl.config import Config
from distcl.config.load import load_config, to_toml
from distcl.data.stream import create_stream
from distcl.distributed.runtime import Runtime
from distcl.errors import CheckpointError
from distcl.parallel.partition import Fetch
from distcl.training.build import assemble
from distcl.training.trainer import ContinuousTrainer

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


def find(path: Path) -> tuple[Path, Config]:
    """Return the weights file and the configuration of a run folder or a checkpoint. Local.

    Of a run: the final weights, else those of its newest checkpoint. Raises CheckpointError.
    """
    found = checkpoints(path)
    if found == [path]:
        manifest = verify(path)
        return path / MODEL, Config.model_validate(manifest["config"])
    config = load_config(path / "config.toml", environ={})
    final = path / "checkpoints" / FINAL
    if final.is_file():
        return final, config
    if not found:
        raise CheckpointError(f"run folder '{path}' has no weights yet")
    verify(found[-1])
    return found[-1] / MODEL, config


def evaluate(path: Path) -> dict[str, Any]:
    """Return how good a run's weights are on every experience of its stream. Collective.

    The result has ``weights``, ``metric``, ``accuracy`` (a list, one value an experience) and
    ``average_accuracy``.
    """
    weights, config = find(path)
    runtime = Runtime(config.run, config.parallel, config.training)
    with runtime.guard():
        stream = create_stream(config.stream, config.run.seed)
        quiet = config.model_copy(
            update={"tracking": config.tracking.model_copy(update={"kind": "none"})}
        )
        parts = assemble(quiet, runtime, stream, path)
        parts.forward.partition.load(reader(weights))
        trainer = ContinuousTrainer(parts, quiet)
        row = [trainer.accuracy(e) for e in stream.experiences]
    return {
        "weights": str(weights),
        "metric": trainer.metric,
        "accuracy": row,
        "average_accuracy": sum(row) / len(row),
    }


def reader(path: Path) -> Fetch:
    """Return the reader of a safetensors file. Raises CheckpointError naming what is missing."""

    def fetch(name: str, start: int, stop: int) -> Any:
        try:
            with safe_open(path, framework="pt") as file:
                return file.get_tensor(name).reshape(-1)[start:stop]
        except Exception as error:  # the reader's own type is no public one
            raise CheckpointError(f"'{path}': '{name}' cannot be read: {error}") from error

    return fetch


def describe(path: Path) -> dict[str, Any]:
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
        "average_accuracy": manifest["score"],
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


def export(path: Path, destination: Path) -> list[Path]:
    """Write the weights as one safetensors file, and config.toml beside it. Local.

    Neither needs distcl to be read. Raises CheckpointError if a file is in the way.
    """
    weights, config = find(path)
    files = [destination / MODEL, destination / "config.toml"]
    for file in files:
        if file.exists():
            raise CheckpointError(f"'{file}' exists; export to another folder")
    destination.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(weights, files[0])
    files[1].write_text(to_toml(config), encoding="utf-8")
    return files
