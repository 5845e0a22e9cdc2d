"""One continual-learning round, top to bottom."""

from __future__ import annotations

import logging
import math
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from distcl.anchor import Anchor
from distcl.config import Config
from distcl.data.history import CopyingStream, History
from distcl.errors import DivergenceError
from distcl.inference import ShardedForward
from distcl.losses import judged_by, per_sample_error, per_sample_squares, r_squared
from distcl.metrics import AccuracyMatrix
from distcl.optim import reset, warmup_factor
from distcl.priority.feed import EMPTY, Feed
from distcl.priority.scoring import Scorer
from distcl.priority.weights import RoundWeights
from distcl.runtime import Runtime
from distcl.tracking import Tracker
from distcl.types import Experience, Progress, Stream
from distcl.updaters import Round, Updater
from distcl.watch import LossWatch

log = logging.getLogger("distcl")


@dataclass(frozen=True, slots=True)
class Parts:
    """What a trainer works with, built by ``distcl.job.assemble`` from a configuration."""

    runtime: Runtime
    stream: Stream
    model: nn.Module
    optimizer: torch.optim.Optimizer
    anchor: Anchor
    forward: ShardedForward
    scorer: Scorer
    updater: Updater
    feed: Feed
    tracker: Tracker
    progress: Progress


class ContinuousTrainer:
    """Runs rounds. Every method is collective: all ranks call it with the same arguments."""

    def __init__(self, parts: Parts, config: Config) -> None:
        self.parts = parts
        self.training = config.training
        self.continual = config.continual_learning
        self.optimizer_config = config.optimizer
        self.loss_name = config.model.loss
        self.metric = judged_by(config.model.loss, parts.stream.spec)
        self.pretrained = bool(config.model.pretrained)
        self.poll_steps = config.run.poll_steps
        copies = parts.stream if isinstance(parts.stream, CopyingStream) else None
        self.history = History(self.continual.buffer_size, config.run.seed, copies)
        self.matrix = AccuracyMatrix()
        self.rounds: list[dict[str, Any]] = []
        self.pretraining: dict[str, Any] | None = None
        self.evaluate_seconds = 0.0
        self.samples_trained = 0
        self.steps = 0
        self._base_lrs = [group["lr"] for group in parts.optimizer.param_groups]

    def run_round(self, experience: Experience, trigger: str) -> dict[str, Any]:
        """Train one round on an experience and return its report, as in ``summary.json``."""
        number = len(self.rounds) + 1
        updater, feed = self.parts.updater, self.parts.feed
        if self.optimizer_config.between_rounds == "reset":
            reset(self.parts.optimizer)

        clock = time.perf_counter()
        forwards = self.parts.forward.forwards
        weights = self._compute_priorities(experience)  # 1. priorities
        scored = self.parts.forward.forwards - forwards
        priority_seconds = time.perf_counter() - clock

        self._begin(experience)
        updater.cl_preprocessing()  # 2. anchor: theta_star <- w_now, after the priorities

        feed.rebuild(  # 3. sampler
            number, experience.train, self.history.ids(), weights, updater.uses_hist_batch
        )

        clock = time.perf_counter()
        steps = feed.steps() if updater.trains else 0
        loss = self._take_steps(number, steps, f"round {number}")  # 4. steps
        for line in weights.lines() if feed.forwards else ():
            self._say(line)

        if updater.trains:
            updater.cl_postprocessing(self.parts.stream, experience.train)  # 5. commit
        train_seconds = time.perf_counter() - clock - feed.priority_seconds
        self.history.add(experience.train)

        scored += feed.forwards
        candidates = sum(int(r["n"]) for r in weights.report.values())
        report = {
            "round": number,
            "trigger": trigger,
            "steps": steps,
            "train_seconds": train_seconds,
            "priority_seconds": priority_seconds + feed.priority_seconds,
            "forward_passes_per_sample": scored / candidates if candidates else 0.0,
            "draws_sha256": feed.digest,
            "final_loss": loss,
            "priority": weights.report,
        }
        self.rounds.append(report)
        return report

    def pretrain(self, experience: Experience) -> None:
        """Train plainly on the first experience; afterwards theta_star equals the weights."""
        updater, feed = self.parts.updater, self.parts.feed
        self._begin(experience)
        feed.rebuild(0, experience.train, EMPTY, RoundWeights(), history_batch=False)
        clock = time.perf_counter()
        steps = feed.steps(self.training.pretrain_epochs)
        loss = self._take_steps(0, steps, "pretraining", pretraining=True)
        if updater.trains:
            updater.cl_postprocessing(self.parts.stream, experience.train)
        self.parts.anchor.restart()
        self.history.add(experience.train)
        self.pretraining = {
            "steps": steps,
            "train_seconds": time.perf_counter() - clock,
            "draws_sha256": feed.digest,
            "final_loss": loss,
        }

    def evaluate(self, experiences: list[Experience], seen: int) -> list[float]:
        """Append a row to the accuracy matrix: accuracy, or R², on each one's held-out data.

        6. evaluate. ``seen``: how many of the columns have been trained on.
        """
        clock = time.perf_counter()
        row = [self.accuracy(e) for e in experiences]
        self.matrix.append(row, seen)
        seconds = time.perf_counter() - clock
        self.evaluate_seconds += seconds
        if self.rounds:
            self.rounds[-1]["evaluate_seconds"] = seconds
        values = {f"{self.metric}/{e.index}": a for e, a in zip(experiences, row, strict=True)}
        self.parts.tracker.log({"round": len(self.rounds), **values}, self.steps)
        shown = " ".join(f"{a:.3f}" for a in row)
        self._say(f"[{self.metric}] after round {len(self.rounds)}: {shown}")
        return row

    def accuracy(self, experience: Experience) -> float:
        """Return the share of held-out samples that the model gets right; in regression, R²."""
        stream, size = self.parts.stream, self.training.eval_batch_size
        if self.metric == "r2":
            squares = self.parts.forward.per_sample(
                stream, experience.test, size, lambda out, y: per_sample_squares(out.logits, y)
            )
            return self._checked(r_squared(squares), experience)
        errors = self.parts.forward.per_sample(
            stream,
            experience.test,
            size,
            lambda out, y: per_sample_error(out.logits, y, self.loss_name),
        )
        return self._checked(1.0 - float(errors.double().mean()), experience)

    def _checked(self, value: float, experience: Experience) -> float:
        if not math.isfinite(value):
            raise DivergenceError(
                f"{self.metric} on experience {experience.index} is {value} after round "
                f"{len(self.rounds)}: the model's outputs are NaN or infinite"
            )
        return value

    def _begin(self, experience: Experience) -> None:
        """Tell the updater what the round trains on."""
        ids, history = experience.train, self.history
        self.parts.updater.begin_round(
            Round(self.parts.stream, ids, history.ids(), history.after(ids))
        )

    def _compute_priorities(self, experience: Experience) -> RoundWeights:
        if not (self.continual.importance_weighting and self.parts.updater.trains):
            return RoundWeights()
        weights = self.parts.feed.weigh(
            len(self.rounds) + 1,
            experience.train,
            self.history.ids(),
            self.parts.updater.uses_hist_batch,
        )
        for line in weights.lines():
            self._say(line)
        return weights

    def _take_steps(self, number: int, steps: int, title: str, pretraining: bool = False) -> float:
        """Train ``steps`` steps; return the global mean loss of the last one (nan if none)."""
        updater, optimizer = self.parts.updater, self.parts.optimizer
        watch = LossWatch(self.parts.runtime, number)
        self.parts.progress.round_begins(title, steps)
        self.parts.model.train()
        loss, begun, samples = float("nan"), time.perf_counter(), 0
        for step, (batch, hist_batch) in enumerate(self.parts.feed.batches(steps)):
            self._set_rate(step)
            updater.update_pre_fwd_bwd()
            if pretraining:
                result = Updater.fwd_bwd(updater, batch, None)
            else:
                result = updater.fwd_bwd(batch, hist_batch)
            self.parts.runtime.unscale(optimizer)
            updater.update_post_fwd_bwd()
            optimizer.step()
            updater.update_post_optimizer_call()
            optimizer.zero_grad(set_to_none=True)
            watch.add(result)
            samples += batch.total
            if (step + 1) % self.poll_steps == 0 or step + 1 == steps:
                losses = watch.poll()
                loss = losses[-1]
                rate = samples / (time.perf_counter() - begun)
                done = self.steps + step + 1
                self.parts.tracker.log(
                    {"round": number, "loss": float(np.mean(losses)), "samples_per_second": rate},
                    done,
                )
                self.parts.progress.step(step + 1, loss, rate)
        self.steps += steps
        self.samples_trained += samples
        return loss

    def _set_rate(self, step: int) -> None:
        factor = warmup_factor(step, self.optimizer_config.warmup_steps)
        for group, lr in zip(self.parts.optimizer.param_groups, self._base_lrs, strict=True):
            group["lr"] = lr * factor

    def _say(self, text: str) -> None:
        if self.parts.runtime.is_main:
            log.info(text)
            self.parts.progress.message(text)
