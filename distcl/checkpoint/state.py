"""The state of a whole run: what a checkpoint is made of, and how a run goes on from one."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from distcl.checkpoint.reader import Reader, load_weights
from distcl.checkpoint.saver import Contents, RandomState
from distcl.checkpoint.store import MODEL, read_manifest
from distcl.config import Config
from distcl.data.fingerprint import check_ids
from distcl.data.ids import tensor_ids
from distcl.data.stream import DriftStream
from distcl.errors import CheckpointError
from distcl.models.transformers import header
from distcl.monitoring.monitor import Monitor
from distcl.parallel.sliced_state import SavedSlices, SlicedStateful
from distcl.priority.scoring import Scorer
from distcl.sampling.round_loader import RoundLoader
from distcl.training.optimizer import cloned
from distcl.training.parts import Parts
from distcl.training.trainer import ContinuousTrainer
from distcl.types import Stateful, info_of
from distcl.updaters import Updater

Registered = Mapping[str, Stateful | SlicedStateful]
"""Whatever must survive a restart, by name; saved and loaded in this order."""


@dataclass
class JobState:
    """What the job itself must know to go on: plain values, the same on all ranks."""

    command: str
    baseline: list[float] = field(default_factory=list)
    rollbacks: int = 0
    """Rollbacks whose smaller step the learning rates have."""
    earlier: float = 0.0
    begun: float = field(default_factory=time.perf_counter)

    @property
    def here(self) -> float:
        """The seconds since this start."""
        return time.perf_counter() - self.begun

    @property
    def seconds(self) -> float:
        """The seconds of the whole run, also of what came before a resume."""
        return self.earlier + self.here

    def state_dict(self) -> dict[str, Any]:
        """Return everything."""
        names = ("command", "baseline", "rollbacks", "seconds")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        self.baseline, self.rollbacks = state["baseline"], state["rollbacks"]
        self.earlier = state["seconds"]


@dataclass(frozen=True, slots=True)
class _Cache:
    """The losses by id; of a source that is read in lanes they lie with these."""

    scorer: Scorer
    in_lanes: bool

    def state_dict(self) -> Any:
        return None if self.in_lanes else self.scorer.cache.state_dict()

    def load_state_dict(self, state: Any) -> None:
        if state is not None:
            self.scorer.cache.load_state_dict(state)


@dataclass(frozen=True, slots=True)
class _Lanes:
    """What each rank has of its own of a source that is read in lanes."""

    trainer: ContinuousTrainer
    loader: RoundLoader

    def state_dict(self) -> Any:
        return self.loader.lane_state(self.trainer.stage is not None)

    def load_slices(self, saved: SavedSlices) -> None:
        self.loader.load_lane_states(saved.states)


@dataclass(frozen=True, slots=True)
class _Updater:
    """Slices of statistics, layers that were dealt out, plain values."""

    updater: Updater

    def state_dict(self) -> Any:
        return self.updater.state_dict()

    def load_slices(self, saved: SavedSlices) -> None:
        same = saved.same_layout
        state = saved.own if same else self.updater.merged(saved.states, saved.cut)
        self.updater.load_state_dict(state)
        state = cloned(self.updater.state_dict())  # out of the files
        for key in self.updater.sliced:
            state[key] = self.updater.partition.placed(state[key])
        self.updater.load_state_dict(state)


def registered(job: JobState, trainer: ContinuousTrainer, monitor: Monitor | None) -> Registered:
    """Return every part of a run that must survive a restart.

    The updater comes after the trainer: it builds on the round in progress.
    """
    parts = trainer.parts
    return {
        "job": job,
        "anchor": parts.anchor,
        **({"average": parts.average} if parts.average.on else {}),
        "optimizer": trainer.optimizer,
        "cache": _Cache(parts.scorer, info_of(parts.stream).sequential),
        "lanes": _Lanes(trainer, parts.loader),
        "table": trainer.undo,
        "forward": parts.forward,
        "matrix": trainer.matrices,
        "history": trainer.history,
        "bad": trainer.bad,
        "loop": trainer.loop,
        "trainer": trainer,
        "updater": _Updater(parts.updater),
        "tracker": parts.tracker,
        **({} if monitor is None else {"monitor": monitor}),
        "random": RandomState(parts.runtime.device),
    }


def collect(
    parts: Registered, config: Config, trainer: ContinuousTrainer, data: dict[str, Any]
) -> Contents:
    """Return what a checkpoint of the run holds; ``data``: their fingerprint. Collective."""
    partition = trainer.parts.forward.partition
    mine: dict[str, Any] = {"ranges": {n: list(span) for n, span in partition.ranges().items()}}
    shared: dict[str, Any] = {"specs": partition.specs()}
    for name, part in parts.items():
        (mine if isinstance(part, SlicedStateful) else shared)[name] = part.state_dict()
    meta = {
        "round": len(trainer.rounds),
        "metric": trainer.metric,
        "score": trainer.matrix.average_accuracy(),
        "higher_is_better": trainer.leading.higher_is_better,
        "config": config.model_dump(mode="json"),
        "data": data,
        "header": header(trainer.parts.forward.module),
    }
    return mine, shared, weights(trainer.parts), meta


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


def restore(path: Path, parts: Registered, command: str, trainer: ContinuousTrainer) -> None:
    """Put a run into the state of a checkpoint that was verified. Collective.

    Raises CheckpointError if it is of another command or model, or has not the state of exactly
    these parts; DataError if its history is of samples that are no longer there. Nothing of its
    files stays mapped.
    """
    runtime, partition = trainer.parts.runtime, trainer.parts.forward.partition
    reader = Reader(path, read_manifest(path))
    shared = reader.shared
    saved_by = shared.get("job", {}).get("command", command)
    if saved_by != command:
        raise CheckpointError(
            f"checkpoint '{path}' is of 'distcl {saved_by}', not 'distcl {command}'"
        )
    sliced = {name for name, part in parts.items() if isinstance(part, SlicedStateful)}
    reader.check_names({"specs", *parts} - sliced, {"ranges", *sliced})
    reader.check_tensors(partition)
    if isinstance(trainer.parts.stream, DriftStream) and not trainer.history.copies:
        held = tensor_ids(shared["history"]["ids"])
        check_ids(trainer.parts.stream, held, f"the history of checkpoint '{path}'")
    load_weights(partition, path / MODEL)
    ranges = [state["ranges"] for state in reader.ranks]
    for name, part in parts.items():
        try:
            if isinstance(part, SlicedStateful):
                states = [state[name] for state in reader.ranks]
                own, world = runtime.rank, runtime.world_size
                part.load_slices(SavedSlices(path, states, ranges, partition.ranges(), own, world))
            else:
                part.load_state_dict(shared[name])
        except KeyError as error:
            raise CheckpointError(
                f"checkpoint '{path}': the state of '{name}' lacks {error}"
            ) from error
        except ValueError as error:  # of draws that changed keys make others
            raise CheckpointError(f"checkpoint '{path}' cannot go on: {error}") from error
