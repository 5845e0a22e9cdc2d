"""The state of a whole run: what a checkpoint is made of, and how a run goes on from one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from distcl.checkpoint.reader import Reader, load_weights
from distcl.checkpoint.saver import Contents, random_state, set_random_state
from distcl.checkpoint.store import MODEL, copied, read_manifest
from distcl.config import Config
from distcl.data.fingerprint import check_ids
from distcl.data.stream import DriftStream
from distcl.errors import CheckpointError, ConfigError
from distcl.monitoring.monitor import Monitor
from distcl.parallel.partition import Partition
from distcl.training.optimizer import place_steps
from distcl.training.parts import Parts
from distcl.training.trainer import ContinuousTrainer

HARMLESS = (
    "run.out",
    "run.poll_steps",
    "run.timeout_seconds",
    "run.max_minutes",
    "run.report",
    "training.max_rollbacks",
    "training.accumulate",
    "parallel.",
    "data.workers",
    "data.pin_memory",
    "checkpoint.",
    "tracking.",
)
"""Keys, and sections, that may change between a checkpoint and its resumption."""


@dataclass
class JobState:
    """What the job itself must know to go on: plain values, the same on all ranks."""

    command: str
    baseline: list[float] = field(default_factory=list)
    seconds: float = 0.0
    rollbacks: int = 0
    """Rollbacks whose smaller step the learning rates have."""


def collect(
    job: JobState,
    config: Config,
    trainer: ContinuousTrainer,
    monitor: Monitor | None,
    data: dict[str, Any],
) -> Contents:
    """Return what a checkpoint of the run holds; ``data``: their fingerprint. Collective."""
    parts = trainer.parts
    partition, updater, loader = parts.forward.partition, parts.updater, parts.loader
    optimizer = partition.optimizer_state(parts.optimizer)
    undo = trainer.undo.optimizer_state()
    mine = {
        "ranges": {name: list(span) for name, span in partition.ranges().items()},
        "anchor": parts.anchor.state_dict(),
        "optimizer": optimizer.slices,
        "optimizer_plain": optimizer.plain,
        "undo": undo and {"optimizer": undo.slices, "optimizer_plain": undo.plain},
        "updater": updater.state_dict(),
        "random": random_state(parts.runtime),
        "lanes": loader.lane_state(trainer.stage is not None),
    }
    shared = {
        "job": vars(job),
        "specs": partition.specs(),
        "trainer": trainer.state_dict(),
        "monitor": None if monitor is None else monitor.state_dict(),
        "cache": None if mine["lanes"] else parts.scorer.cache.state_dict(),
        "forwards": parts.forward.forwards,
        "ledger": loader.ledger_state(),
        "undo": trainer.undo.ledger_state(),
        "lrs": trainer.loop.base_lrs,
        "tracker": parts.tracker.state_dict(),
    }
    score = trainer.matrix.average_accuracy()
    meta = {
        "round": len(trainer.rounds),
        "score": score,
        "config": config.model_dump(mode="json"),
        "data": data,
    }
    return mine, shared, weights(parts), meta


def weights(parts: Parts) -> dict[str, torch.Tensor]:
    """Return every parameter and persistent buffer whole, on rank 0's CPU. Collective."""
    partition = parts.forward.partition
    partition.sync_buffers()
    state: dict[str, torch.Tensor] = {}
    for name in partition.specs():
        whole = partition.gather(name)
        if parts.runtime.is_main:
            state[name] = whole.cpu().contiguous()
    return state


def restore(
    path: Path,
    job: JobState,
    config: Config,
    trainer: ContinuousTrainer,
    monitor: Monitor | None,
) -> None:
    """Put a run into the state of a checkpoint that was verified. Collective.

    Raises CheckpointError if it is of another command or model, DataError if its history is of
    samples that are no longer there. Nothing of its files stays mapped.
    """
    parts = trainer.parts
    runtime, partition = parts.runtime, parts.forward.partition
    reader = Reader(path, read_manifest(path))
    shared = reader.shared
    if shared["job"]["command"] != job.command:
        raise CheckpointError(
            f"checkpoint '{path}' is of 'distcl {shared['job']['command']}', "
            f"not 'distcl {job.command}'"
        )
    vars(job).update(shared["job"])
    reader.check(partition)
    load_weights(partition, path / MODEL)
    same = len(reader.ranks) == runtime.world_size
    own = reader.ranks[runtime.rank] if same else reader.ranks[0]

    parts.anchor.load_state_dict(_anchor(reader, partition, own["anchor"], "anchor"))
    if own["undo"] is None:
        trainer.undo.forget()
    else:
        trainer.undo.load(lambda: _load_optimizer(reader, parts, "undo"), shared["undo"])
    _load_optimizer(reader, parts)
    if shared["cache"] is not None:
        parts.scorer.cache.load_state_dict(shared["cache"])
    parts.loader.load_lane_states([state["lanes"] for state in reader.ranks])
    parts.forward.forwards = shared["forwards"]
    parts.loader.load_ledger(shared["ledger"])
    trainer.load_state_dict(shared["trainer"])
    if isinstance(parts.stream, DriftStream) and not parts.history.copies:
        check_ids(parts.stream, trainer.history.ids(), f"the history of checkpoint '{path}'")
    if trainer.stage is not None:  # what the round trains on; what it found out comes next
        trainer.announce(trainer.stage.experience)
    states = [state["updater"] for state in reader.ranks]
    parts.updater.load_state_dict(
        own["updater"]
        if same and _same_layout(own, partition.ranges())
        else parts.updater.merged(states, lambda key: reader.cut(partition, "updater", key))
    )
    parts.updater.load_state_dict(copied(parts.updater.state_dict()))
    trainer.loop.base_lrs[:] = shared["lrs"]
    if monitor is not None:
        monitor.load_state_dict(shared["monitor"])
    parts.tracker.load_state_dict(shared["tracker"])
    if same:
        set_random_state(own["random"], runtime)


def _anchor(
    reader: Reader, partition: Partition, saved: dict[str, Any], *keys: str
) -> dict[str, Any]:
    """Return my slices of an anchor's state, which lies under ``keys``. Local."""
    replaced = saved.get("replaced")
    return {
        "theta_star": reader.cut(partition, *keys, "theta_star"),
        "older": [reader.cut(partition, *keys, "older", k) for k in range(len(saved["older"]))],
        "begun": saved["begun"],
        "replaced": replaced and _anchor(reader, partition, replaced, *keys, "replaced"),
    }


def _load_optimizer(reader: Reader, parts: Parts, *where: str) -> None:
    """Put the optimizer into the state that lies under ``where`` in ranks' files. Collective."""
    saved = [state["undo"] if where else state for state in reader.ranks]
    fetch = {key: reader.slices(*where, "optimizer", key) for s in saved for key in s["optimizer"]}
    plain = {name: values for s in saved for name, values in s["optimizer_plain"].items()}
    parts.forward.partition.load_optimizer_state(parts.optimizer, fetch, plain)
    place_steps(parts.optimizer)


def _same_layout(state: dict[str, Any], ranges: dict[str, tuple[int, int]]) -> bool:
    saved = {name: tuple(span) for name, span in state["ranges"].items()}
    return saved == ranges


def check_config(
    path: Path,
    saved: dict[str, Any],
    config: Config,
    allowed: frozenset[str],
    say: Callable[[str], None],
) -> None:
    """Compare a checkpoint's configuration with the one in force, key by key. Local.

    Raises ConfigError naming every changed key that could change results, unless allowed.
    """
    refused = []
    for section, keys in config.model_dump(mode="json").items():
        for key, now in keys.items():
            name = f"{section}.{key}"
            before = saved.get(section, {}).get(key, now)
            if before == now:
                continue
            change = f"{name}: {before!r} -> {now!r}"
            if name in allowed or name.startswith(tuple(h for h in HARMLESS)):
                say(f"[resume] changed since the checkpoint: {change}")
            else:
                refused.append(change)
    if refused:
        names = " ".join(f"--allow-changed {change.partition(':')[0]}" for change in refused)
        raise ConfigError(
            f"the configuration differs from that of '{path}': {'; '.join(refused)}\n"
            f"go on all the same with: {names}"
        )
