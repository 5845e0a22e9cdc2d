"""One continual-learning round, top to bottom."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from distcl.config import Config
from distcl.data.bad_samples import BadSamples
from distcl.priority.round_weights import RoundWeights
from distcl.sampling.round_loader import EMPTY
from distcl.training.accuracy_matrix import Entry, Matrices
from distcl.training.class_scores import class_report, count_confusions
from distcl.training.evaluation import Evaluator
from distcl.training.foresight import foresee_stage
from distcl.training.optimizer import OptimizerSlices, reset
from distcl.training.parts import Parts
from distcl.training.priorities import compute_priorities, held_out_errors
from distcl.training.round_report import row_values
from distcl.training.stage import Stage
from distcl.training.step_loop import Keeping, StepLoop
from distcl.training.undo import Undo
from distcl.types import Experience
from distcl.updaters import Round

log = logging.getLogger("distcl")


class ContinuousTrainer:
    """Runs rounds. Every method is collective: all ranks call it with the same arguments.

    ``stage`` is the round in progress, if there is one. After a resume it is the one that was
    interrupted: ``run_round`` or ``pretrain`` on the same experience goes on with it. ``keeper``
    saves the run.
    """

    def __init__(self, parts: Parts, config: Config, keeper: Keeping | None = None) -> None:
        self.parts = parts
        self.training = config.training
        self.continual = config.continual_learning
        self.loss_name = config.model.loss
        self.metric, self.leading = next(iter(parts.scores.items()))
        self.pretrained = bool(config.model.pretrained)
        self.history = parts.history
        self.bad = BadSamples(parts.stream, parts.runtime)
        self.matrices = Matrices({n: s.higher_is_better for n, s in parts.scores.items()})
        self.matrix = self.matrices.of[self.metric]
        self.optimizer = OptimizerSlices(parts.forward.partition, parts.optimizer)
        self.undo = Undo(self.optimizer, parts)
        self.loop = StepLoop(parts, config, keeper or Keeping())
        self.rounds: list[dict[str, Any]] = []
        self.pretraining: dict[str, Any] | None = None
        self.evaluate_seconds = 0.0
        self.classes: dict[str, Any] | None = None
        """What the last evaluation says of classes, see :func:`class_report`."""
        self.stage: Stage | None = None
        self._between_rounds = config.optimizer.between_rounds
        self._guarded = config.priority.guard == "auto"
        self._evaluator = Evaluator(
            parts.forward, parts.stream, parts.scores, self.training.eval_batch_size
        )

    def run_round(
        self, experience: Experience, trigger: str, held_out: Sequence[Experience] = ()
    ) -> dict[str, Any]:
        """Train one round on an experience and return its report, as in ``summary.json``.

        ``held_out``: the experiences, old and new, by whose held-out data ``training.accept``
        judges the round. One that is not accepted is taken back: everything is as before but for
        random generators and counters, there is no commit, and its samples stay out of the history.
        """
        if self.stage is None:
            self.stage = self._begin(experience, trigger, held_out)  # steps 1 to 3

        self.parts.callbacks.on_round_begin(self.stage.number, self.stage.experience)
        self.loop.run(self.stage)  # 4. steps

        clock = time.perf_counter()
        accepted = self._accepts(self.stage, held_out)
        if accepted:
            self._commit(self.stage.experience)  # 5. commit
        self.parts.average.show()
        self.stage.seconds += time.perf_counter() - clock
        report = self._report(self.stage, accepted)
        self.rounds.append(report)
        self.stage = None
        return report

    def _begin(self, experience: Experience, trigger: str, held_out: Sequence[Experience]) -> Stage:
        updater, loader = self.parts.updater, self.parts.loader
        experience = self.bad.clear(self.history, experience)
        stage = Stage(len(self.rounds) + 1, trigger, experience)
        stage.report["before"] = self.parts.recorder.counts()
        self.parts.average.begin_round()
        if self._between_rounds == "reset":
            reset(self.parts.optimizer)

        weights = self._priorities(stage, held_out)  # 1. priorities
        self.announce(experience)
        if self.training.accept == "improves":
            with self.parts.average.shown():
                stage.report["held_out"] = self.lead(held_out)
        updater.cl_preprocessing()  # 2. anchor: theta_star <- w_now, after the priorities
        if not stage.report["weighted"]:  # the updater may have found bad samples
            stage.experience = self.bad.clear(self.history, experience)
        train, history = stage.experience.train, self.history.ids()
        loader.rebuild(stage.number, train, history, weights, updater.uses_hist_batch)  # 3. sampler
        stage.steps = loader.steps() if updater.trains else 0
        foresee_stage(self.parts, stage, self.training.accumulate)
        if "held_out" in stage.report:
            self.undo.take()
        return stage

    def _priorities(self, stage: Stage, held_out: Sequence[Experience]) -> RoundWeights:
        """Return the weights that a round begins with; tell of them in its report."""
        errors = None  # draws are uniform
        if self.parts.updater.trains and self.continual.importance_weighting:
            errors = held_out_errors(self.matrix, held_out, self.leading)
        history = self.history.ids()
        weights = compute_priorities(self.parts, stage, history, self.bad, errors, self._guarded)
        for line in weights.lines():
            self._say(line)
        return weights

    def _accepts(self, stage: Stage, held_out: Sequence[Experience]) -> bool:
        """Tell whether the round may stay; take it back if not."""
        before = stage.report.get("held_out")
        if before is None:
            return True
        with self.parts.average.shown():
            after = self.lead(held_out)
        higher = self.leading.higher_is_better
        accepted = bool(after >= before if higher else after <= before)
        self.undo.settle(accepted)
        if not accepted:
            self._say(
                f"[accept] round {stage.number} is taken back: mean {self.metric} on held-out data "
                f"{'fell' if higher else 'rose'} from {before:.4f} to {after:.4f}"
            )
        return accepted

    def _commit(self, experience: Experience) -> None:
        if self.parts.updater.trains:
            self.parts.updater.cl_postprocessing(self.history.source, experience.train)
        self.history.add(experience.train)

    def _report(self, stage: Stage, accepted: bool) -> dict[str, Any]:
        drawn, recorder = self.parts.loader.round, self.parts.recorder
        for line in drawn.weights.lines() if drawn.forwards else ():
            self._say(line)
        report, words = recorder.of_round(stage, accepted)
        if words:
            self._say(words)
        recorder.write(report, self.history.source, self.loop.steps)
        return report

    def pretrain(self, experience: Experience) -> None:
        """Train plainly on the first experience; afterwards theta_star equals the weights."""
        loader, recorder = self.parts.loader, self.parts.recorder
        if self.stage is None:
            self.stage = Stage(0, "pretraining", experience, report={"before": recorder.counts()})
            self.announce(experience)
            loader.rebuild(0, experience.train, EMPTY, RoundWeights(), history_batch=False)
            self.stage.steps = loader.steps(self.training.pretrain_epochs)
            foresee_stage(self.parts, self.stage, self.training.accumulate)
        stage = self.stage
        self.parts.callbacks.on_round_begin(0, stage.experience)
        self.loop.run(stage)
        clock = time.perf_counter()
        self._commit(stage.experience)
        self.parts.anchor.restart()
        self.parts.average.show()
        stage.seconds += time.perf_counter() - clock
        self.pretraining = recorder.of_pretraining(stage)
        self.stage = None

    def evaluate(self, experiences: list[Experience], seen: int) -> list[Entry]:
        """Append a row to the matrix of each score; return the leading one's.

        6. evaluate. ``seen``: how many of the columns have been trained on.
        """
        clock = time.perf_counter()
        found, counts = [], []
        for e in experiences:
            found.append(self.measure(e))
            counts.append(count_confusions(self._evaluator.pairs, self.parts.stream.spec.classes))
        self.classes = class_report(counts, seen, self.parts.stream.spec.class_names)
        rows = {name: [one[k] for one in found] for k, name in enumerate(self.parts.scores)}
        self.matrices.append(rows, seen)
        seconds = time.perf_counter() - clock
        self.evaluate_seconds += seconds
        if self.rounds:
            self.rounds[-1]["evaluate_seconds"] = seconds
        values = row_values(rows, experiences, self.leading.higher_is_better, self.classes)
        self.parts.tracker.log({"round": len(self.rounds), **values}, self.loop.steps)
        for name, row in rows.items():
            shown = " ".join("–" if value is None else f"{value:.3f}" for value in row)
            what = "R²" if name == "r2" else name
            self._say(f"[{what}] after round {len(self.rounds)}: {shown}")
        if seen:
            report = self.rounds[-1] if self.rounds else self.pretraining or {}
            self.parts.callbacks.on_round_end(len(self.rounds), report, list(rows[self.metric]))
        return rows[self.metric]

    def lead(self, experiences: Sequence[Experience]) -> float:
        """Return the mean of the leading score on the experiences' held-out samples. Collective."""
        found = [self.measure(e)[0] or 0.0 for e in experiences]  # the evaluator refuses None
        return sum(found) / max(1, len(found))

    def measure(self, experience: Experience) -> list[Entry]:
        """Return every score of the model on held-out samples, the leading one first."""
        kept = replace(experience, test=self.bad.without(experience.test))
        return self._evaluator.score(kept, f"after round {len(self.rounds)}")

    def announce(self, experience: Experience) -> None:
        """Tell the updater what the round trains on."""
        ids, history = experience.train, self.history
        self.parts.updater.begin_round(Round(history.source, ids, history.ids(), history.after))

    def _say(self, text: str) -> None:
        if self.parts.runtime.is_main:
            log.info(text)
            self.parts.progress.message(text)

    def state_dict(self) -> dict[str, Any]:
        """Return the rounds so far and the one in progress: tensors and plain values."""
        stage, loader = self.stage, self.parts.loader
        return {
            "rounds": self.rounds,
            "pretraining": self.pretraining,
            "evaluate_seconds": self.evaluate_seconds,
            "trained": self.parts.updater.trained,
            "classes": self.classes,
            "stage": None if stage is None else stage.state_dict(),
            "loader": None if stage is None else loader.state_dict(stage.done),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned; its history and lanes come before."""
        self.rounds, self.pretraining = state["rounds"], state["pretraining"]
        self.evaluate_seconds = state["evaluate_seconds"]
        self.parts.updater.trained = state["trained"]
        self.classes = state.get("classes")  # of before there were any
        if state["stage"] is not None:
            self.stage = Stage.from_state(state["stage"])
            self.parts.loader.load_state_dict(state["loader"])
            self.announce(self.stage.experience)
