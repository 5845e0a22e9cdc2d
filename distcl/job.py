"""A whole run: build the parts from a configuration, run a command, leave the run folder."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Collection, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file

from distcl import registry
from distcl.anchor import Anchor
from distcl.checkpoint import CheckpointStore, read_manifest
from distcl.config import Config
from distcl.config_load import to_toml
from distcl.data.history import CopyingStream
from distcl.data.streams import create_stream
from distcl.errors import (
    CheckpointError,
    ConfigError,
    DivergenceError,
    Preempted,
    UsageError,
)
from distcl.failure import Cause
from distcl.folder import RunFolder
from distcl.inference import ShardedForward
from distcl.keeper import Contents, Keeper, Preemption
from distcl.losses import create_loss
from distcl.metrics import AccuracyMatrix
from distcl.models import create_model
from distcl.monitor import Monitor
from distcl.optim import create_optimizer
from distcl.partition.base import create_partition
from distcl.priority.feed import Feed
from distcl.priority.online import Ledger
from distcl.priority.scoring import Scorer, create_signal
from distcl.priority.weights import check_priority
from distcl.record import RoundRecorder
from distcl.resume import JobState, check_config, collect, restore, weights
from distcl.runtime import Runtime, describe
from distcl.status import FolderProgress
from distcl.tracking import Tracker, Trackers, create_tracker
from distcl.trainer import ContinuousTrainer, Parts
from distcl.types import Progress, Stream
from distcl.updaters import UpdaterSetup, create_updater

Command = Literal["run", "train", "detect"]

log = logging.getLogger("distcl")


class Quiet:
    """A progress display that shows nothing."""

    def round_begins(self, title: str, steps: int, metric: str = "loss") -> None:
        """Ignore it."""

    def step(self, done: int, value: float, samples_per_second: float) -> None:
        """Ignore it."""

    def message(self, text: str) -> None:
        """Ignore it."""


def assemble(
    config: Config,
    runtime: Runtime,
    stream: Stream,
    out: Path,
    progress: Progress | None = None,
    resume: bool = False,
) -> Parts:
    """Build every part of a trainer. Collective. ``resume``: keep what trackers have written."""
    seed = config.run.seed
    if config.continual_learning.history_store == "copy":
        stream = CopyingStream(stream)
    criterion = create_loss(config.model.loss)
    model, optimizer = runtime.prepare_training(
        create_model(config.model, stream.spec, seed),
        lambda params: create_optimizer(config.optimizer, params),
    )
    partition = create_partition(runtime, model)
    forward = ShardedForward(runtime, model, partition, criterion)
    signal = create_signal(
        config.priority.signal,
        config.priority.options,
        criterion=criterion,
        loss=config.model.loss,
        classes=stream.spec.classes,
    )
    importance = config.continual_learning.importance_weighting
    keep = getattr(signal, "anchors", 1) if importance else 1
    host = torch.device("cpu") if config.parallel.anchor_device == "cpu" else None
    anchor = Anchor(partition, keep, host)
    scorer = Scorer(forward, anchor, signal, config.priority.score_batch)
    ledger = None
    if importance and config.priority.source == "online":
        ledger = Ledger(runtime, signal, stream.spec.classes)
    updater = create_updater(
        config.continual_learning.update_mode,
        UpdaterSetup(
            config=config.continual_learning,
            runtime=runtime,
            model=model,
            optimizer=optimizer,
            partition=partition,
            anchor=anchor,
            criterion=criterion,
            scorer=scorer,
            seed=seed,
            pretrained=bool(config.model.pretrained),
            accumulate=config.training.accumulate,
            ledger=ledger,
        ),
    )
    if importance:
        check_priority(config, signal, updater.uses_hist_batch)
    feed = Feed(
        runtime,
        stream,
        config.training,
        config.continual_learning,
        config.priority,
        config.data,
        seed,
        scorer,
        ledger,
    )
    shown = progress if progress is not None and runtime.is_main else Quiet()
    tracker = create_tracker(config.tracking, out, runtime.rank, resume, shown.message)
    return Parts(
        runtime=runtime,
        stream=stream,
        model=model,
        optimizer=optimizer,
        anchor=anchor,
        forward=forward,
        scorer=scorer,
        updater=updater,
        feed=feed,
        tracker=tracker,
        recorder=RoundRecorder(runtime, out, tracker),
        progress=shown,
    )


def execute(
    command: Command,
    config: Config,
    out: Path,
    progress: Progress | None = None,
    tell: Callable[[str], None] | None = None,
    resume: str = "never",
    allow_changed: Collection[str] = (),
) -> dict[str, Any]:
    """Run a command and return its summary (the same on every rank). Collective.

    ``resume``: never begins anew and replaces what the folder holds; auto goes on from the newest
    checkpoint that verifies, if there is one; else the path of a checkpoint. ``allow_changed``:
    keys of the configuration that may differ from the checkpoint's. ``tell`` shows the user one
    message, on rank 0, if another rank fails; then the process exits.

    Raises the errors of ``distcl.errors``; ``OUT/status.json`` says how it ended.
    """
    runtime = Runtime(config.run, config.parallel, config.training)
    folder = RunFolder(out, config, runtime.is_main)

    def peer_failed(cause: Cause) -> None:
        message = f"rank {cause.rank}: {cause.message}"
        folder.status("failed", cause.exit_code, message)
        if tell is not None:
            tell(message)

    if runtime.relay is not None:
        runtime.relay.tell = peer_failed
    job = Job(command, config, runtime, folder, progress)
    try:
        with runtime.guard():
            _check(command, config, runtime)
            with folder.open(append=resume != "never"):
                log.info(runtime.about)
                return job.run(resume, frozenset(allow_changed))
    except BaseException as error:
        cause = describe(error, runtime.rank)
        state = "preempted" if isinstance(error, Preempted) else "failed"
        folder.status(state, cause.exit_code, cause.message)
        job.tracker.finish("failed")
        raise


def _check(command: Command, config: Config, runtime: Runtime) -> None:
    texts = [text.splitlines() for text in runtime.gather_objects(to_toml(config))]
    for peer, lines in zip(runtime.peers, texts, strict=True):
        if lines != texts[0]:
            pairs = zip_longest(lines, texts[0], fillvalue="nothing")
            theirs, ours = next(pair for pair in pairs if pair[0] != pair[1])
            raise ConfigError(
                f"rank {peer.rank} on {peer.node} has '{theirs}' where rank 0 has '{ours}'; give "
                "all processes the same file, DISTCL_ environment and --set"
            )
    if config.training.batch_size < runtime.world_size:
        raise ConfigError(
            f"training.batch_size = {config.training.batch_size} is smaller than the number of "
            f"processes, {runtime.world_size}; it is the global batch"
        )
    replayed = config.continual_learning.replay_batch_size
    if 0 < replayed < runtime.world_size:
        raise ConfigError(
            f"continual_learning.replay_batch_size = {replayed} is smaller than the number of "
            f"processes, {runtime.world_size}; it is a global batch"
        )


class Job:
    """One run of a command, from its first step or from a checkpoint. Methods are collective."""

    def __init__(
        self,
        command: Command,
        config: Config,
        runtime: Runtime,
        folder: RunFolder,
        progress: Progress | None,
    ) -> None:
        self._command = command
        self._config = config
        self._runtime = runtime
        self._folder = folder
        self._progress = progress
        self.tracker: Tracker = Trackers()
        self._store = CheckpointStore(
            runtime, folder.path / "checkpoints", config.checkpoint.keep, self._say
        )
        self._store.published = lambda path: self.tracker.checkpoint(path)
        self._preemption = Preemption(config.run.max_minutes)
        self._rollbacks = 0

    def run(self, resume: str, allowed: frozenset[str]) -> dict[str, Any]:
        """Run to the end and return the summary."""
        self._preemption.install()
        try:
            path = self._start_from(resume)
            if path is not None:
                saved = read_manifest(path)["config"]
                check_config(path, saved, self._config, allowed, self._say)
                self._say(f"[resume] from {path}")
            while True:
                try:
                    return self._attempt(path)
                except DivergenceError as error:
                    path = self._rolled_back(error)
                    self.tracker.finish("preempted")
        except Preempted:
            self.tracker.finish("preempted")
            raise
        finally:
            self._preemption.remove()

    def _start_from(self, resume: str) -> Path | None:
        if self._runtime.is_main:
            self._store.clean()
            if resume == "never":
                self._store.clear()
        if resume == "never":
            return None
        if resume == "auto":
            return self._store.newest()
        path = Path(resume)
        if not path.is_dir():
            raise CheckpointError(f"checkpoint '{resume}' does not exist")
        return path

    def _rolled_back(self, error: DivergenceError) -> Path:
        """Return the checkpoint to go back to after a divergence, or raise it again."""
        if self._config.training.on_divergence != "rollback":
            raise error
        path = self._store.newest()
        if path is None:
            raise DivergenceError(f"{error}; there is no checkpoint to roll back to") from error
        self._rollbacks += 1
        limit = self._config.training.max_rollbacks
        if self._rollbacks > limit:
            raise DivergenceError(f"{error}; {limit} rollbacks did not help") from error
        self._say(f"[rollback] {error}; back to {path.name} with half the learning rate")
        return path

    def _attempt(self, path: Path | None) -> dict[str, Any]:
        config, runtime, folder = self._config, self._runtime, self._folder
        begun = time.perf_counter()
        torch.manual_seed(config.run.seed + runtime.rank)
        stream = create_stream(config.stream, config.run.seed, config.data)
        progress = None
        if runtime.is_main:
            stages = len(stream.experiences) if self._command == "train" else 0
            progress = FolderProgress(self._progress or Quiet(), folder.path, stages)
        parts = assemble(config, runtime, stream, folder.path, progress, path is not None)
        self.tracker = parts.tracker
        trainer = ContinuousTrainer(parts, config)
        monitor = None if self._command == "train" else self._monitor(trainer)
        state = JobState(self._command)
        if path is not None:
            restore(path, state, config, trainer, monitor)
            if progress is not None:
                progress.resumed(len(trainer.rounds) + (trainer.pretraining is not None))
        before = state.seconds
        self._rollbacks = max(self._rollbacks, state.rollbacks)
        halvings = self._rollbacks - state.rollbacks
        trainer.loop.base_lrs[:] = [lr * 0.5**halvings for lr in trainer.loop.base_lrs]
        state.rollbacks = self._rollbacks

        def contents() -> Contents:
            state.seconds = before + time.perf_counter() - begun
            return collect(state, config, trainer, monitor)

        keeper = Keeper(
            runtime,
            self._store,
            config.checkpoint,
            self._preemption,
            contents,
            lambda: trainer.loop.steps,
        )
        trainer.loop.keeper = keeper
        if monitor is None:
            train(trainer, state)
            drifts: list[int] = []
            baseline: Sequence[float | None] = state.baseline
        else:
            monitor.run() if self._command == "run" else monitor.detect()
            drifts = monitor.drifts
            baseline = [_chance(trainer)] * len(monitor.experiences)
        keeper.finish()
        if config.checkpoint.save_final:
            final = folder.path / "checkpoints" / "final.safetensors"
            save_final(parts, final)
            self.tracker.checkpoint(final)
        seconds = before + time.perf_counter() - begun
        summary = summarize(trainer, baseline, drifts, config, seconds)
        if runtime.is_main:
            folder.write("summary.json", json.dumps(summary, indent=2, allow_nan=False))
        self.tracker.summarize(summary)
        self.tracker.finish()
        folder.status("done", 0, "")
        if runtime.is_main and config.run.report:
            self._report(folder.path)
        return summary

    def _report(self, path: Path) -> None:
        from distcl.report import write_report

        try:
            write_report([path], path / "report.html")
        except UsageError as error:  # the run itself is done
            self._say(f"[report] {error}")

    def _monitor(self, trainer: ContinuousTrainer) -> Monitor:
        chosen = self._config.detector
        detector = registry.create("detector", chosen.name, options=chosen.options)
        return Monitor(trainer, detector, self._config.monitor, self._config.run.seed)

    def _say(self, text: str) -> None:
        if self._runtime.is_main:
            log.info(text)
            if self._progress is not None:
                self._progress.message(text)


def train(trainer: ContinuousTrainer, state: JobState | None = None) -> None:
    """Run one round per experience, the first by pretraining if asked. Collective.

    ``state.baseline`` becomes the untrained model's accuracy on every experience.
    """
    state = state or JobState("train")
    experiences, keeper = trainer.parts.stream.experiences, trainer.loop.keeper
    if not state.baseline:
        state.baseline = [trainer.accuracy(e) for e in experiences]
    rest = experiences
    if trainer.training.pretrain_epochs and not trainer.pretrained:
        rest = experiences[1:]
        if trainer.pretraining is None:
            trainer.pretrain(experiences[0])
            trainer.evaluate(experiences, seen=1)
            keeper.round_ended()
    for experience in rest[len(trainer.rounds) :]:
        trainer.run_round(experience, "scheduled", experiences[: experience.index + 1])
        trainer.evaluate(experiences, seen=experience.index + 1)
        keeper.round_ended()


def _chance(trainer: ContinuousTrainer) -> float | None:
    """Return what a model that knows nothing would score, or None where that is unknown."""
    classes = trainer.parts.stream.spec.classes
    if classes:
        return 1.0 / classes
    return 0.0 if trainer.metric == "r2" else None


def summarize(
    trainer: ContinuousTrainer,
    baseline: Sequence[float | None],
    drifts: list[int],
    config: Config,
    seconds: float,
) -> dict[str, Any]:
    """Return the contents of ``summary.json``. Local."""
    matrix: AccuracyMatrix = trainer.matrix
    trained = sum(float(r["train_seconds"]) for r in trainer.rounds)
    if trainer.pretraining:
        trained += float(trainer.pretraining["train_seconds"])
    summary = {
        "status": "done",
        "world_size": trainer.parts.runtime.world_size,
        "strategy": config.parallel.strategy,
        "seconds": seconds,
        "samples_per_second": trainer.loop.samples / trained if trained else None,
        "seed": config.run.seed,
        "metric": trainer.metric,
        "accuracy": matrix.rows(),
        "average_accuracy": matrix.average_accuracy(),
        "average_forgetting": matrix.average_forgetting(),
        "backward_transfer": matrix.backward_transfer(),
        "forward_transfer": matrix.forward_transfer(baseline),
        "average_anytime_accuracy": matrix.average_anytime_accuracy(),
        "worst_experience_accuracy": matrix.worst_experience_accuracy(),
        "drifts": drifts,
        "bad_samples": trainer.bad.count,
        "pretrain": trainer.pretraining,
        "evaluate_seconds": trainer.evaluate_seconds,
        "rounds": trainer.rounds,
    }
    cleaned: dict[str, Any] = _finite(summary)
    return cleaned


def _finite(value: Any) -> Any:
    """Replace NaN and infinities by None: JSON has neither."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def save_final(parts: Parts, path: Path) -> None:
    """Write parameters and buffers to a safetensors file, by rank 0. Collective."""
    state = weights(parts)
    if parts.runtime.is_main:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(state, str(path))
