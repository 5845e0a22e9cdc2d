"""The stream loop around the rounds: watch a metric, detect drift, start a round."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import numpy as np
import torch

from distcl.config import MonitorConfig
from distcl.errors import ConfigError
from distcl.priority.draws import generator
from distcl.stream_metrics import StreamMetric, create_metric
from distcl.trainer import ContinuousTrainer
from distcl.types import WATCHING, Batch, Detector, Experience, Ids

log = logging.getLogger("distcl")

_SPLIT = 0x5E1D


@dataclass(frozen=True, slots=True)
class _Due:
    """A drift that waits for its round: the sample that gave it away, and how many must be there.

    ``ready``: samples, from the start of the stream, that have come (with labels, if a round is to
    learn from them) before the drift is dealt with.
    """

    sample: int
    ready: int


class Monitor:
    """Watches the stream with the model in use. Every method is collective.

    The first part of the first experience pretrains the model (if asked); what follows is watched,
    sample by sample in stream order. The metric is computed by all ranks together; rank 0 feeds
    the detector, and its verdict is every rank's.

    Labels of a sample come ``label_delay`` samples after it, or never. A metric that needs them is
    computed when they come, with the model of that time; one that does not, at once. A round learns
    from labelled samples only, and waits for ``collect`` of them after the drift. Where labels
    never come, drifts are reported and no round starts.
    """

    def __init__(
        self, trainer: ContinuousTrainer, detector: Detector, config: MonitorConfig, seed: int
    ) -> None:
        self.trainer = trainer
        self.detector = detector
        self.config = config
        self.seed = seed
        self.metric = create_metric(config, trainer.parts.stream.spec, trainer.loss_name)
        self.metric_name = config.metric.rpartition(":")[2]
        self.experiences: list[Experience] = []
        self.drifts: list[int] = []
        self.watched = 0
        """Samples of the stream that have come."""
        self.measured = 0
        """Samples of the stream whose metric the detector has been fed, or that it skips."""
        self._order = np.concatenate([e.train for e in trainer.parts.stream.experiences])
        self._pretrained_on = 0  # samples of the stream, all labelled, before watching begins
        self._last_round = 0  # samples of the stream that rounds have learned from, or let pass
        self._quiet_until = 0  # the sample from which on the detector may fire

    def run(self) -> None:
        """Watch the whole stream; a round on every drift, unless labels never come."""
        if self.config.label_delay < 0:
            self._say("labels never come (monitor.label_delay = -1): drifts start no rounds")
        self._pretrain()
        self._watch(rounds=self.config.label_delay >= 0)

    def detect(self) -> None:
        """Watch the whole stream and only note drifts."""
        self._pretrain()
        self._watch(rounds=False)

    # -- parts of the loop ---------------------------------------------------------------------

    def _pretrain(self) -> None:
        first = self.trainer.parts.stream.experiences[0]
        known, warmup = 0, self.config.warmup
        if self.trainer.training.pretrain_epochs and not self.trainer.pretrained:
            known = max(2, int(self.config.pretrain_fraction * len(first.train)))
            known = min(known, len(first.train))
            self.trainer.pretrain(self._form(self._order[:known]))
            self.trainer.evaluate(self.experiences, seen=1)
        elif type(self.metric).begin is not StreamMetric.begin:
            known, warmup = warmup, 0
            if not 2 <= known <= len(self._order):
                raise ConfigError(
                    f"monitor.metric = '{self.config.metric}' compares samples with those trained "
                    "on; without pretraining it takes the first monitor.warmup samples for these, "
                    f"which is {known} of {len(self._order)}"
                )
        self.watched = self.measured = self._pretrained_on = self._last_round = known
        self._quiet_until = known + warmup
        if known:
            self.metric.begin(self.trainer.parts.stream, self._order[:known])

    def _watch(self, rounds: bool) -> None:
        """Go through the stream. ``rounds``: drifts start rounds; else they are only noted."""
        total, progress = len(self._order), self.trainer.parts.progress
        due: _Due | None = None
        progress.round_begins(WATCHING, total, self.metric_name)
        while self.watched < total:
            self.watched = min(self.watched + self.config.batch_size, total)
            fired = self._measure(self._labelled if self.metric.needs_labels else self.watched)
            if fired is not None and due is None:
                self._note(fired)
                due = _Due(fired, fired + self.config.collect + 1)
            if due is None or not self._ready(due, rounds):
                continue
            due = None
            if rounds:
                self._round()
                progress.round_begins(WATCHING, total, self.metric_name)
            if self.config.reset_detector or not rounds:
                self.detector.reset()
            self._quiet_until = self.measured + self.config.cooldown
            if self.config.max_rounds and len(self.trainer.rounds) >= self.config.max_rounds:
                return
        if due is not None and rounds:
            self._say("the stream ended before labels followed its last drift: no round for it")

    @property
    def _labelled(self) -> int:
        """Samples, from the start of the stream, whose labels have come."""
        if self.config.label_delay < 0:
            return self._pretrained_on
        return max(self._pretrained_on, self.watched - self.config.label_delay)

    def _ready(self, due: _Due, rounds: bool) -> bool:
        """Tell whether a drift can be dealt with: enough samples are there, or no more will be."""
        have = self._labelled if rounds else self.measured
        if self.watched == len(self._order):
            return have > due.sample and have >= self._last_round + 2
        return have >= max(due.ready, self._last_round + 2)

    def _measure(self, until: int) -> int | None:
        """Feed the detector up to stream position ``until``; return where it fired, or None."""
        ids = self._order[self.measured : until]
        if len(ids) == 0:
            return None
        values = self._values(ids)
        fired = self._verdict(values, self._quiet_until - self.measured)
        sample = None if fired is None else self.measured + fired
        self.measured = until
        mean = float(values.mean())
        self.trainer.parts.tracker.log(
            {
                "round": len(self.trainer.rounds),
                "position": self.watched,
                f"monitor/{self.metric_name}": mean,
            },
            self.trainer.steps,
        )
        self.trainer.parts.progress.step(self.watched, mean, 0.0)
        return sample

    def _note(self, sample: int) -> None:
        """Note a drift, at the stream position at which it could be known."""
        late = self.config.label_delay if self.metric.needs_labels else 0
        self.drifts.append(sample + late)
        self._say(f"[drift] at stream position {sample + late}")

    def _round(self) -> None:
        labelled = self._labelled
        begin = max(self._last_round, labelled - self.config.window)
        experience = self._form(self._order[begin:labelled])
        self.trainer.matrix.fill_last(self.trainer.accuracy(experience))
        self.trainer.run_round(experience, trigger=f"drift at {self.drifts[-1]}")
        self.trainer.evaluate(self.experiences, seen=len(self.experiences))
        self._last_round = labelled
        self.metric.begin(self.trainer.parts.stream, self._order[begin:labelled])

    def _form(self, ids: Ids) -> Experience:
        """Make an experience of stream samples, a random share of them held out."""
        index = len(self.experiences)
        order = generator(self.seed, index, _SPLIT).permutation(len(ids))
        held = max(1, int(self.config.holdout_fraction * len(ids)))
        experience = Experience(
            index=index,
            train=ids[np.sort(order[held:])],
            test=ids[np.sort(order[:held])],
            name=f"stream[{len(ids)}]",
        )
        self.experiences.append(experience)
        return experience

    def _values(self, ids: Ids) -> torch.Tensor:
        """Return the metric of each sample, [B], on the CPU of every rank."""
        forward, metric = self.trainer.parts.forward, self.metric

        def measure(batch: Batch) -> torch.Tensor:
            with forward.runtime.autocast():
                logits = forward.module(batch.x) if metric.needs_model else None
                values = metric.measure(batch, logits)
            if values.shape != (len(batch),):
                raise ConfigError(
                    f"monitor.metric = '{self.config.metric}' must return one number per sample, "
                    f"shape [{len(batch)}], but returned {list(values.shape)}"
                )
            return values.to(forward.runtime.dtype)

        size = self.trainer.training.eval_batch_size
        return forward.per_batch(self.trainer.parts.stream, ids, size, measure).cpu()

    def _verdict(self, values: torch.Tensor, quiet: int) -> int | None:
        """Return where in the block the detector fired, after ``quiet`` samples, or None."""
        runtime = self.trainer.parts.runtime
        fired = -1
        if runtime.is_main:
            sign = 1 if self.metric.good == "low" else -1
            for k, value in enumerate(values.tolist()):
                if self.detector.update(sign * value) and k >= quiet:
                    fired = k
                    break
        answer = int(runtime.all_reduce(torch.tensor(fired, device=runtime.device), "max"))
        return answer if answer >= 0 else None

    def _say(self, text: str) -> None:
        if self.trainer.parts.runtime.is_main:
            log.info(text)
            self.trainer.parts.progress.message(text)
