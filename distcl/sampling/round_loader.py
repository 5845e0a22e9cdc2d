"""What a round trains on: which samples are drawn, by which weights, batch by batch."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch.utils._pytree import tree_leaves

from distcl.config import ContinualLearningConfig, DataConfig, PriorityConfig, TrainingConfig
from distcl.data.ids import ids_tensor, tensor_ids
from distcl.data.loader import BatchLoader
from distcl.distributed.memory import large_arrays
from distcl.distributed.runtime import Runtime
from distcl.errors import ConfigError
from distcl.priority.online import Ledger
from distcl.priority.round_weights import RoundWeights, Shape, weigh
from distcl.priority.scoring import Scorer
from distcl.priority.weighting import Sums, Weights
from distcl.sampling.candidates import Chooser
from distcl.sampling.composition import HISTORY, MAIN, Mix
from distcl.sampling.draw_log import Account, Drawn, LaneAccount, WholeAccount, weight_histogram
from distcl.sampling.sampler import DistributedWeightedSampler, Part, Permutations, WindowPlan
from distcl.sampling.sequential import LaneSampler, Streamed
from distcl.sampling.staleness import Freshness
from distcl.types import Batch, Ids, Source, exact

EMPTY: Ids = np.empty(0, dtype=np.int64)
_POOL = 2  # a stream of draws beside those of the plans
_PARTS = {MAIN: "cur", HISTORY: "hist"}
_WINDOWS, _CHOICE = 16, 32  # added to the stream of a lane


class Feed:
    """The batches of one round after another: weigh, rebuild, then iterate over the steps.

    One plan draws the training batches, from the current data and, if history is mixed in, from
    both; a second one draws history batches for updaters that take them. A plan whose weights
    change on the way (``ledger``) is a WindowPlan, any other a DistributedWeightedSampler, whose
    batches may be candidates that a Chooser chooses among; over a source that is read from front
    to back, a LaneSampler. There, each rank has the weights and draws of its own lanes only.
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
        scorer: Scorer,
        ledger: Ledger | None = None,
    ) -> None:
        self._runtime = runtime
        self._source = source
        self._priority = priority
        self._seed = seed
        self._scorer = scorer
        self._ledger = ledger
        self._streamed: Streamed | None = None
        if getattr(source, "sequential", False):
            if continual.importance_weighting and priority.source != "score":
                raise ConfigError(
                    f"priority.source = '{priority.source}' draws at random, which a stream of "
                    "shards cannot be read by; use 'score', or data.access = 'indexed'"
                )
            self._streamed = Streamed(runtime, source, data, scorer, seed)
        self._shape = Shape(priority, continual.importance_alpha)
        self._reader = Reader(runtime, source, data, priority.correction)
        self._pool = Permutations(seed, _POOL)
        self._freshness = Freshness(runtime)
        self._weighted: tuple[Ids | None, Ids | None] = (None, None)
        self._mix = Mix(training, continual, union=priority.target == "union")
        self._clear()

    def _clear(self) -> None:
        """Let go of what is held of the round before."""
        self._weights = RoundWeights()
        self._plans: dict[int, Plan] = {}

    # ------------------------------------------------------------ 1. priorities

    def weigh(
        self, round_index: int, current: Ids, history: Ids, history_batch: bool
    ) -> RoundWeights:
        """Return the weights that a round begins with. Collective.

        ``priority.target`` says what has weights; auto: the current data, and the history if the
        updater takes a history batch.
        """
        self._clear()
        target, source = self._priority.target, self._priority.source
        on_current = target in ("auto", "current", "union")
        on_history = target in ("history", "union") or (target == "auto" and history_batch)
        note = ""
        limit = self._priority.max_replay
        replays = self._mix.replays(len(current), len(history), history_batch)
        if on_history and limit and replays > exact(limit):
            on_history, on_current = False, target != "union" and on_current
            note = (
                f"[priority/hist] uniform: {float(replays):.3g} replays of a stored sample in this "
                f"round, more than priority.max_replay = {limit:g}"
            )
        self._weighted = (current if on_current else None, history if on_history else None)
        if source == "candidates":
            result = RoundWeights(chosen=(on_current, on_history and history_batch))
        elif self._ledger is not None:
            self._ledger.expect(round_index, self._source, current, history)
            result = self._from_ledger(self._ledger, round_index, 0)
        elif self._streamed is not None:
            result = self._streamed.weigh(self._shape, self._weighted, current, history)
        else:
            result = weigh(self._shape, self._score, *self._weighted)
        result.note = note
        return result

    def stand_down(self, weights: RoundWeights, note: str) -> RoundWeights:
        """Return uniform weights for the round that ``weights`` were made for. Local.

        What they were stays in the report, and ``note`` says why they are not used.
        """
        self._weighted = (None, None)
        note = "\n".join(line for line in (weights.note, note) if line)
        return RoundWeights(report=weights.report, note=note)

    def _score(self, ids: Ids) -> Weights:
        scores = self._scorer.score(self._source, ids).cpu().numpy()
        with large_arrays():
            return scores.astype(np.float64)

    def _from_ledger(self, ledger: Ledger, round_index: int, update: int) -> RoundWeights:
        """Return weights by the table as it is, over a fresh pool of the history if asked."""
        current, history = self._weighted
        size, chosen, pool = self._priority.pool, None, None
        if history is not None and 0 < size < len(history):
            chosen = self._pool.take(round_index, len(history), update * size, size)
            pool = history[chosen]

        def read(ids: Ids) -> Weights:
            if ids is pool and history is not None:
                return ledger.table.read(history, chosen)
            return ledger.table.read(ids)

        return weigh(self._shape, read, current, history, pool, report=not update)

    # ------------------------------------------------------------ 3. sampler

    def rebuild(
        self,
        round_index: int,
        current: Ids,
        history: Ids,
        weights: RoundWeights,
        history_batch: bool,
    ) -> None:
        """Set up the draws of a round; every rank passes the same. Collective."""
        if self._ledger is not None:
            self._ledger.expect(round_index, self._source, current, history)
        self._clear()
        self._round, self._current, self._history = round_index, current, history
        self._weights = weights
        self.account: Account = WholeAccount(self._runtime)
        if self._streamed is not None:
            self._weights = self._streamed.dealt(weights, current, history)
            self.account = self._streamed.account()
        self._replayed = history_batch and len(history) > 0
        self._refresh_seconds = 0.0
        self._choosers: dict[int, Chooser] = {}
        groups = self._groups(self._weights)
        self._plans = {which: self._plan(which, g) for which, g in groups.items()}
        weighted = [part for g in groups.values() for part in g if part.weights is not None]
        self._freshness.begin(self.steps() if weighted else 0, weighted)

    def steps(self, epochs: int | None = None) -> int:
        """Return the number of steps of the round, or of ``epochs`` passes. Local."""
        return self._mix.steps(len(self._current), len(self._history), epochs)

    def _groups(self, weights: RoundWeights) -> dict[int, list[Part]]:
        """Return what each plan draws from."""
        return self._mix.groups(weights, self._current, self._history, self._replayed)

    def _plan(self, which: int, groups: list[Part]) -> Plan:
        """Return who draws the training batches, or the history batches."""
        rank, world = self._runtime.rank, self._runtime.world_size
        size, seed, draw = self._mix.sizes[which], self._seed, self._priority.draw
        if self._ledger is not None and any(group.weights is not None for group in groups):
            window = self._priority.refresh_steps
            plan = WindowPlan(size, window, rank, world, seed, draw, stream=which + _WINDOWS)
            plan.begin(self._round, groups, self.steps())
            return plan
        if self._weights.chosen[which]:
            of = self._priority.candidates
            size, groups = size * of, [replace(group, draws=group.draws * of) for group in groups]
            self._choosers[which] = Chooser(
                self._scorer, self._source, self._shape, of, seed, which + _CHOICE
            )
        if self._streamed is not None:
            return self._streamed.sampler(size, groups, self._round, which)
        sampler = DistributedWeightedSampler(
            size,
            rank=rank,
            world_size=world,
            seed=seed,
            draw=draw,
            round_index=self._round,
            stream=which,
        )
        sampler.set_groups(groups)
        return sampler

    # ------------------------------------------------------------ 4. steps

    def batches(self, steps: int, done: int = 0) -> Iterator[tuple[Batch, Batch | None]]:
        """Yield (batch, history batch or None) for the steps left of ``steps``. Collective."""
        lanes = [self._lane(which, done) for which in self._plans]
        every = self._priority.refresh_steps
        if self._ledger is not None and done and done % every == 0:
            self._refresh(self._ledger, done)  # saved after the step, before the refresh
        for step in range(done + 1, steps + 1):
            batch, *hist = [self._take(lane) for lane in lanes]
            yield batch, hist[0] if hist else None
            if self._ledger is not None and (step % every == 0 or step == steps):
                self._refresh(self._ledger, step)
        self._weights.note = ""
        for which, chooser in self._choosers.items():
            self._weights.report[_PARTS[which]] = chooser.statistics()

    def look(self, step: int, ids: torch.Tensor, losses: torch.Tensor) -> None:
        """Take this rank's losses [B] of the ``step``-th step, if it is looked at. Local.

        Few steps of a round are looked at, and none of a round without weights.
        """
        if self._freshness.wants(step):
            groups = [part for which in self._plans for part in self._drawn_from(which, step - 1)]
            self._freshness.take(ids, losses, groups)

    def _drawn_from(self, which: int, step: int) -> list[Part]:
        """Return the groups that a plan's step, from 0, was drawn from."""
        plan = self._plans[which]
        if isinstance(plan, WindowPlan):
            return plan.groups(step)
        return self._groups(self._weights)[which]

    @property
    def staleness(self) -> float | None:
        """Rank correlation of weights and the round's losses so far, or None. Collective."""
        return self._freshness.correlation

    @property
    def candidates(self) -> int:
        """How many samples could be drawn in this round."""
        current, history = len(self._current), len(self._history)
        drawn = self._replayed or self._mix.draws(current, history)[1] > 0
        return current + drawn * history

    @property
    def weights(self) -> RoundWeights:
        """The weights that the round began with, and their report."""
        return self._weights

    def histograms(self) -> dict[str, npt.NDArray[np.int64]]:
        """Return histograms of weights between ``EDGES``, by the name of their part. Collective.

        Of the weights that the round began with, or of those of all candidates so far.
        """
        found = {
            name: weight_histogram(weights, self._runtime, over)
            for name, (weights, over) in self._weights.parts.items()
        }
        chosen = {_PARTS[which]: c.histogram for which, c in self._choosers.items()}
        return found | chosen

    @property
    def forwards(self) -> int:
        """Samples passed through the model to choose this round's batches, over all ranks."""
        return sum(chooser.forwards for chooser in self._choosers.values())

    @property
    def priority_seconds(self) -> float:
        """How much of the time of this round's steps went into priorities."""
        choosing = sum(chooser.seconds for chooser in self._choosers.values())
        return self._refresh_seconds + choosing

    def _take(self, lane: Iterator[tuple[Batch, Drawn]]) -> Batch:
        batch, drawn = next(lane)
        self.account.add(drawn)
        return batch

    def _lane(self, which: int, done: int) -> Iterator[tuple[Batch, Drawn]]:
        """Return the batches of a plan, without end or for all of the round's steps."""
        lane = self._reader.batches(self._plans[which], self._groups(self._weights)[which])
        chooser = self._choosers.get(which)
        if chooser is None:
            return lane
        whole = cast("Iterator[tuple[Batch, Ids]]", lane)  # candidates are not drawn in lanes
        return chooser.choose(self._round, whole, done)

    def _refresh(self, ledger: Ledger, step: int) -> None:
        """Gather what the steps since the last time told; weigh by it, from a window later on."""
        clock = time.perf_counter()
        ledger.gather()
        update, rest = divmod(step, self._priority.refresh_steps)
        windows = {w: plan for w, plan in self._plans.items() if isinstance(plan, WindowPlan)}
        from_step = step + self._priority.refresh_steps
        if windows and not rest and from_step < self.steps():
            groups = self._groups(self._from_ledger(ledger, self._round, update))
            for which, plan in windows.items():
                plan.set_groups(groups[which], from_step=from_step)
        self._refresh_seconds += time.perf_counter() - clock

    # ------------------------------------------------------------ state

    def ledger_state(self) -> dict[str, Any] | None:
        """Return the state of the signal table, the same on every rank. Collective."""
        if self._ledger is None:
            return None
        if self._ledger.waits:
            self._ledger.gather()
        return self._ledger.state_dict()

    def load_ledger(self, state: dict[str, Any] | None) -> None:
        """Restore it. Local."""
        if self._ledger is not None and state is not None:
            self._ledger.load_state_dict(state)

    def state_dict(self, done: int) -> dict[str, Any]:
        """Return what all ranks share of a round after ``done`` steps. Collective.

        As tensors and plain values.
        """
        plans = {}
        for which, plan in self._plans.items():
            consumed = done
            if not isinstance(plan, WindowPlan) and done:
                consumed = (done - 1) % len(plan) + 1
            plans[which] = plan.state_dict(consumed)
        return {
            "round": self._round,
            "current": ids_tensor(self._current),
            "history": ids_tensor(self._history),
            "replayed": self._replayed,
            "weights": self._weights.state_dict(),
            "weighted": [ids_tensor(ids) for ids in self._weighted],
            "account": None if self._streamed is not None else self.account.state_dict(),
            "seconds": self._refresh_seconds,
            "plans": plans,
            "choosers": {which: c.state_dict() for which, c in self._choosers.items()},
            "freshness": self._freshness.state_dict(),
        }

    def lane_state(self, in_round: bool) -> dict[str, Any] | None:
        """Return what only this rank has, if the source is read in lanes, else None. Local.

        It goes beside :meth:`state_dict`; ``in_round``: whether a round is in progress.
        """
        if self._streamed is None:
            return None
        if not in_round:
            return self._streamed.state(None, None)
        assert isinstance(self.account, LaneAccount)
        return self._streamed.state(self._weights, self.account)

    def load_lane_states(self, states: Sequence[dict[str, Any] | None]) -> None:
        """Restore those of all ranks, before :meth:`load_state_dict`, at any world size. Local."""
        if self._streamed is not None:
            self._streamed.load([state for state in states if state is not None])

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with the round that was saved, at any world size. Collective."""
        self._round = state["round"]
        self._current, self._history = tensor_ids(state["current"]), tensor_ids(state["history"])
        self._replayed = state["replayed"]
        self._weights = RoundWeights.from_state(state["weights"])
        if self._streamed is None:
            whole = WholeAccount(self._runtime)
            whole.load_state_dict(state["account"])
            self.account = whole
        else:
            self._weights, self.account = self._streamed.resumed(
                self._weights, self._current, self._history
            )
        self._weighted = (tensor_ids(state["weighted"][0]), tensor_ids(state["weighted"][1]))
        self._refresh_seconds = state["seconds"]
        self._choosers = {}
        groups = self._groups(self._weights)
        self._plans = {which: self._plan(which, groups[which]) for which in state["plans"]}
        for which, plan in self._plans.items():
            plan.load_state_dict(state["plans"][which])
        for which, chooser in self._choosers.items():
            chooser.load_state_dict(state["choosers"][which])
        self._freshness.load_state_dict(state["freshness"])


class Correction:
    """Loss weights that undo the skew of the draws (prioritized replay, Schaul et al. 2016).

    c_i = (N p_i)^-β / Σ_j p_j (N p_j)^-β  for a sample drawn from a group of N with probability
    p_i; 1 for a sample drawn uniformly. Their mean over draws is 1, so the step keeps its length:
    Schaul et al. divide by max_j c_j instead, which scales the learning rate. β = 1 makes the mean
    of corrected losses an unbiased estimate of the uniform mean.
    """

    def __init__(self, beta: float, dtype: torch.dtype) -> None:
        self._beta = beta
        self._dtype = dtype
        self._groups: Sequence[Part] | None = None

    def applied(self, batch: Batch, groups: Sequence[Part]) -> Batch:
        """Return the batch with the loss weights of its samples, drawn from ``groups``.

        Collective at the first batch from new groups, if their weights lie in slices.
        """
        if not self._beta:
            return batch
        device = tree_leaves(batch.y)[0].device
        return replace(batch, weights=self._of(batch.ids, groups).to(device, self._dtype))

    def _of(self, ids: torch.Tensor, groups: Sequence[Part]) -> torch.Tensor:
        if groups is not self._groups:
            self._groups = groups
            weighted = [(g.ids, g.weights, g.over) for g in groups if g.weights is not None]
            held = np.concatenate([i for i, *_ in weighted]) if weighted else ids.numpy()[:0]
            values = [self._loss_weights(w, over) for _, w, over in weighted]
            order = np.argsort(held, kind="stable")
            self._ids = held[order]
            self._values = np.concatenate(values)[order] if weighted else np.empty(0)
        found = np.ones(len(ids))
        if len(self._ids):
            at = np.searchsorted(self._ids, ids.numpy()).clip(max=len(self._ids) - 1)
            found = np.where(self._ids[at] == ids.numpy(), self._values[at], found)
        return torch.from_numpy(found)

    def _loss_weights(self, weights: Weights, over: Sums) -> Weights:
        share = weights / over.total(weights)
        with np.errstate(divide="ignore"):
            raw = np.where(share > 0, (over.number(share) * share) ** -self._beta, 0.0)
        loss_weights: Weights = raw / over.total(share * raw)
        return loss_weights


# Reads the batches that plans draw.


Plan = DistributedWeightedSampler | LaneSampler | WindowPlan
"""What draws one pass after another, or all of a round."""


class Reader:
    """Reads this rank's part of the batches, with their loss weights (``priority.correction``)."""

    def __init__(
        self, runtime: Runtime, source: Source, data: DataConfig, correction: float
    ) -> None:
        self._runtime = runtime
        self._source = source
        self._data = data
        self._beta = correction

    def batches(self, plan: Plan, groups: Sequence[Part]) -> Iterator[tuple[Batch, Drawn]]:
        """Yield batches and what they drew: of a WindowPlan its steps, of another without end.

        ``groups``: what a plan whose weights stay draws from. Collective if their weights lie in
        slices.
        """
        loader = BatchLoader(
            self._source,
            plan,
            workers=self._data.workers,
            pin_memory=self._data.pin_memory,
            device=self._runtime.device,
            dtype=self._runtime.dtype,
        )
        correction = Correction(self._beta, self._runtime.dtype)
        if isinstance(plan, WindowPlan):
            for step, batch in enumerate(loader, start=plan.first_step):
                yield correction.applied(batch, plan.groups(step)), plan.global_batch(step)
            return
        epoch = plan.epoch
        while True:
            plan.set_epoch(epoch)
            for step, batch in enumerate(loader, start=plan.first_step):
                yield (
                    correction.applied(batch, groups),
                    plan.parts(step) if isinstance(plan, LaneSampler) else plan.global_batch(step),
                )
            epoch += 1
