"""One continual-learning round, top to bottom."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from distcl.config import Config
from distcl.data.bad_samples import BadSamples
from distcl.distributed.memory import give_back
from distcl.errors import DivergenceError
from distcl.losses import judged_by
from distcl.priority.guard import Judgement
from distcl.priority.round_weights import RoundWeights
from distcl.sampling.round_loader import EMPTY
from distcl.training.accuracy_matrix import AccuracyMatrix
from distcl.training.evaluation import Evaluator
from distcl.training.foresight import foresee_stage
from distcl.training.optimizer import reset
from distcl.training.parts import Parts
from distcl.training.priorities import compute_priorities, held_out_errors
from distcl.training.round_report import Reporter
from distcl.training.step_loop import Stage, StepLoop
from distcl.training.undo import Undo
from distcl.types import Experience
from distcl.updaters import Round

log = logging.getLogger("distcl")


class ContinuousTrainer:
    """Runs rounds. Every method is collective: all ranks call it with the same arguments.

    ``stage`` is the round in progress, if there is one. After a resume it is the one that was
    interrupted: ``run_round`` or ``pretrain`` on the same experience goes on with it.
    """

    def __init__(self, parts: Parts, config: Config) -> None:
        self.parts = parts
        self.training = config.training
        self.continual = config.continual_learning
        self.optimizer_config = config.optimizer
        self.guarded = config.priority.guard == "auto"
        self.loss_name = config.model.loss
        self.metric = judged_by(config.model.loss, parts.stream.spec)
        self._evaluator = Evaluator(
            parts.forward, parts.stream, self.metric, self.loss_name, self.training.eval_batch_size
        )
        self._reporter = Reporter(parts.runtime, parts.loader, parts.forward, parts.updater)
        self.pretrained = bool(config.model.pretrained)
        self.history = parts.history
        self.bad = BadSamples(parts.stream, parts.runtime)
        self.matrix = AccuracyMatrix()
        self._stateful: dict[str, Any] = {
            "matrix": self.matrix,
            "history": self.history,
            "bad": self.bad,
        }
        self.rounds: list[dict[str, Any]] = []
        self.pretraining: dict[str, Any] | None = None
        self.evaluate_seconds = 0.0
        self.stage: Stage | None = None
        self.undo = Undo(
            parts.runtime.strategy.unwrap(parts.model),
            parts.optimizer,
            parts.forward.partition,
            parts.anchor,
            parts.updater,
            parts.loader,
        )
        self.loop = StepLoop(
            parts.runtime,
            parts.model,
            parts.optimizer,
            parts.updater,
            parts.loader,
            parts.tracker,
            parts.progress,
            config.optimizer,
            config.training.clip_norm,
            config.run.poll_steps,
        )

    def run_round(
        self, experience: Experience, trigger: str, held_out: Sequence[Experience] = ()
    ) -> dict[str, Any]:
        """Train one round on an experience and return its report, as in ``summary.json``.

        ``held_out``: the experiences, old and new, by whose held-out data ``training.accept``
        judges the round. One that is not accepted is taken back: everything is as before but for
        random generators and counters, there is no commit, and its samples stay out of the history.
        """
        updater = self.parts.updater
        stage = self.stage or self._begin_round(experience, trigger, held_out)

        self.loop.run(stage, f"round {stage.number}")  # 4. steps

        clock = time.perf_counter()
        accepted = self._accepts(stage, held_out)
        if accepted:
            if updater.trains:
                updater.cl_postprocessing(self.history.source, stage.experience.train)  # 5. commit
            self.history.add(stage.experience.train)
        stage.seconds += time.perf_counter() - clock
        report = self._report(stage, accepted)
        source = self.history.source
        self.parts.recorder.write(report, self.parts.loader, source, self.loop.steps)
        self.rounds.append(report)
        self.stage = None
        return report

    def _begin_round(
        self, experience: Experience, trigger: str, held_out: Sequence[Experience]
    ) -> Stage:
        number = len(self.rounds) + 1
        experience = self.bad.clear(self.history, experience)
        updater, loader = self.parts.updater, self.parts.loader
        if self.optimizer_config.between_rounds == "reset":
            reset(self.parts.optimizer)

        clock = time.perf_counter()
        before = self._reporter.counts()
        weights, judged = RoundWeights(), Judgement()
        try:
            if updater.trains and self.continual.importance_weighting:
                weights, judged = compute_priorities(  # 1. priorities
                    self.parts,
                    number,
                    experience.train,
                    self.history.ids(),
                    self.bad,
                    held_out_errors(self.matrix, held_out),
                    self.guarded,
                )
        except DivergenceError as error:
            raise DivergenceError(f"before step 1 of round {number}: {error}") from error
        for line in weights.lines():
            self._say(line)
        scored = self.parts.forward.forwards - before[0]
        give_back()  # arrays of all samples came and went
        priority_seconds = time.perf_counter() - clock

        self.announce(experience)
        before_it = self._mean_accuracy(held_out) if self.training.accept == "improves" else None
        updater.cl_preprocessing()  # 2. anchor: theta_star <- w_now, after the priorities
        if not (weights.parts or any(weights.chosen)):  # the updater may have found bad samples
            experience = self.bad.clear(self.history, experience)

        loader.rebuild(  # 3. sampler
            number, experience.train, self.history.ids(), weights, updater.uses_hist_batch
        )
        self.stage = Stage(number, trigger, experience, loader.steps() if updater.trains else 0)
        foresee_stage(self.parts, self.stage, f"round {number}", self.training.accumulate)
        self.stage.report = {
            "priority_seconds": priority_seconds,
            "scored": scored,
            "before": before,
            "weighted": bool(weights.parts) or any(weights.chosen),
            "judged": asdict(judged),
        }
        if before_it is not None:
            self.stage.report["held_out"] = before_it
            self.undo.take()
        return self.stage

    def _accepts(self, stage: Stage, held_out: Sequence[Experience]) -> bool:
        """Tell whether the round may stay; take it back if not. Collective."""
        before = stage.report.get("held_out")
        if before is None:
            return True
        after = self._mean_accuracy(held_out)
        if self.undo.settle(before, after):
            return True
        self._say(
            f"[accept] round {stage.number} is taken back: mean {self.metric} on held-out data "
            f"fell from {before:.4f} to {after:.4f}"
        )
        return False

    def _mean_accuracy(self, experiences: Sequence[Experience]) -> float:
        return sum(self.accuracy(e) for e in experiences) / max(1, len(experiences))

    def _report(self, stage: Stage, accepted: bool) -> dict[str, Any]:
        loader = self.parts.loader
        for line in loader.round.weights.lines() if loader.round.forwards else ():
            self._say(line)
        report, words = self._reporter.of_round(stage, accepted)
        if words:
            self._say(words)
        return report

    def pretrain(self, experience: Experience) -> None:
        """Train plainly on the first experience; afterwards theta_star equals the weights."""
        updater, loader = self.parts.updater, self.parts.loader
        if self.stage is None:
            before = self._reporter.counts()
            self.announce(experience)
            loader.rebuild(0, experience.train, EMPTY, RoundWeights(), history_batch=False)
            steps = loader.steps(self.training.pretrain_epochs)
            self.stage = Stage(0, "pretraining", experience, steps, report={"before": before})
            foresee_stage(self.parts, self.stage, "pretraining", self.training.accumulate)
        stage = self.stage
        self.loop.run(stage, "pretraining")
        clock = time.perf_counter()
        if updater.trains:
            updater.cl_postprocessing(self.history.source, stage.experience.train)
        self.parts.anchor.restart()
        self.history.add(stage.experience.train)
        seconds = stage.seconds + time.perf_counter() - clock
        self.pretraining = self._reporter.of_pretraining(stage, seconds)
        self.stage = None

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
        values = {f"{self.metric}/{e.index + 1}": a for e, a in zip(experiences, row, strict=True)}
        self.parts.tracker.log({"round": len(self.rounds), **values}, self.loop.steps)
        shown = " ".join(f"{a:.3f}" for a in row)
        what = "R²" if self.metric == "r2" else self.metric
        self._say(f"[{what}] after round {len(self.rounds)}: {shown}")
        return row

    def accuracy(self, experience: Experience) -> float:
        """Return the share of held-out samples that the model gets right; in regression, R²."""
        test = self.bad.without(experience.test)
        return self._evaluator.score(
            replace(experience, test=test), f"after round {len(self.rounds)}"
        )

    def announce(self, experience: Experience) -> None:
        """Tell the updater what the round trains on."""
        ids, history = experience.train, self.history
        self.parts.updater.begin_round(Round(history.source, ids, history.ids(), history.after))

    def _say(self, text: str) -> None:
        if self.parts.runtime.is_main:
            log.info(text)
            self.parts.progress.message(text)

    def state_dict(self) -> dict[str, Any]:
        """Return what all ranks share: tensors and plain values."""
        return {
            "rounds": self.rounds,
            "pretraining": self.pretraining,
            **{name: part.state_dict() for name, part in self._stateful.items()},
            "evaluate_seconds": self.evaluate_seconds,
            "steps": self.loop.steps,
            "samples": self.loop.samples,
            "trained": self.parts.updater.trained,
            "stage": None if self.stage is None else self.stage.state_dict(),
            "loader": None if self.stage is None else self.parts.loader.state_dict(self.stage.done),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        self.rounds, self.pretraining = state["rounds"], state["pretraining"]
        for name, part in self._stateful.items():
            part.load_state_dict(state[name])
        self.evaluate_seconds = state["evaluate_seconds"]
        self.loop.steps, self.loop.samples = state["steps"], state["samples"]
        self.parts.updater.trained = state["trained"]
        if state["stage"] is not None:
            self.stage = Stage.from_state(state["stage"])
            self.parts.loader.load_state_dict(state["loader"])
