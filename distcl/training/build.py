"""From a configuration to the parts of a trainer."""

from __future__ import annotations

from pathlib import Path

import torch

from distcl.config import Config
from distcl.data.replay_buffer import ReplayBuffer
from distcl.data.transforms import Transforms
from distcl.distributed.runtime import Runtime
from distcl.errors import ConfigError
from distcl.losses import create_loss, judged_by
from distcl.models import create_model
from distcl.parallel.anchor import Anchor
from distcl.parallel.inference import ShardedForward
from distcl.parallel.partition import create_partition
from distcl.priority.online import Ledger
from distcl.priority.population import Dealer
from distcl.priority.round_weights import RoundWeighter
from distcl.priority.scoring import Scorer
from distcl.priority.signals import create_signal
from distcl.sampling.composition import Mix
from distcl.sampling.draws import Permutations
from distcl.sampling.round_loader import RoundLoader
from distcl.tracking import create_tracker
from distcl.training.dry_run import DryRun
from distcl.training.optimizer import create_optimizer
from distcl.training.parts import Parts
from distcl.training.round_report import RoundRecorder
from distcl.types import DataSpec, PrioritySignal, Progress, Stream, UnreducedLoss, info_of
from distcl.updaters import PassSetup, UpdaterSetup, create_updater

_POOL = 2  # a stream of draws beside those of the samplers


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
    continual = config.continual_learning
    copies = continual.history_store == "copy"
    if copies and (random := Transforms(config.data.transforms).random):
        raise ConfigError(
            f"data.transforms has '{random[0]}', which is random: it reads a sample anew in "
            "each epoch; continual_learning.history_store = 'copy' keeps what was read once. "
            "Use history_store = 'ids', or transforms that are not random"
        )
    history = ReplayBuffer(stream, continual.buffer_size, seed, copies)
    criterion, signal = create_judges(config, stream.spec)
    importance = config.continual_learning.importance_weighting
    sequential = info_of(stream).sequential
    dry = DryRun(config, runtime, stream)
    raw = create_model(config.model, stream.spec, seed, dry.x)
    tried, scored = create_judges(config, stream.spec)  # they may count what they are asked
    dry.before(raw, tried, scored if importance else None)
    model, optimizer = runtime.prepare_training(
        raw, lambda params: create_optimizer(config.optimizer, params), dry.unused
    )
    dry.after(model, tried, scored if importance else None)
    partition = create_partition(runtime, model)
    forward = ShardedForward(runtime, model, partition, criterion)
    keep = getattr(signal, "anchors", 1) if importance else 1
    host = torch.device("cpu") if config.parallel.anchor_device == "cpu" else None
    anchor = Anchor(partition, keep, host, undo=config.training.accept == "improves")
    priority = config.priority
    scorer = Scorer(forward, anchor, signal, priority.score_batch, priority.min_score)
    ledger = None
    if importance and config.priority.source == "online":
        ledger = Ledger(runtime, signal, stream.spec.classes)
    updater = create_updater(
        config.continual_learning.update_mode,
        UpdaterSetup(
            config=config.continual_learning,
            model=model,
            optimizer=optimizer,
            scorer=scorer,
            seed=seed,
            pretrained=bool(config.model.pretrained),
            ledger=ledger,
            passes=PassSetup(config.training.accumulate, dry.stand_in, dry.alone),
        ),
    )
    if importance:
        check_priority(config, signal, updater.uses_hist_batch, sequential)
    judged_by(config.model.loss, stream.spec)
    dry.conclude()
    dealer = None
    if sequential:
        lanes_of = stream.lanes_of  # type: ignore[attr-defined]
        dealer = Dealer.over(runtime, config.data.lanes, lanes_of)
    weighter = RoundWeighter(
        history.source,
        config.priority,
        config.continual_learning.importance_alpha,
        scorer,
        ledger,
        dealer,
        Permutations(seed, _POOL).take,
    )
    mix = Mix(config.training, continual, config.priority.target == "union")
    shown = progress if progress is not None and runtime.is_main else Quiet()
    tracker = create_tracker(config.tracking, out, runtime.rank, resume, shown.message)
    return Parts(
        runtime=runtime,
        stream=stream,
        history=history,
        model=model,
        optimizer=optimizer,
        anchor=anchor,
        forward=forward,
        scorer=scorer,
        updater=updater,
        loader=RoundLoader(
            runtime, history.source, weighter, mix, config.priority, config.data, seed
        ),
        tracker=tracker,
        recorder=RoundRecorder(runtime, out, tracker),
        progress=shown,
    )


def create_judges(config: Config, spec: DataSpec) -> tuple[UnreducedLoss, PrioritySignal]:
    """Return the configured loss and, of it, the signal. Local."""
    criterion = create_loss(config.model.loss)
    signal = create_signal(
        config.priority.signal,
        config.priority.options,
        criterion=criterion,
        loss=config.model.loss,
        classes=spec.classes,
    )
    return criterion, signal


def check_priority(
    config: Config, signal: PrioritySignal, takes_history: bool, sequential: bool = False
) -> None:
    """Raise ConfigError, naming both, for keys that cannot be combined.

    ``sequential``: the source is read from front to back.
    """
    p, mode = config.priority, config.continual_learning.update_mode
    replays = takes_history or config.continual_learning.mix_historic_data

    def refuse(key: str, why: str) -> None:
        raise ConfigError(f"{key} does not work with priority.{why}")

    if sequential and p.source != "score":
        raise ConfigError(
            f"priority.source = '{p.source}' draws at random, which a stream of shards cannot be "
            "read by; use 'score', or data.access = 'indexed'"
        )

    if p.source != "score" and p.target == "history" and not replays:
        raise ConfigError(
            f"priority.target = 'history' has nothing to weigh: update_mode = '{mode}' takes no "
            "history batches, and continual_learning.mix_historic_data is false"
        )
    if p.source == "online":
        if signal.needs_anchor:
            refuse(
                f"priority.signal = '{p.signal}', which needs a forward under theta_star,",
                "source = 'online', which makes none: use entropy, loss, grad_norm or fisher",
            )
        if p.draw == "without_replacement":
            refuse(
                "priority.draw = 'without_replacement'",
                "source = 'online', whose weights change while it draws: use systematic",
            )
        if p.refresh_steps < 2 * config.data.workers:
            refuse(
                f"data.workers = {config.data.workers}",
                f"refresh_steps = {p.refresh_steps}: they read {2 * config.data.workers} batches "
                "ahead, which must be less than the steps between two refreshes",
            )
    elif p.pool:
        refuse(
            f"priority.source = '{p.source}'", f"pool = {p.pool}, which is for source = 'online'"
        )
    if p.source == "candidates" and p.guard == "auto":
        refuse(
            "priority.guard = 'auto'", "source = 'candidates', which has no weights to judge before"
        )
    if p.source == "candidates" and not takes_history and p.target == "history":
        refuse(
            "priority.source = 'candidates'",
            "target = 'history' and mixed batches: use target = 'union', or an update_mode that "
            "takes history batches",
        )
    if p.correction and (p.source == "candidates" or p.draw == "without_replacement"):
        other = "source = 'candidates'" if p.source == "candidates" else f"draw = '{p.draw}'"
        refuse(
            f"priority.correction = {p.correction}",
            f"{other}, whose draws have no probabilities of their own",
        )
