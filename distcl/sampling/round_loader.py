"""What a round trains on: which samples are drawn, by which weights, batch by batch."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.utils._pytree import tree_leaves

from distcl.config import DataConfig, PriorityConfig
from distcl.data.ids import IdIndex, tensor_ids
from distcl.data.loader import BatchLoader
from distcl.distributed.runtime import Runtime
from distcl.priority.round_weights import NAMES, RoundWeighter, RoundWeights
from distcl.priority.weighting import Weights, WeightVector
from distcl.sampling.candidates import Chooser
from distcl.sampling.composition import Mix, at_most_once
from distcl.sampling.draw_log import Drawn
from distcl.sampling.groups import Part
from distcl.sampling.round_draws import AnySampler, RoundDraws
from distcl.sampling.sampler import DistributedWeightedSampler
from distcl.sampling.sequential import LaneSampler
from distcl.sampling.staleness import Freshness
from distcl.types import Batch, Ids, Source, as_array, as_tensor

EMPTY: Ids = np.empty(0, dtype=np.int64)
_WINDOWS, _CHOICE = 16, 32  # added to the stream of a sampler


class RoundLoader:
    """The batches of one round after another: rebuild, then iterate over the steps.

    One sampler draws the training batches, from the current data and, if history is mixed in, from
    both; a second one draws history batches for updaters that take them. Its batches may be
    candidates that a Chooser chooses among, or it draws in windows, where weights change on the way
    (``weighter.ledger``). Over a source that is read from front to back it is a LaneSampler: there,
    each rank has the weights and draws of its own lanes only.
    """

    def __init__(
        self,
        runtime: Runtime,
        source: Source,
        weighter: RoundWeighter,
        mix: Mix,
        priority: PriorityConfig,
        data: DataConfig,
        seed: int,
    ) -> None:
        self._runtime = runtime
        self._source = source
        self._weighter = weighter
        self._mix = mix
        self._priority = priority
        self._data = data
        self._seed = seed
        self._lane_states: list[dict[str, Any]] = []  # of all ranks, until a round is loaded
        self._begin = partial(RoundDraws, runtime, mix, weighter.dealer)
        self.round = self._begin(0, EMPTY, EMPTY, RoundWeights())
        """The round in progress, or the last one."""

    # ------------------------------------------------------------ 1. priorities

    def weigh(
        self, round_index: int, current: Ids, history: Ids, history_batch: bool
    ) -> RoundWeights:
        """Return the weights that a round begins with, see RoundWeighter.weigh. Collective."""
        self.round = self._begin(0, EMPTY, EMPTY, RoundWeights())  # its memory may be needed
        replays = self._mix.replays(len(current), len(history), history_batch)
        return self._weighter.weigh(round_index, current, history, history_batch, replays)

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
        if self._weighter.ledger is not None:
            self._weighter.ledger.expect(round_index, self._source, current, history)
        weights = weights.of(current, history, self._weighter.dealer)
        replayed = history_batch and len(history) > 0
        self.round = self._begin(round_index, current, history, weights, replayed)
        groups = self.round.groups()
        self.round.samplers = {which: self._sampler(which, g) for which, g in groups.items()}
        weighted = [part for g in groups.values() for part in g if part.values is not None]
        self.round.freshness = Freshness(self._runtime, self.steps() if weighted else 0, weighted)

    def steps(self, epochs: int | None = None) -> int:
        """Return the number of steps of the round, or of ``epochs`` passes. Local."""
        return self._mix.steps(len(self.round.current), len(self.round.history), epochs)

    def batch_sizes(self, steps: int) -> Iterator[tuple[int, int]]:
        """Yield the sizes of the global training and history batches of each step. Local."""
        round_ = self.round
        current, history = len(round_.current), len(round_.history)
        return self._mix.batch_sizes(current, history, round_.replayed, steps, round_.windowed)

    def _sampler(self, which: int, groups: list[Part]) -> AnySampler:
        """Return who draws the training batches, or the history batches. Collective."""
        size, stream, window, number = self._mix.sizes[which], which, None, None
        if self._weighter.ledger is not None and any(g.values is not None for g in groups):
            window, number = self._priority.refresh_steps, self.steps() * size
            stream += _WINDOWS
        if self.round.weights.chosen[which]:
            of = self._priority.candidates
            size, groups = size * of, [replace(group, draws=group.draws * of) for group in groups]
            w, choice = self._weighter, which + _CHOICE
            self.round.choosers[which] = Chooser(
                w.scorer, self._source, w.shape, of, self._seed, choice
            )
        sampler: AnySampler
        if self._weighter.dealer is not None:
            sampler = LaneSampler(
                size,
                window=self._data.shuffle_buffer,
                seed=self._seed,
                round_index=self.round.index,
                stream=which,
            )
        else:
            if self._priority.draw == "without_replacement":
                groups = [at_most_once(group) for group in groups]
            sampler = DistributedWeightedSampler(
                size,
                window=window,
                num_samples=number,
                rank=self._runtime.rank,
                world_size=self._runtime.world_size,
                seed=self._seed,
                draw=self._priority.draw,
                round_index=self.round.index,
                stream=stream,
            )
        sampler.set_groups(groups)
        return sampler

    # ------------------------------------------------------------ 4. steps

    def batches(self, steps: int, done: int = 0) -> Iterator[tuple[Batch, Batch | None]]:
        """Yield (batch, history batch or None) for the steps left of ``steps``. Collective."""
        round_ = self.round
        lines = [self._read(which, done) for which in round_.samplers]
        every, ledger = self._priority.refresh_steps, self._weighter.ledger
        if ledger is not None and done and done % every == 0:
            self._refresh(done)  # saved after the step, before the refresh
        for step in range(done + 1, steps + 1):
            batches = []
            for line in lines:
                batch, drawn = next(line)
                round_.log.add(drawn)
                batches.append(batch)
            yield batches[0], batches[1] if len(batches) > 1 else None
            if ledger is not None and (step % every == 0 or step == steps):
                self._refresh(step)
        round_.weights.note = ""
        for which, chooser in round_.choosers.items():
            round_.weights.report[NAMES[which]] = chooser.statistics()

    def _read(self, which: int, done: int) -> Iterator[tuple[Batch, Drawn]]:
        """Yield the batches of a sampler and what they drew, for all of the round's steps."""
        sampler, chooser = self.round.samplers[which], self.round.choosers.get(which)
        loader = BatchLoader(
            self._source,
            sampler,
            workers=self._data.workers,
            pin_memory=self._data.pin_memory,
            device=self._runtime.device,
            dtype=self._runtime.dtype,
        )
        correction = Correction(self._priority.correction, self._runtime.dtype)

        def read() -> Iterator[tuple[Batch, Drawn]]:
            """Yield this rank's parts with their loss weights, and what was drawn, without end.

            Collective where weights lie in slices.
            """
            epoch = sampler.epoch
            while True:
                sampler.set_epoch(epoch)
                for step, batch in enumerate(loader, start=sampler.first_step):
                    yield correction.applied(batch, sampler.groups(step)), sampler.parts(step)
                epoch += 1

        if chooser is None:
            return read()
        return chooser.choose(self.round.index, read(), done, sampler.view)

    def _refresh(self, step: int) -> None:
        """Gather what the steps since the last time told; weigh by it, from a window later on."""
        clock, every, round_ = time.perf_counter(), self._priority.refresh_steps, self.round
        assert self._weighter.ledger is not None
        self._weighter.ledger.gather()
        update, rest = divmod(step, every)
        windows = round_.windowed
        if windows and not rest and step + every < self.steps():
            those = round_.weights.weighted, round_.index, round_.current, round_.history
            groups = round_.groups(self._weighter.by_ledger(*those, update))
            for which, sampler in windows.items():
                sampler.set_groups(groups[which], from_step=step + every)
        round_.refresh_seconds += time.perf_counter() - clock

    # ------------------------------------------------------------ state

    def state_dict(self, done: int) -> dict[str, Any]:
        """Return what all ranks share of a round after ``done`` steps. Collective."""
        return self.round.state_dict(done)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with the round that was saved, at any world size. Collective."""
        dealer, lanes = self._weighter.dealer, self._lane_states
        current, history = tensor_ids(state["current"]), tensor_ids(state["history"])
        weights = RoundWeights.from_state(state["weights"], current, history)
        weights = weights.of(current, history, dealer)
        if dealer is not None:
            held = [[rank["weights"][k] for rank in lanes] for k in range(len(NAMES))]
            first, second = map(_of_lanes, weights.vectors, held)
            weights = replace(weights, vectors=(first, second))
        self.round = self._begin(state["round"], current, history, weights, state["replayed"])
        logs = [state["log"]] if dealer is None else [rank["log"] for rank in lanes]
        self.round.log.load_states(logs)
        self._lane_states = []
        self.round.refresh_seconds = state["seconds"]
        groups = self.round.groups()
        self.round.samplers = {which: self._sampler(which, groups[which]) for which in groups}
        for which, sampler in self.round.samplers.items():
            sampler.load_state_dict(state["samplers"][which])
        for which, chooser in self.round.choosers.items():
            chooser.load_state_dict(state["choosers"][which])
        self.round.freshness.load_state_dict(state["freshness"])

    def lane_state(self, in_round: bool) -> dict[str, Any] | None:
        """Return what only this rank has, if the source is read in lanes, else None. Local.

        It goes beside :meth:`state_dict`; ``in_round``: whether a round is in progress.
        """
        if self._weighter.dealer is None:
            return None
        state: dict[str, Any] = {"cache": self._weighter.scorer.cache.state_dict()}
        if in_round:
            parts = self.round.weights.parts
            state["weights"] = [
                None if part is None else (as_tensor(part.ids), as_tensor(part.values))
                for part in map(parts.get, NAMES)
            ]
            state["log"] = self.round.log.state_dict()
        return state

    def load_lane_states(self, states: Sequence[dict[str, Any] | None]) -> None:
        """Take those of all ranks, before :meth:`load_state_dict`, at any world size. Local."""
        dealer = self._weighter.dealer
        if dealer is not None:
            self._lane_states = [state for state in states if state is not None]
            caches = [state["cache"] for state in self._lane_states]
            self._weighter.scorer.cache.load_parts(caches, dealer.own)

    def ledger_state(self) -> dict[str, Any] | None:
        """Return the state of the signal table, the same on every rank. Collective."""
        ledger = self._weighter.ledger
        if ledger is None:
            return None
        if ledger.waits:
            ledger.gather()
        return ledger.state_dict()

    def load_ledger(self, state: dict[str, Any] | None) -> None:
        """Restore it. Local."""
        if self._weighter.ledger is not None and state is not None:
            self._weighter.ledger.load_state_dict(state)


def _of_lanes(part: WeightVector | None, ranks: Sequence[Any]) -> WeightVector | None:
    """Return a part of this rank's lanes with its weights, from (ids, weights) of all ranks."""
    if part is None or part.slices is None or any(rank is None for rank in ranks):
        return part
    ids, values = (np.concatenate([as_array(rank[k]) for rank in ranks]) for k in (0, 1))
    return replace(part, values=part.slices.pick(ids, values))


class Correction:
    """Loss weights that undo the skew of draws, as in prioritized replay (Schaul et al. 2016).

    c_i = (N p_i)^-β / Σ_j p_j (N p_j)^-β  for a sample drawn from a group of N with probability
    p_i; 1 for a sample drawn uniformly. One that stands for m of N has N p_i / m instead. Their
    mean over draws is 1, so the step keeps its length: Schaul et al. divide by max_j c_j instead,
    which scales the learning rate. β = 1 makes the mean of corrected losses an unbiased estimate of
    the uniform mean.
    """

    def __init__(self, beta: float, dtype: torch.dtype) -> None:
        self._beta = beta
        self._dtype = dtype
        self._groups: Sequence[Part] | None = None  # those that what follows was made of
        self._index = IdIndex(np.empty(0, dtype=np.int64))
        self._values: Weights = np.empty(0)

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
            weighted = [group for group in groups if group.values is not None]
            held = np.concatenate([np.empty(0, np.int64), *(group.ids for group in weighted)])
            values = [np.empty(0), *(self._loss_weights(group) for group in weighted)]
            self._index, self._values = IdIndex(held), np.concatenate(values)
        found = np.ones(len(ids))
        at, there = self._index.locate(ids.numpy())
        found[there] = self._values[at[there]]
        return torch.from_numpy(found)

    def _loss_weights(self, weights: Part) -> Weights:
        share, skew = weights.held / weights.sum(), weights.number
        if weights.multiples is not None:
            skew = weights.multiples.sum() / weights.multiples
        with np.errstate(divide="ignore"):
            raw = np.where(share > 0, (skew * share) ** -self._beta, 0.0)
        loss_weights: Weights = raw / weights.sum(share * raw)
        return loss_weights
