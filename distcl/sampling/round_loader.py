"""What a round trains on: which samples are drawn, by which weights, batch by batch."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from distcl.config import DataConfig, PriorityConfig
from distcl.data.ids import ids_tensor, tensor_ids
from distcl.data.loader import BatchLoader
from distcl.distributed.runtime import Runtime
from distcl.priority.population import Slices
from distcl.priority.round_weights import RoundWeighter, RoundWeights
from distcl.priority.weighting import Weights
from distcl.sampling.candidates import Chooser
from distcl.sampling.composition import HISTORY, MAIN, Mix, at_most_once
from distcl.sampling.correction import Correction
from distcl.sampling.draw_log import DrawLog, Drawn, weight_histogram
from distcl.sampling.groups import Part
from distcl.sampling.sampler import DistributedWeightedSampler
from distcl.sampling.sequential import LaneSampler
from distcl.sampling.staleness import Freshness
from distcl.types import Batch, Ids, Source, as_array, as_tensor

EMPTY: Ids = np.empty(0, dtype=np.int64)
_PARTS = {MAIN: "cur", HISTORY: "hist"}
_WINDOWS, _CHOICE = 16, 32  # added to the stream of a sampler

Sampler = DistributedWeightedSampler | LaneSampler
"""What draws one pass after another."""


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
        self._freshness = Freshness(runtime)
        self._lane_states: list[dict[str, Any]] = []  # of all ranks, until a round is loaded
        self._begin(0, EMPTY, EMPTY, RoundWeights(), replayed=False)

    def _begin(
        self, index: int, current: Ids, history: Ids, weights: RoundWeights, replayed: bool
    ) -> None:
        """Let go of what is held of the round before."""
        self._round, self._current, self._history = index, current, history
        self.weights = weights
        """The weights that the round began with, and their report."""
        self._replayed = replayed
        self.log = DrawLog(self._runtime, self._weighter.dealer)
        self._refresh_seconds = 0.0
        self._choosers: dict[int, Chooser] = {}
        self._samplers: dict[int, Sampler] = {}

    # ------------------------------------------------------------ 1. priorities

    def weigh(
        self, round_index: int, current: Ids, history: Ids, history_batch: bool
    ) -> RoundWeights:
        """Return the weights that a round begins with, see RoundWeighter.weigh. Collective."""
        self._begin(0, EMPTY, EMPTY, RoundWeights(), replayed=False)  # its memory may be needed
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
        weights = self._dealt(weights, current, history)
        self._begin(round_index, current, history, weights, history_batch and len(history) > 0)
        groups = self._groups(weights)
        self._samplers = {which: self._sampler(which, g) for which, g in groups.items()}
        weighted = [part for g in groups.values() for part in g if part.weights is not None]
        self._freshness.begin(self.steps() if weighted else 0, weighted)

    def steps(self, epochs: int | None = None) -> int:
        """Return the number of steps of the round, or of ``epochs`` passes. Local."""
        return self._mix.steps(len(self._current), len(self._history), epochs)

    def batch_sizes(self, steps: int) -> Iterator[tuple[int, int]]:
        """Yield the sizes of the global training and history batches of each step. Local."""
        current, history = len(self._current), len(self._history)
        return self._mix.batch_sizes(current, history, self._replayed, steps, self._windowed())

    def _windowed(self) -> dict[int, DistributedWeightedSampler]:
        """Return the samplers that draw in windows."""
        return {
            which: sampler
            for which, sampler in self._samplers.items()
            if isinstance(sampler, DistributedWeightedSampler) and sampler.window
        }

    def _dealt(self, weights: RoundWeights, current: Ids, history: Ids) -> RoundWeights:
        """Return weights that know which ids this rank has, if it has some only. Collective."""
        dealer = self._weighter.dealer
        if dealer is None or isinstance(weights.over[0], Slices):
            return weights
        return replace(weights, over=(dealer.deal(current), dealer.deal(history)))

    def _groups(self, weights: RoundWeights) -> dict[int, list[Part]]:
        """Return what each sampler draws from."""
        return self._mix.groups(weights, self._current, self._history, self._replayed)

    def _sampler(self, which: int, groups: list[Part]) -> Sampler:
        """Return who draws the training batches, or the history batches. Collective."""
        size, stream, window, number = self._mix.sizes[which], which, None, None
        if self._weighter.ledger is not None and any(g.weights is not None for g in groups):
            window, number = self._priority.refresh_steps, self.steps() * size
            stream += _WINDOWS
        if self.weights.chosen[which]:
            of = self._priority.candidates
            size, groups = size * of, [replace(group, draws=group.draws * of) for group in groups]
            w, choice = self._weighter, which + _CHOICE
            self._choosers[which] = Chooser(w.scorer, self._source, w.shape, of, self._seed, choice)
        sampler: Sampler
        if self._weighter.dealer is not None:
            sampler = LaneSampler(
                size,
                window=self._data.shuffle_buffer,
                seed=self._seed,
                round_index=self._round,
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
                round_index=self._round,
                stream=stream,
            )
        sampler.set_groups(groups)
        return sampler

    # ------------------------------------------------------------ 4. steps

    def batches(self, steps: int, done: int = 0) -> Iterator[tuple[Batch, Batch | None]]:
        """Yield (batch, history batch or None) for the steps left of ``steps``. Collective."""
        lines = [self._drawn(which, done) for which in self._samplers]
        every, ledger = self._priority.refresh_steps, self._weighter.ledger
        if ledger is not None and done and done % every == 0:
            self._refresh(done)  # saved after the step, before the refresh
        for step in range(done + 1, steps + 1):
            batches = []
            for line in lines:
                batch, drawn = next(line)
                self.log.add(drawn)
                batches.append(batch)
            yield batches[0], batches[1] if len(batches) > 1 else None
            if ledger is not None and (step % every == 0 or step == steps):
                self._refresh(step)
        self.weights.note = ""
        for which, chooser in self._choosers.items():
            self.weights.report[_PARTS[which]] = chooser.statistics()

    def _drawn(self, which: int, done: int) -> Iterator[tuple[Batch, Drawn]]:
        """Yield the batches of a sampler and what they drew, for all of the round's steps."""
        sampler, chooser = self._samplers[which], self._choosers.get(which)
        read = self._read(sampler)
        if chooser is None:
            return read
        return chooser.choose(self._round, read, done, sampler.view)

    def _read(self, sampler: Sampler) -> Iterator[tuple[Batch, Drawn]]:
        """Yield this rank's parts with their loss weights, and what was drawn, without end.

        Collective where weights lie in slices.
        """
        loader = BatchLoader(
            self._source,
            sampler,
            workers=self._data.workers,
            pin_memory=self._data.pin_memory,
            device=self._runtime.device,
            dtype=self._runtime.dtype,
        )
        correction = Correction(self._priority.correction, self._runtime.dtype)
        epoch = sampler.epoch
        while True:
            sampler.set_epoch(epoch)
            for step, batch in enumerate(loader, start=sampler.first_step):
                yield correction.applied(batch, sampler.groups(step)), sampler.parts(step)
            epoch += 1

    def _refresh(self, step: int) -> None:
        """Gather what the steps since the last time told; weigh by it, from a window later on."""
        clock, every = time.perf_counter(), self._priority.refresh_steps
        assert self._weighter.ledger is not None
        self._weighter.ledger.gather()
        update, rest = divmod(step, every)
        windows = self._windowed()
        if windows and not rest and step + every < self.steps():
            those = self.weights.weighted, self._round, self._current, self._history
            groups = self._groups(self._weighter.by_ledger(*those, update))
            for which, sampler in windows.items():
                sampler.set_groups(groups[which], from_step=step + every)
        self._refresh_seconds += time.perf_counter() - clock

    # ------------------------------------------------------------ what a round tells

    def look(self, step: int, ids: torch.Tensor, losses: torch.Tensor) -> None:
        """Take this rank's losses [B] of the ``step``-th step, if it is looked at. Local.

        Few steps of a round are looked at, and none of a round without weights.
        """
        if self._freshness.wants(step):
            samplers = self._samplers.values()
            parts = [part for s in samplers for part in s.groups((step - 1) % len(s))]
            self._freshness.take(ids, losses, parts)

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

    def histograms(self) -> dict[str, npt.NDArray[np.int64]]:
        """Return histograms of weights between ``EDGES``, by the name of their part. Collective.

        Of the weights that the round began with, or of those of all candidates so far.
        """
        found = {
            name: weight_histogram(weights, self._runtime, over)
            for name, (weights, over) in self.weights.parts.items()
        }
        return found | {_PARTS[which]: c.histogram for which, c in self._choosers.items()}

    @property
    def forwards(self) -> int:
        """Samples passed through the model to choose this round's batches, over all ranks."""
        return sum(chooser.forwards for chooser in self._choosers.values())

    @property
    def priority_seconds(self) -> float:
        """How much of the time of this round's steps went into priorities."""
        choosing = sum(chooser.seconds for chooser in self._choosers.values())
        return self._refresh_seconds + choosing

    # ------------------------------------------------------------ state

    def state_dict(self, done: int) -> dict[str, Any]:
        """Return what all ranks share of a round after ``done`` steps. Collective.

        As tensors and plain values.
        """
        samplers = {
            which: sampler.state_dict((done - 1) % len(sampler) + 1 if done else 0)
            for which, sampler in self._samplers.items()
        }
        return {
            "round": self._round,
            "current": ids_tensor(self._current),
            "history": ids_tensor(self._history),
            "replayed": self._replayed,
            "weights": self.weights.state_dict(),
            "log": None if self._weighter.dealer is not None else self.log.state_dict(),
            "seconds": self._refresh_seconds,
            "samplers": samplers,
            "choosers": {which: c.state_dict() for which, c in self._choosers.items()},
            "freshness": self._freshness.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with the round that was saved, at any world size. Collective."""
        current, history = tensor_ids(state["current"]), tensor_ids(state["history"])
        weights = self._dealt(RoundWeights.from_state(state["weights"]), current, history)
        self._begin(state["round"], current, history, weights, state["replayed"])
        if self._weighter.dealer is None:
            self.log.load_states([state["log"]])
        else:
            self._load_lanes()
        self._refresh_seconds = state["seconds"]
        groups = self._groups(self.weights)
        self._samplers = {which: self._sampler(which, groups[which]) for which in state["samplers"]}
        for which, sampler in self._samplers.items():
            sampler.load_state_dict(state["samplers"][which])
        for which, chooser in self._choosers.items():
            chooser.load_state_dict(state["choosers"][which])
        self._freshness.load_state_dict(state["freshness"])

    def lane_state(self, in_round: bool) -> dict[str, Any] | None:
        """Return what only this rank has, if the source is read in lanes, else None. Local.

        It goes beside :meth:`state_dict`; ``in_round``: whether a round is in progress.
        """
        if self._weighter.dealer is None:
            return None
        state: dict[str, Any] = {"cache": self._weighter.scorer.cache.state_dict()}
        if in_round:
            values = self.weights.current, self.weights.history
            state["weights"] = [
                None if some is None else (as_tensor(_slices(over).ids), as_tensor(some))
                for some, over in zip(values, self.weights.over, strict=True)
            ]
            state["log"] = self.log.state_dict()
        return state

    def load_lane_states(self, states: Sequence[dict[str, Any] | None]) -> None:
        """Take those of all ranks, before :meth:`load_state_dict`, at any world size. Local."""
        dealer = self._weighter.dealer
        if dealer is not None:
            self._lane_states = [state for state in states if state is not None]
            caches = [state["cache"] for state in self._lane_states]
            self._weighter.scorer.cache.load_parts(caches, dealer.own)

    def _load_lanes(self) -> None:
        """Take up this rank's weights and draws of the round that was saved. Local."""
        states, self._lane_states = self._lane_states, []
        found: list[Weights | None] = []
        for k, over in enumerate(self.weights.over):
            parts = [state["weights"][k] for state in states]
            if any(part is None for part in parts):
                found.append(None)
                continue
            ids, values = (np.concatenate([as_array(p[j]) for p in parts]) for j in (0, 1))
            found.append(_slices(over).pick(ids, values))
        self.weights = replace(self.weights, current=found[0], history=found[1])
        self.log.load_states([state["log"] for state in states])

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


def _slices(over: object) -> Slices:
    assert isinstance(over, Slices)
    return over
