"""From a configuration to the parts of a trainer."""

from __future__ import annotations

from pathlib import Path

import torch

from distcl.anchor import Anchor
from distcl.config import Config
from distcl.data.history import CopyingStream
from distcl.inference import ShardedForward
from distcl.losses import create_loss
from distcl.models import create_model
from distcl.optim import create_optimizer
from distcl.partition.base import create_partition
from distcl.priority.feed import Feed
from distcl.priority.online import Ledger
from distcl.priority.scoring import Scorer, create_signal
from distcl.priority.weights import check_priority
from distcl.record import RoundRecorder
from distcl.runtime import Runtime
from distcl.tracking import create_tracker
from distcl.trainer import Parts
from distcl.types import Progress, Stream
from distcl.updaters import UpdaterSetup, create_updater


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
