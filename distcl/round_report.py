"""What is told of a round in ``summary.json``: its steps, cost, draws, priorities and guard."""

from __future__ import annotations

from typing import Any

from distcl.inference import ShardedForward
from distcl.priority.feed import Feed
from distcl.priority.guard import Judgement, doubts
from distcl.runtime import Runtime
from distcl.steps import Stage
from distcl.updaters import Updater


class Reporter:
    """Makes the reports, the same on every rank."""

    def __init__(
        self, runtime: Runtime, feed: Feed, forward: ShardedForward, updater: Updater
    ) -> None:
        self._runtime = runtime
        self._feed = feed
        self._forward = forward
        self._updater = updater

    def counts(self) -> list[int]:
        """Return the samples that went through the model so far: forward only, and trained on."""
        return [self._forward.forwards, self._updater.trained]

    def of_pretraining(self, stage: Stage, seconds: float) -> dict[str, Any]:
        """Return the report of pretraining that took so long. Collective."""
        return {"steps": stage.steps, "train_seconds": seconds, **self._common(stage)}

    def of_round(self, stage: Stage, accepted: bool) -> tuple[dict[str, Any], str]:
        """Return the report of a round, and what the log should say of it, or ''. Collective."""
        feed = self._feed
        scored = stage.report["scored"] + feed.forwards
        candidates = sum(int(r["n"]) for r in feed.weights.report.values())
        guard, words = self._guard(stage)
        report = {
            "round": stage.number,
            "trigger": stage.trigger,
            "steps": stage.steps,
            "train_seconds": stage.seconds - feed.priority_seconds,
            "priority_seconds": stage.report["priority_seconds"] + feed.priority_seconds,
            "forward_passes_per_sample": scored / candidates if candidates else 0.0,
            **self._common(stage),
            "accepted": accepted,
            "priority": feed.weights.report,
            **guard,
        }
        return report, words

    def _common(self, stage: Stage) -> dict[str, Any]:
        of_step = stage.report.get("flops", 0)  # of the first; None where they cannot be counted
        return {
            "compute": self._compute(*stage.report["before"]),
            "flops": None if of_step is None else stage.steps * of_step,
            "draws_sha256": self._feed.account.digest(),
            "final_loss": stage.loss,
        }

    def _compute(self, forwards: int, trained: int) -> dict[str, int]:
        """Return the samples that went through the model since these counts, over all ranks.

        A forward of a sample is one unit, forward and backward three; evaluation does not count,
        but what ``training.accept`` looks at does.
        """
        now = self.counts()
        scored, samples = now[0] - forwards, now[1] - trained
        return {"scored": scored, "trained": samples, "units": scored + 3 * samples}

    def _guard(self, stage: Stage) -> tuple[dict[str, Any], str]:
        """Return what the guard has to report of a round by priority, and a warning or ''."""
        judged = Judgement(**stage.report["judged"])
        if not (stage.report["weighted"] or judged.uniform):
            return {}, ""
        staleness = self._feed.staleness
        found = doubts(self._feed.weights.report, judged.aim, staleness)
        words = ""
        if found and not judged.uniform:
            words = (
                f"[guard] round {stage.number}: sampling by priority is likely to hurt: "
                + "; ".join(found)
            )
        told = {"uniform": judged.uniform, "aim": judged.aim, "staleness": staleness}
        return {"guard": told}, words
