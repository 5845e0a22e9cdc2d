"""A whole run of a command: from its first step or a checkpoint to the run folder it leaves."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Collection, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal

import torch

from distcl import registry
from distcl.checkpoint.preemption import Preemption
from distcl.checkpoint.saver import Contents, Keeper
from distcl.checkpoint.state import JobState, check_config, collect, restore
from distcl.checkpoint.store import CheckpointStore, read_manifest
from distcl.config import Config
from distcl.config.load import to_toml
from distcl.data.stream import create_stream
from distcl.distributed.failure import Cause, describe
from distcl.distributed.memory import give_back
from distcl.distributed.runtime import Runtime
from distcl.errors import CheckpointError, ConfigError, DivergenceError, Preempted, UsageError
from distcl.monitoring.monitor import Monitor
from distcl.reporting.progress import FolderProgress
from distcl.reporting.run_folder import RunFolder
from distcl.reporting.summary import chance, save_final, summarize
from distcl.tracking.tracker import Tracker, Trackers
from distcl.training.build import Quiet, assemble
from distcl.training.foresight import foresee_rounds
from distcl.training.trainer import ContinuousTrainer
from distcl.types import Progress

Command = Literal["run", "train", "detect"]

log = logging.getLogger("distcl")


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

    def note(cause: Cause) -> None:
        whose = f"rank {cause.rank}: " if cause.rank else ""
        folder.status("failed", cause.exit_code, f"{whose}{cause.message}")

    if runtime.relay is not None:
        runtime.relay.tell = peer_failed
        runtime.relay.note = note
    job = Job(command, config, runtime, folder, progress)
    try:
        with runtime.guard():
            _check(command, config, runtime)
            with folder.open(append=resume != "never"):
                log.info(runtime.about)
                runtime.watchdog.write_to(out / "log.txt")
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
        self._store.finish()  # what was saved before the divergence
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
        give_back()  # labels of all samples were needed to make it
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
            if runtime.is_main:
                self._store.go_on_from(trainer.loop.steps)
            if progress is not None:
                progress.resumed(len(trainer.rounds) + (trainer.pretraining is not None))
        before, setup = state.seconds, time.perf_counter() - begun
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
            if path is None:
                sequential = bool(getattr(parts.stream, "sequential", False))
                foresee_rounds(parts.updater, config, stream.experiences, sequential)
            train(trainer, state)
            drifts: list[int] = []
            baseline: Sequence[float | None] = state.baseline
        else:
            monitor.run() if self._command == "run" else monitor.detect()
            drifts = monitor.drifts
            baseline = [chance(trainer)] * len(monitor.experiences)
        keeper.finish()
        if config.checkpoint.save_final:
            final = folder.path / "checkpoints" / "final.safetensors"
            save_final(parts, final)
            self.tracker.checkpoint(final)
        seconds = before + time.perf_counter() - begun
        summary = summarize(trainer, baseline, drifts, config, seconds, setup)
        if runtime.is_main:
            folder.write("summary.json", json.dumps(summary, indent=2, allow_nan=False))
        self.tracker.summarize(summary)
        self.tracker.finish()
        folder.status("done", 0, "")
        if runtime.is_main and config.run.report:
            self._report(folder.path)
        return summary

    def _report(self, path: Path) -> None:
        from distcl.reporting.page import write_report

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
