"""A whole run: build the parts from a configuration, run a command, leave the run folder."""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file

from distcl import registry
from distcl.anchor import Anchor
from distcl.config import Config
from distcl.config_load import to_toml
from distcl.data.history import CopyingStream
from distcl.data.streams import create_stream
from distcl.errors import ConfigError, UsageError
from distcl.failure import Cause
from distcl.inference import ShardedForward
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
from distcl.runtime import Runtime, describe
from distcl.tracking import create_tracker
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
) -> Parts:
    """Build every part of a trainer. Collective."""
    seed = config.run.seed
    if config.continual_learning.history_store == "copy":
        stream = CopyingStream(stream)
    criterion = create_loss(config.model.loss)
    model = runtime.prepare(create_model(config.model, stream.spec, seed))
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = runtime.prepare_optimizer(create_optimizer(config.optimizer, trainable))
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
    anchor = Anchor(partition, keep=getattr(signal, "anchors", 1) if importance else 1)
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
        tracker=create_tracker(config.tracking, out, runtime.rank),
        progress=progress if progress is not None and runtime.is_main else Quiet(),
    )


def execute(
    command: Command,
    config: Config,
    out: Path,
    progress: Progress | None = None,
    tell: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Run a command and return its summary (the same on every rank). Collective.

    ``tell`` shows the user one message, on rank 0, if another rank fails; then the process exits.
    Raises the errors of ``distcl.errors``; ``OUT/status.json`` says how it ended.
    """
    runtime = Runtime(config.run, config.parallel)
    folder = RunFolder(out, config, runtime.is_main)

    def peer_failed(cause: Cause) -> None:
        message = f"rank {cause.rank}: {cause.message}"
        folder.status("failed", cause.exit_code, message)
        if tell is not None:
            tell(message)

    if runtime.relay is not None:
        runtime.relay.tell = peer_failed
    try:
        with runtime.guard():
            _check(command, config, runtime)
            with folder.open():
                log.info(runtime.about)
                return _run(command, config, runtime, folder, progress)
    except BaseException as error:
        cause = describe(error, runtime.rank)
        folder.status("failed", cause.exit_code, cause.message)
        raise


def _check(command: Command, config: Config, runtime: Runtime) -> None:
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


def _run(
    command: Command,
    config: Config,
    runtime: Runtime,
    folder: RunFolder,
    progress: Progress | None,
) -> dict[str, Any]:
    begun = time.perf_counter()
    torch.manual_seed(config.run.seed + runtime.rank)
    stream = create_stream(config.stream, config.run.seed)
    parts = assemble(config, runtime, stream, folder.path, progress)
    trainer = ContinuousTrainer(parts, config)
    drifts: list[int] = []
    baseline: Sequence[float | None]
    if command == "train":
        baseline = train(trainer)
    else:
        detector = registry.create(
            "detector", config.detector.name, options=config.detector.options
        )
        monitor = Monitor(trainer, detector, config.monitor, config.run.seed)
        monitor.run() if command == "run" else monitor.detect()
        drifts = monitor.drifts
        baseline = [_chance(trainer)] * len(monitor.experiences)
    seconds = time.perf_counter() - begun
    if config.checkpoint.save_final:
        save_weights(parts, folder.path / "checkpoints" / "final.safetensors")
    summary = summarize(trainer, baseline, drifts, config, seconds)
    if runtime.is_main:
        folder.write("summary.json", json.dumps(summary, indent=2, allow_nan=False))
    parts.tracker.finish()
    folder.status("done", 0, "")
    return summary


def train(trainer: ContinuousTrainer) -> list[float]:
    """Run one round per experience, the first by pretraining if asked; return the baseline.

    The baseline is the untrained model's accuracy on every experience. Collective.
    """
    experiences = trainer.parts.stream.experiences
    baseline = [trainer.accuracy(e) for e in experiences]
    rest = experiences
    if trainer.training.pretrain_epochs and not trainer.pretrained:
        trainer.pretrain(experiences[0])
        trainer.evaluate(experiences, seen=1)
        rest = experiences[1:]
    for experience in rest:
        trainer.run_round(experience, trigger="scheduled")
        trainer.evaluate(experiences, seen=experience.index + 1)
    return baseline


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
        "samples_per_second": trainer.samples_trained / trained if trained else None,
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


def save_weights(parts: Parts, path: Path) -> None:
    """Write parameters and buffers to a safetensors file, by rank 0. Collective."""
    module, partition = parts.runtime.unwrap(parts.model), parts.forward.partition
    partition.sync_buffers()
    saved = module.state_dict().keys()  # leaves out non-persistent buffers
    names = [n for n, _ in (*module.named_parameters(), *module.named_buffers()) if n in saved]
    state = {name: partition.gather(name).cpu().contiguous() for name in names}
    if parts.runtime.is_main:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(state, str(path))


class RunFolder:
    """``OUT/``: rank 0 writes, other ranks do nothing. Local calls."""

    def __init__(self, path: Path, config: Config, is_main: bool) -> None:
        self.path = path
        self._config = config
        self._is_main = is_main
        self._ready = False

    @contextmanager
    def open(self) -> Iterator[None]:
        """Make the folder, log into ``log.txt`` while inside. Raises UsageError if not writable."""
        if not self._is_main:
            yield
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self.write("config.toml", to_toml(self._config))
            handler = logging.FileHandler(self.path / "log.txt", mode="w", encoding="utf-8")
        except OSError as error:
            raise UsageError(
                f"the run folder '{self.path}' is not writable: {error.strerror or error}"
            ) from error
        self._ready = True
        self.status("running", None, "")
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
        log.addHandler(handler)
        log.setLevel(logging.INFO)
        log.propagate = False
        try:
            yield
        finally:
            log.removeHandler(handler)
            handler.close()

    def write(self, name: str, text: str) -> None:
        """Replace a file as a whole: readers see the old or the new one."""
        temporary = self.path / f".{name}.{os.getpid()}"
        temporary.write_text(text + "\n", encoding="utf-8")
        temporary.replace(self.path / name)

    def status(self, state: str, exit_code: int | None, reason: str) -> None:
        """Write ``status.json``, if the folder is in use and this is rank 0."""
        if self._is_main and self._ready:
            status = {"state": state, "exit_code": exit_code, "reason": reason}
            self.write("status.json", json.dumps(status))
