"""What a round trains on: which samples are drawn, by which weights, batch by batch."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch

from distcl.config import ContinualLearningConfig, DataConfig, PriorityConfig, TrainingConfig
from distcl.data.loader import BatchLoader
from distcl.errors import ConfigError
from distcl.priority.draws import ess_fraction, shape_weights
from distcl.priority.sampler import DistributedWeightedSampler, Group
from distcl.priority.scoring import Scorer, Weights, priorities
from distcl.priority.tally import DrawTally
from distcl.runtime import Runtime
from distcl.types import Batch, Ids, Source

EMPTY: Ids = np.empty(0, dtype=np.int64)
_HISTORY_STREAM = 1


@dataclass
class RoundWeights:
    """Draw weights of a round; None: uniform. ``report`` has their statistics for summary.json."""

    current: Weights | None = None
    history: Weights | None = None
    report: dict[str, dict[str, float]] = field(default_factory=dict)

    @property
    def parts(self) -> dict[str, Weights]:
        """The weights that there are, by the name of their part in ``report``."""
        both = {"cur": self.current, "hist": self.history}
        return {name: weights for name, weights in both.items() if weights is not None}


def compute_weights(
    scorer: Scorer,
    source: Source,
    current: Ids,
    history: Ids,
    *,
    alpha: float,
    config: PriorityConfig,
    history_batch: bool,
) -> RoundWeights:
    """Score what ``priority.target`` names and shape the scores into weights. Collective.

    auto: the current data, and the history if the updater takes a history batch.
    union: both together, so that the two share one normalization.
    """
    target = config.target
    score_current = target in ("auto", "current", "union")
    score_history = target in ("history", "union") or (target == "auto" and history_batch)
    wanted = [current if score_current else EMPTY, history if score_history else EMPTY]
    scores = [scorer.score(source, ids) for ids in wanted]

    def shape(values: torch.Tensor) -> Weights:
        if not len(values):
            return np.empty(0)
        raw = values.cpu().numpy().astype(np.float64)
        return shape_weights(raw, alpha, config.cap, config.min_ess, config.floor)

    if target == "union":
        both = shape(torch.cat([s.to(scores[0]) for s in scores]))
        parts = [both[: len(current)], both[len(current) :]]
    else:
        parts = [shape(s) for s in scores]
    result = RoundWeights()
    for name, key, weights, raw in zip(
        ("cur", "hist"), ("current", "history"), parts, scores, strict=True
    ):
        if len(weights):
            setattr(result, key, weights)
            result.report[name] = statistics(priorities(raw, alpha), weights)
    return result


def statistics(priority: Weights, weights: Weights) -> dict[str, float]:
    """Return n, min, mean, max, std of priorities [N] and the weights' ESS as a share of N."""
    return {
        "n": len(priority),
        "min": float(priority.min()),
        "mean": float(priority.mean()),
        "max": float(priority.max()),
        "std": float(priority.std()),
        "ess_fraction": float(ess_fraction(weights)),
    }


class Feed:
    """The batches of one round after another: rebuild, then iterate over the round's steps.

    One sampler draws the training batches, from the current data and, if history is mixed in, from
    both; a second one draws history batches for updaters that take them.
    """

    def __init__(
        self,
        runtime: Runtime,
        source: Source,
        training: TrainingConfig,
        continual: ContinualLearningConfig,
        priority: PriorityConfig,
        data: DataConfig,
        seed: int,
    ) -> None:
        self._runtime = runtime
        self._source = source
        self._training = training
        self._continual = continual
        self._priority = priority
        self._data = data
        samplers = [
            DistributedWeightedSampler(
                size,
                rank=runtime.rank,
                world_size=runtime.world_size,
                seed=seed,
                draw=priority.draw,
                stream=stream,
            )
            for stream, size in (
                (0, training.batch_size),
                (_HISTORY_STREAM, continual.replay_batch_size or training.batch_size),
            )
        ]
        self.sampler, self.hist_sampler = samplers
        self._hist = False
        self._digest = hashlib.sha256()
        self.tally = DrawTally()
        self.candidates = 0

    def rebuild(
        self,
        round_index: int,
        current: Ids,
        history: Ids,
        weights: RoundWeights,
        history_batch: bool,
    ) -> None:
        """Set up the draws of a round. Local; every rank passes the same."""
        mixed = self._continual.mix_historic_data and len(history) > 0
        ratio = self._continual.current_ratio
        cur_draws = len(current) if ratio == 1.0 else max(1, int(ratio * len(current)))
        hist_draws = len(history) if ratio == 1.0 else int((1 - ratio) * len(history))
        groups = [Group(current, weights.current, cur_draws)]
        if mixed and hist_draws:
            groups.append(Group(history, weights.history, hist_draws))
            if self._priority.target == "union" and weights.current is not None:
                groups = [_union(groups)]
        self.sampler.set_round(round_index)
        self.sampler.set_groups(groups)
        self._hist = history_batch and len(history) > 0
        if self._hist:
            self.hist_sampler.set_round(round_index)
            self.hist_sampler.set_groups([Group(history, weights.history, len(history))])
        self._digest = hashlib.sha256()
        self.tally = DrawTally()
        replayed = self._hist or (mixed and hist_draws > 0)
        self.candidates = len(current) + (len(history) if replayed else 0)

    def steps(self, epochs: int | None = None) -> int:
        """Return the number of steps of the round, or of ``epochs`` passes. Local."""
        if epochs is None and self._training.steps_per_round:
            return self._training.steps_per_round
        return (epochs or self._training.epochs) * len(self.sampler)

    def batches(self, steps: int) -> Iterator[tuple[Batch, Batch | None]]:
        """Yield (batch, history batch or None) for ``steps`` steps, passes one after another."""
        main = self._passes(self.sampler)
        hist = self._passes(self.hist_sampler) if self._hist else None
        for _ in range(steps):
            yield next(main), next(hist) if hist is not None else None

    @property
    def digest(self) -> str:
        """SHA-256 of the global ids drawn in this round so far, in order; equal on all ranks."""
        return self._digest.hexdigest()

    def _passes(self, sampler: DistributedWeightedSampler) -> Iterator[Batch]:
        loader = BatchLoader(
            self._source,
            sampler,
            workers=self._data.workers,
            pin_memory=self._data.pin_memory,
            device=self._runtime.device,
            dtype=self._runtime.dtype,
        )
        epoch = 0
        while True:
            sampler.set_epoch(epoch)
            for step, batch in enumerate(loader, start=sampler.first_step):
                drawn = sampler.global_batch(step)
                self._digest.update(drawn.astype("<i8").tobytes())
                if self._runtime.is_main:
                    self.tally.add(drawn)
                yield batch
            epoch += 1


def _union(groups: list[Group]) -> Group:
    """Return one group that draws from all of them by their common weights."""
    if any(g.weights is None for g in groups):
        raise ConfigError("priority.target = 'union' needs weights of current data and history")
    return Group(
        np.concatenate([g.ids for g in groups]),
        np.concatenate([g.weights for g in groups if g.weights is not None]),
        sum(g.draws for g in groups),
    )
