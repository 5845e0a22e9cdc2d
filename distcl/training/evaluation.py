"""How good the model is on held-out data."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import NoReturn

import torch
from torch.utils._pytree import tree_leaves

from distcl.errors import ConfigError, DivergenceError
from distcl.parallel.inference import ShardedForward
from distcl.training.accuracy_matrix import Entry
from distcl.training.class_scores import class_pairs
from distcl.training.scores import NotScored, Score
from distcl.types import Experience, Outputs, PyTree, Source

log = logging.getLogger("distcl")


class Evaluator:
    """Scores held-out data by all scores of a run at once, in one pass."""

    def __init__(
        self, forward: ShardedForward, source: Source, scores: Mapping[str, Score], size: int
    ) -> None:
        self._forward = forward
        self._source = source
        self._scores = scores
        self._size = size
        self.pairs = torch.empty(0, 0)
        """What :func:`class_pairs` returned of the samples scored last."""

    def score(self, experience: Experience, when: str) -> list[Entry]:
        """Return every score of the held-out samples, in their order. Collective.

        Raises DivergenceError, saying ``when``, if the leading one is not finite; NotScored, naming
        it, if it is not defined on these samples, or is not finite though the model's outputs are.
        A further one is None then, with a word in the log: it must not decide on a run.
        """
        widths: list[int] = []
        loss = next(iter(self._scores.values())).loss

        def measure(outputs: Outputs, y: PyTree) -> torch.Tensor:
            rows = [score.rows(outputs, y).double() for score in self._scores.values()]
            rows.append(class_pairs(outputs, y, loss))
            widths[:] = [part.shape[1] for part in rows]
            return torch.cat(rows, 1)

        found = self._forward.per_sample(self._source, experience.test, self._size, measure)
        if not widths:  # no samples
            found, widths = found.double().reshape(0, 0), [0] * (len(self._scores) + 1)
        values: list[Entry] = []
        *parts, self.pairs = torch.split(found, widths, 1)
        for (name, score), rows in zip(self._scores.items(), parts, strict=True):
            why, value = "", math.nan
            try:
                value = score.value(rows.contiguous()) if len(rows) else math.nan
            except NotScored as error:
                why = str(error)
            if not isinstance(value, float):
                raise ConfigError(f"model.score = '{name}': its value is {value!r}, no float")
            if not values and why:
                raise NotScored(
                    f"model.score = '{name}' on experience {experience.index + 1}: {why}"
                )
            if not values and not math.isfinite(value):
                self._refuse(name, value, rows, experience, when)
            if not math.isfinite(value) and self._forward.runtime.is_main:
                log.warning(
                    f"[{name}] {when}: none on experience {experience.index + 1}: "
                    f"{why or f'it would be {value}'}"
                )
            values.append(value if math.isfinite(value) else None)
        return values

    def _refuse(
        self, name: str, value: float, rows: torch.Tensor, experience: Experience, when: str
    ) -> NoReturn:
        """Say whose fault a score is that is not finite: the model's, or its own. Collective."""
        where = f"on experience {experience.index + 1}"
        bad = int((~rows.isfinite()).any(1).sum())
        if bad:
            fine = self._forward.per_sample(self._source, experience.test, self._size, _finite)
            if fine.all():
                raise NotScored(
                    f"model.score = '{name}' is {value} {where} {when}, by {bad} of {len(rows)} "
                    "samples, though the model's outputs are finite"
                )
        why = "the model's outputs are NaN or infinite"
        if len(rows) and not bad:
            why = "its loss on held-out data is far too large"
        raise DivergenceError(f"{name} {where} is {value} {when}: {why}")


def _finite(outputs: Outputs, y: PyTree) -> torch.Tensor:
    """Return whether all outputs of each sample are finite, 1 or 0, float64 [B]."""
    leaves = [leaf for leaf in tree_leaves(outputs.logits) if leaf.is_floating_point()]
    fine = [leaf.reshape(len(leaf), -1).isfinite().all(1) for leaf in leaves]
    every = torch.stack(fine).all(0) if fine else torch.ones_like(outputs.loss, dtype=torch.bool)
    return every.double()
