"""From a configuration to the parts of a trainer."""

from __future__ import annotations

import logging
import math
from itertools import zip_longest
from pathlib import Path

import torch
from torch import nn

from distcl import registry
from distcl.config import Config
from distcl.config.load import to_toml
from distcl.data.replay_buffer import ReplayBuffer
from distcl.data.transforms import Transforms
from distcl.distributed.runtime import Runtime
from distcl.errors import ConfigError
from distcl.losses import bce, create_loss
from distcl.models import create_model
from distcl.parallel.anchor import Anchor
from distcl.parallel.average import WeightAverage
from distcl.parallel.inference import ShardedForward
from distcl.parallel.partition import create_partition
from distcl.priority.online import Ledger
from distcl.priority.population import Dealer
from distcl.priority.round_weights import RoundWeighter
from distcl.priority.scoring import Scorer
from distcl.priority.signals import create_signal
from distcl.registry import OBJECT
from distcl.sampling.composition import Mix
from distcl.sampling.draws import Permutations
from distcl.sampling.round_loader import RoundLoader
from distcl.tracking import create_tracker
from distcl.training.callbacks import Callbacks
from distcl.training.dry_run import DryRun
from distcl.training.optimizer import create_optimizer
from distcl.training.parts import Parts
from distcl.training.round_report import RoundRecorder
from distcl.training.scores import create_scores
from distcl.types import DataSpec, PrioritySignal, Progress, Stream, UnreducedLoss, info_of
from distcl.updaters import PassSetup, UpdaterSetup, create_updater

_POOL = 2  # a stream of draws beside those of the samplers


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
    callbacks: Callbacks | None = None,
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
    kept = ("history_store", "copy") if copies else ("update_mode", continual.update_mode)
    if info_of(stream).varies and (copies or continual.update_mode in ("lwf", "der")):
        raise ConfigError(
            f"continual_learning.{kept[0]} = '{kept[1]}' keeps what belongs to samples side by "
            "side, so they must be equally long: cut texts to one length (source 'text' with pack)"
        )
    if info_of(stream).varies and continual.update_mode == "kfac_online":
        raise ConfigError(
            "continual_learning.update_mode = 'kfac_online' counts all positions of a batch, "
            "padding too: cut texts to one length (source 'text' with pack)"
        )
    takes = continual.history_of == "all"
    if not takes and info_of(stream).general is None:
        raise ConfigError("continual_learning.history_of = 'general' needs stream.general")
    if not takes and continual.buffer_size:
        raise ConfigError(
            f"continual_learning.buffer_size = {continual.buffer_size} bounds what earlier "
            "experiences leave; history_of = 'general' keeps nothing of them"
        )
    history = ReplayBuffer(stream, continual.buffer_size, seed, copies, takes)
    criterion, signal = create_judges(config, stream.spec)
    importance = config.continual_learning.importance_weighting
    sequential = info_of(stream).sequential
    tried, scored = create_judges(config, stream.spec)
    scores = create_scores(config.model, stream.spec)
    dry = DryRun(config, runtime, stream, tried, scored if importance else None, scores)
    raw = create_model(config.model, stream.spec, seed, dry.x)
    if config.model.name.startswith(OBJECT):
        make_equal(runtime, raw)
    dry.before(raw)
    names = [name for name, p in raw.named_parameters() if p.requires_grad]
    model, optimizer = runtime.prepare_training(
        raw, lambda params: create_optimizer(config.optimizer, params, names), dry.unused
    )
    dry.after(model)
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
    replays = updater.uses_hist_batch or continual.mix_historic_data
    if info_of(stream).general is not None and not replays and runtime.is_main:
        log.warning(
            "[data] stream.general is not replayed: update_mode = '%s' takes no history; set "
            "continual_learning.mix_historic_data = true, or another update_mode",
            continual.update_mode,
        )
    if importance:
        check_priority(config, signal, updater.uses_hist_batch, sequential)
    if config.training.normalize == "token" and not (stream.spec.classes and stream.spec.y_shape):
        raise ConfigError(
            "training.normalize = 'token' needs several labels a sample, as texts have, but a "
            f"target of this stream has shape {list(stream.spec.y_shape)}; leave it at 'sample'"
        )
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
        math.log(max(2, stream.spec.classes)),
    )
    mix = Mix(config.training, continual, config.priority.target == "union")
    loader = RoundLoader(runtime, history.source, weighter, mix, config.priority, config.data, seed)
    shown = progress if progress is not None and runtime.is_main else Quiet()
    tracker = create_tracker(config.tracking, out, runtime.rank, resume, shown.message)
    return Parts(
        runtime=runtime,
        stream=stream,
        history=history,
        model=model,
        optimizer=optimizer,
        anchor=anchor,
        average=WeightAverage(partition, config.training.ema, config.training.swa),
        forward=forward,
        scorer=scorer,
        updater=updater,
        loader=loader,
        tracker=tracker,
        recorder=RoundRecorder(runtime, out / "draws", tracker, loader, forward, updater),
        progress=shown,
        scores=scores,
        callbacks=callbacks or Callbacks(),
    )


def make_equal(runtime: Runtime, model: nn.Module) -> None:
    """Give a module of each rank's own rank 0's weights and buffers. Collective.

    Raises ConfigError, on every rank, if they have not the same names and shapes.
    """
    state = model.state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    every = runtime.gather_objects(shapes)
    for rank, other in enumerate(every):
        if other != every[0]:
            raise ConfigError(f"the model given on rank {rank} is another one than on rank 0")
    for tensor in state.values() if runtime.world_size > 1 else ():
        tensor.copy_(runtime.broadcast(tensor))


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
    online, candidates = p.source == "online", p.source == "candidates"
    once, credit = p.draw == "without_replacement", p.draw == "credit"
    ahead = 2 * config.data.workers
    other = "source = 'candidates'" if candidates else f"draw = '{p.draw}'"
    works_not = "does not work with priority."
    refused = (
        (
            sequential and p.source != "score",
            f"priority.source = '{p.source}' draws at random, which a stream of shards cannot be "
            "read by; use 'score', or data.access = 'indexed'",
        ),
        (
            p.source != "score" and p.target == "history" and not replays,
            f"priority.target = 'history' has nothing to weigh: update_mode = '{mode}' takes no "
            "history batches, and continual_learning.mix_historic_data is false",
        ),
        (
            online and signal.needs_anchor,
            f"priority.signal = '{p.signal}', which needs a forward under theta_star, {works_not}"
            "source = 'online', which makes none: use entropy, loss, grad_norm or fisher",
        ),
        (
            online and once,
            f"priority.draw = 'without_replacement' {works_not}source = 'online', whose weights "
            "change while it draws: use systematic",
        ),
        (
            online and p.refresh_steps < ahead,
            f"data.workers = {config.data.workers} {works_not}refresh_steps = {p.refresh_steps}: "
            f"they read {ahead} batches ahead, which must be less than the steps between two "
            "refreshes",
        ),
        (
            p.gate
            and (p.signal != "entropy" or registry.resolve("loss", config.model.loss) is bce),
            f"priority.gate = {p.gate:g} {works_not}signal = '{p.signal}' and model.loss = "
            f"'{config.model.loss}': it compares the mean entropy of classes with the largest "
            "there can be, ln C",
        ),
        (
            credit and (p.pool > 0 or sequential),
            f"priority.draw = 'credit' {works_not}"
            + (
                "a stream of shards; use data.access = 'indexed'"
                if sequential
                else f"pool = {p.pool}: each sample of the history earns its draws; use pool = 0"
            ),
        ),
        (
            p.pool and not online,
            f"priority.source = '{p.source}' {works_not}pool = {p.pool}, which is for source = "
            "'online'",
        ),
        (
            candidates and p.guard == "auto",
            f"priority.guard = 'auto' {works_not}source = 'candidates', which has no weights to "
            "judge before",
        ),
        (
            candidates and not takes_history and p.target == "history",
            f"priority.source = 'candidates' {works_not}target = 'history' and mixed batches: use "
            "target = 'union', or an update_mode that takes history batches",
        ),
        (
            p.correction and (candidates or once or credit),
            f"priority.correction = {p.correction} {works_not}{other}, whose draws have no "
            "probabilities of their own",
        ),
    )
    for applies, why in refused:
        if applies:
            raise ConfigError(why)


def check_ranks(config: Config, runtime: Runtime) -> None:
    """Raise ConfigError where ranks were given different things, or a batch is too small for all.

    Collective.
    """
    texts = [text.splitlines() for text in runtime.gather_objects(to_toml(config))]
    for peer, lines in zip(runtime.peers, texts, strict=True):
        if lines != texts[0]:
            pairs = zip_longest(lines, texts[0], fillvalue="nothing")
            theirs, ours = next(pair for pair in pairs if pair[0] != pair[1])
            raise ConfigError(
                f"rank {peer.rank} on {peer.node} has '{theirs}' where rank 0 has '{ours}'; give "
                "all processes the same file, DISTCL_ environment and --set"
            )
    for key, size, what in (
        ("training.batch_size", config.training.batch_size, "the"),
        ("continual_learning.replay_batch_size", config.continual_learning.replay_batch_size, "a"),
    ):
        if 0 < size < runtime.world_size:
            raise ConfigError(
                f"{key} = {size} is smaller than the number of processes, {runtime.world_size}; it "
                f"is {what} global batch"
            )
