"""The stream loop around the rounds: watch a metric, detect drift, start a round."""

from __future__ import annotations

import logging
from collections.abc import Callable

import numpy as np
import torch

from distcl.config import MonitorConfig
from distcl.losses import per_sample_error
from distcl.priority.draws import generator
from distcl.trainer import ContinuousTrainer
from distcl.types import Detector, Experience, Ids, Outputs, PyTree

log = logging.getLogger("distcl")

_SPLIT = 0x5E1D


class Monitor:
    """Watches the stream with the model in use. Every method is collective.

    The first part of the first experience pretrains the model (if asked); what follows is watched,
    sample by sample in stream order. The metric is computed by all ranks together; rank 0 feeds
    the detector, and its verdict is every rank's.
    """

    def __init__(
        self, trainer: ContinuousTrainer, detector: Detector, config: MonitorConfig, seed: int
    ) -> None:
        self.trainer = trainer
        self.detector = detector
        self.config = config
        self.seed = seed
        self.experiences: list[Experience] = []
        self.drifts: list[int] = []
        self.watched = 0
        self._last_round = 0

    def run(self) -> None:
        """Watch the whole stream; a round on every drift."""
        self._pretrain()
        self._watch(self._round)

    def detect(self) -> None:
        """Watch the whole stream and only note drifts."""
        self._pretrain()
        self._watch(None)

    # -- parts of the loop ---------------------------------------------------------------------

    def _pretrain(self) -> None:
        first = self.trainer.parts.stream.experiences[0]
        self._order = np.concatenate([e.train for e in self.trainer.parts.stream.experiences])
        if self.trainer.training.pretrain_epochs and not self.trainer.pretrained:
            self.watched = max(2, int(self.config.pretrain_fraction * len(first.train)))
            self.watched = min(self.watched, len(first.train))
            self.trainer.pretrain(self._form(self._order[: self.watched]))
            self.trainer.evaluate(self.experiences, seen=1)
        self._last_round = self.watched

    def _watch(self, start_round: Callable[[], None] | None) -> None:
        begin, total = self.watched, len(self._order)
        progress = self.trainer.parts.progress
        quiet_until = begin + self.config.warmup
        round_at: int | None = None
        progress.round_begins("watching the stream", total, self.config.metric)
        while self.watched < total:
            ids = self._order[self.watched : self.watched + self.config.batch_size]
            values = self._metric(ids)
            drift = self._verdict(values, quiet_until - self.watched)
            if drift is not None and round_at is None:
                self.drifts.append(self.watched + drift)
                self._say(f"[drift] at stream position {self.watched + drift}")
                round_at = self.watched + drift + self.config.collect
            self.watched += len(ids)
            mean = float(values.mean())
            self.trainer.parts.tracker.log(
                {
                    "round": len(self.trainer.rounds),
                    "position": self.watched,
                    f"monitor/{self.config.metric}": mean,
                },
                self.trainer.steps,
            )
            progress.step(self.watched, mean, 0.0)
            if round_at is None or self.watched < min(round_at + 1, total):
                continue
            round_at = None
            if start_round is not None:
                start_round()
                progress.round_begins("watching the stream", total, self.config.metric)
            if self.config.reset_detector or start_round is None:
                self.detector.reset()
            quiet_until = self.watched + self.config.cooldown
            if self.config.max_rounds and len(self.trainer.rounds) >= self.config.max_rounds:
                return

    def _round(self) -> None:
        begin = max(self._last_round, self.watched - self.config.window)
        experience = self._form(self._order[begin : self.watched])
        self.trainer.matrix.fill_last(self.trainer.accuracy(experience))
        self.trainer.run_round(experience, trigger=f"drift at {self.drifts[-1]}")
        self.trainer.evaluate(self.experiences, seen=len(self.experiences))
        self._last_round = self.watched

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

    def _metric(self, ids: Ids) -> torch.Tensor:
        """Return the metric of each sample, [B], on the CPU of every rank."""

        def measure(out: Outputs, y: PyTree) -> torch.Tensor:
            if self.config.metric == "loss":
                return out.loss
            return per_sample_error(out.logits, y, self.trainer.loss_name)

        trainer = self.trainer
        size = trainer.training.eval_batch_size
        return trainer.parts.forward.per_sample(trainer.parts.stream, ids, size, measure).cpu()

    def _verdict(self, values: torch.Tensor, quiet: int) -> int | None:
        """Return where in the block the detector fired, after ``quiet`` samples, or None."""
        runtime = self.trainer.parts.runtime
        fired = -1
        if runtime.is_main:
            for k, value in enumerate(values.tolist()):
                if self.detector.update(value) and k >= quiet:
                    fired = k
                    break
        answer = int(runtime.all_reduce(torch.tensor(fired, device=runtime.device), "max"))
        return answer if answer >= 0 else None

    def _say(self, text: str) -> None:
        if self.trainer.parts.runtime.is_main:
            log.info(text)
            self.trainer.parts.progress.message(text)
