"""How good the model is on held-out data."""

from __future__ import annotations

import math
from functools import partial

from distcl.errors import DivergenceError
from distcl.losses import per_sample_error, per_sample_squares, r_squared
from distcl.parallel.inference import ShardedForward
from distcl.types import Experience, Source


class Evaluator:
    """Scores held-out data by ``metric``: accuracy, or R² in regression."""

    def __init__(
        self, forward: ShardedForward, source: Source, metric: str, loss_name: str, size: int
    ) -> None:
        self._forward = forward
        self._source = source
        self._metric = metric
        self._loss_name = loss_name
        self._size = size

    def score(self, experience: Experience, when: str) -> float:
        """Return 1 - mean error of the held-out samples, or R². Collective.

        Raises DivergenceError, saying ``when``, if it is not finite.
        """
        error = partial(per_sample_error, loss_name=self._loss_name)
        measure = per_sample_squares if self._metric == "r2" else error
        found = self._forward.per_sample(
            self._source, experience.test, self._size, lambda out, y: measure(out.logits, y)
        )
        value = r_squared(found) if self._metric == "r2" else 1.0 - float(found.double().mean())
        if not math.isfinite(value):
            raise DivergenceError(
                f"{self._metric} on experience {experience.index + 1} is {value} {when}: the "
                "model's outputs are NaN or infinite"
            )
        return value
