"""A whole run of a command: from its first step or a checkpoint to the run folder it leaves."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from distcl import registry
from distcl.checkpoint.compatible import check_config, check_data
from distcl.checkpoint.preemption import Preemption
from distcl.checkpoint.saver import Keeper
from distcl.checkpoint.state import JobState, collect, registered, restore
from distcl.checkpoint.store import CheckpointStore, read_manifest, verify
from distcl.config import Config
from distcl.config.paths import reachable
from distcl.data.stream import create_stream
from distcl.distributed.failure import Cause, cause_of
from distcl.distributed.memory import give_back
from distcl.distributed.runtime import Runtime
from distcl.errors import CheckpointError, DivergenceError, Preempted, UsageError
from distcl.monitoring.monitor import Monitor
from distcl.reporting.progress import FolderProgress
from distcl.reporting.run_folder import RunFolder
from distcl.reporting.summary import draw_matrix, save_final, summarize
from distcl.tracking.tracker import Tracker, Trackers
from distcl.training.build import Quiet, assemble, check_ranks
from distcl.training.callbacks import Callbacks
from distcl.training.foresight import foresee_rounds
from distcl.training.step_loop import Keeping
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
    overwrite: bool = False,
    numbered: bool = False,
    callbacks: Sequence[object] = (),
) -> dict[str, Any]:
    """Run a command and return its summary (the same on every rank). Collective.

    ``out``: the run folder; with ``numbered`` the first of OUT, OUT-2, … that is free.
    ``resume``: never begins anew, and a folder that holds a run is refused unless ``overwrite``;
    auto goes on, in the run's own folder, from the newest checkpoint that verifies, if there is
    one; else the path of a checkpoint. ``allow_changed``: keys of the configuration that may differ
    from the checkpoint's, and "data", if those may. ``tell`` shows the user one message, on rank 0,
    if another rank fails; then the process exits. ``callbacks``: see
    :class:`distcl.training.callbacks.Callback`.

    Raises the errors of ``distcl.errors``; ``OUT/status.json`` says how it ended.
    """
    watched = Callbacks(callbacks)  # what is wrong with them is told before a folder is replaced
    runtime = Runtime(config.run, config.parallel, config.training)
    folder = RunFolder(out, config, runtime.is_main, command, numbered)
    job: Job | None = None

    def peer_failed(cause: Cause) -> None:
        message = f"rank {cause.rank}: {cause.message}"
        folder.status("failed", cause.exit_code, message)
        if not runtime.is_main:
            folder.failed_without_rank_0(cause.exit_code, message)
        if tell is not None:
            tell(message)

    def note(cause: Cause) -> None:
        whose = f"rank {cause.rank}: " if cause.rank else ""
        folder.status("failed", cause.exit_code, f"{whose}{cause.message}")

    runtime.on_failure(peer_failed, note)
    try:
        with runtime.guard():
            check_ranks(config, runtime)
            with folder.open(resume, overwrite, runtime.broadcast) as settled:
                job = Job(command, settled, runtime, folder, progress, watched)
                log.info(runtime.about)
                runtime.watchdog.write_to(folder.path / "log.txt")
                if folder.path != out:
                    job.say(f"the run folder is {folder.path}")
                return job.run(resume, frozenset(allow_changed))
    except BaseException as error:
        cause = cause_of(error, runtime.rank)
        state = "preempted" if isinstance(error, Preempted) else "failed"
        folder.status(state, cause.exit_code, cause.message)
        if job is not None:
            job.tracker.finish("failed")
        raise


class Job:
    """One run of a command, from its first step or from a checkpoint. Methods are collective."""

    def __init__(
        self,
        command: Command,
        config: Config,
        runtime: Runtime,
        folder: RunFolder,
        progress: Progress | None,
        callbacks: Callbacks,
    ) -> None:
        self._command = command
        self._config = config
        self._runtime = runtime
        self._folder = folder
        self._progress = progress
        self._callbacks = callbacks
        self.tracker: Tracker = Trackers()
        self._store = CheckpointStore(
            runtime,
            folder.path / "checkpoints",
            config.checkpoint.keep,
            self.say,
            published=lambda path: self.tracker.checkpoint(path),
        )
        self._preemption = Preemption(config.run.max_minutes)
        self._rollbacks = 0

    def run(self, resume: str, allowed: frozenset[str]) -> dict[str, Any]:
        """Run to the end and return the summary."""
        self._preemption.install()
        try:
            path = self._start_from(resume)
            if path is not None:
                saved = read_manifest(path)["config"]
                check_config(path, saved, self._config, allowed, self.say)
                self.say(f"[resume] from {path}")
            while True:
                try:
                    return self._attempt(path, allowed)
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
            return None
        if resume == "auto":
            found = self._store.newest()
            before = self._folder.before
            if found is None and before.get("state") == "done":
                raise UsageError(
                    f"'{self._folder.path}' holds a run that is done and left no checkpoint to go "
                    "on from: replace it (--overwrite), or give --out another folder"
                )
            return found
        path = reachable(resume, CheckpointError)
        if not path.is_dir():
            raise CheckpointError(f"checkpoint '{resume}' does not exist")
        verify(path, self._runtime)
        return path

    def _rolled_back(self, error: DivergenceError) -> Path:
        """Return the checkpoint to go back to after a divergence, or raise it again."""
        limit = self._config.training.max_rollbacks
        if limit == 0 or not self._runtime.all_raised():  # alone, a rank cannot go back
            raise error
        self._store.finish()  # what was saved before the divergence
        path = self._store.newest()
        if path is None:
            raise DivergenceError(f"{error}; there is no checkpoint to roll back to") from error
        self._rollbacks += 1
        if self._rollbacks > limit:
            raise DivergenceError(f"{error}; {limit} rollbacks did not help") from error
        self.say(f"[rollback] {error}; back to {path.name} with half the learning rate")
        return path

    def _attempt(self, path: Path | None, allowed: frozenset[str]) -> dict[str, Any]:
        """Run from a checkpoint, or from the start, to the end; return the summary."""
        config, runtime, state = self._config, self._runtime, JobState(self._command)
        torch.manual_seed(config.run.seed + runtime.rank)
        stream = create_stream(config.stream, config.run.seed, config.data)
        grows = self._command != "train" and bool(
            stream.info.sequential or stream.info.live_seconds
        )
        data = check_data(path, stream, runtime, grows, "data" in allowed, self.say)
        give_back()  # labels of all samples were needed to make it
        progress = None
        if runtime.is_main:
            stages = len(stream.experiences) if self._command == "train" else 0
            progress = FolderProgress(self._progress or Quiet(), self._folder.path, stages)
        resume = path is not None
        to = self._folder.path
        parts = assemble(config, runtime, stream, to, progress, resume, self._callbacks)
        self.tracker = parts.tracker
        keeper = Keeper(
            runtime,
            self._store,
            config.checkpoint,
            self._preemption,
            contents=lambda: collect(saved, config, trainer, data()),
            steps=lambda: trainer.loop.steps,
        )
        trainer = ContinuousTrainer(parts, config, keeper)
        monitor = None
        if self._command != "train":
            chosen = config.detector
            detector = registry.create("detector", chosen.name, options=chosen.options)
            monitor = Monitor(trainer, detector, config.monitor, config.run.seed)
        saved = registered(state, trainer, monitor)
        if path is not None:
            restore(path, saved, self._command, trainer)
            if runtime.is_main:
                self._store.go_on_from(trainer.loop.steps)
            if progress is not None:
                progress.resumed(len(trainer.rounds) + (trainer.pretraining is not None))
        elif monitor is None:
            foresee_rounds(parts.updater, config, stream.experiences, stream.info)
        setup = state.here
        self._rollbacks = max(self._rollbacks, state.rollbacks)
        trainer.loop.halve_rates(self._rollbacks - state.rollbacks)
        state.rollbacks = self._rollbacks
        if monitor is None:
            run_rounds(trainer, state, keeper)
        else:
            monitor.run() if self._command == "run" else monitor.detect()
        keeper.finish()
        if config.checkpoint.save_final:
            final = self._folder.path / "checkpoints" / "final.safetensors"
            save_final(parts, final)
            self.tracker.checkpoint(final)
        return self._finish(
            summarize(trainer, monitor, state.baseline, config, state.seconds, setup)
        )

    def _finish(self, summary: dict[str, Any]) -> dict[str, Any]:
        """Leave the summary where it belongs, and a report; return it."""
        folder, main = self._folder, self._runtime.is_main
        if main:
            folder.write("summary.json", json.dumps(summary, indent=2, allow_nan=False))
        self.tracker.summarize(summary, partial(draw_matrix, summary))
        self.tracker.finish()
        folder.status("done", 0, "")
        if main and self._config.run.report:
            from distcl.reporting.page import write_report

            try:
                write_report([folder.path], folder.path / "report.html")
            except UsageError as error:  # the run itself is done
                self.say(f"[report] {error}")
        return summary

    def say(self, text: str) -> None:
        """Log one line and show it, on rank 0. Local."""
        if self._runtime.is_main:
            log.info(text)
            if self._progress is not None:
                self._progress.message(text)


def run_rounds(
    trainer: ContinuousTrainer, state: JobState | None = None, keeper: Keeping | None = None
) -> None:
    """Run one round per experience, the first by pretraining if asked. Collective.

    ``state.baseline`` becomes the untrained model's leading score on every experience.
    """
    state, keeper = state or JobState("train"), keeper or Keeping()
    experiences = trainer.parts.stream.experiences
    if not state.baseline:
        state.baseline = [trainer.lead([e]) for e in experiences]
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
