"""Step 1 of a round: the weights of what it may draw, and whether they are to be trusted."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict

from distcl.data.bad_samples import BadSamples
from distcl.distributed.memory import give_back
from distcl.errors import DivergenceError
from distcl.priority.guard import HeldOut, Judgement, judge
from distcl.priority.round_weights import RoundWeights
from distcl.training.accuracy_matrix import AccuracyMatrix
from distcl.training.parts import Parts
from distcl.training.scores import Score
from distcl.training.stage import Stage
from distcl.types import Experience, Ids


def compute_priorities(
    parts: Parts,
    stage: Stage,
    history: Ids,
    bad: BadSamples,
    held_out: HeldOut | None,
    guarded: bool,
) -> RoundWeights:
    """Return the weights that a round begins with; tell of them in its report. Collective.

    ``held_out``: see :func:`held_out_errors`; None: draws are uniform. ``guarded``: doubts make the
    round uniform. Raises DivergenceError or ConfigError naming signal and sample id for a bad
    score.
    """
    clock, weights, judged = time.perf_counter(), RoundWeights(), Judgement()
    if held_out is not None:
        number, current = stage.number, stage.experience.train
        try:
            weights = parts.loader.weigh(number, current, history, parts.updater.uses_hist_batch)
            bad.silence(*((part.ids, part.values) for part in weights.parts.values()))
            judged = judge(parts.runtime, guarded, weights, held_out)
        except DivergenceError as error:
            raise DivergenceError(f"before step 1 of round {number}: {error}") from error
    if judged.uniform:
        note = f"[guard] uniform draws in this round: {'; '.join(judged.doubts)}"
        weights = weights.stand_down(note)
    report = stage.report
    report["scored"] = parts.forward.forwards - report["before"][0]
    report["weighted"] = bool(weights.parts) or any(weights.chosen)
    report["judged"] = asdict(judged)
    give_back()  # arrays of all samples came and went
    report["priority_seconds"] = time.perf_counter() - clock
    return weights


def held_out_errors(
    matrix: AccuracyMatrix, experiences: Sequence[Experience], score: Score
) -> HeldOut:
    """Return each one's training ids, and how wrong the model was when last measured, or None.

    Nobody's is known if one is below zero: then the score has no perfect value to count from.
    """
    row = (matrix.rows() or [[]])[-1]
    known = [row[e.index] if e.index < len(row) else None for e in experiences]
    errors = [None if value is None else score.error(value) for value in known]
    if any(error is not None and error < 0 for error in errors):
        errors = [None] * len(errors)
    return [(e.train, error) for e, error in zip(experiences, errors, strict=True)]
