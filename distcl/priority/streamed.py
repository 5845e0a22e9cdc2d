"""What a Feed does otherwise over a source that is read from front to back: lane by lane."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from distcl.config import DataConfig
from distcl.footprint import large_arrays
from distcl.priority.account import LaneAccount
from distcl.priority.lanes import LaneGroup, LaneSampler
from distcl.priority.scoring import Scorer
from distcl.priority.shaping import Sums, Weights
from distcl.priority.slices import Dealer, Slices
from distcl.priority.weights import RoundWeights, Shape, weigh
from distcl.priority.windows import Part
from distcl.runtime import Runtime
from distcl.types import Ids, Source, as_array, as_tensor


class Streamed:
    """This rank's lanes: their samples' scores, weights and draws, which no other rank has."""

    def __init__(
        self, runtime: Runtime, source: Source, data: DataConfig, scorer: Scorer, seed: int
    ) -> None:
        lanes_of = source.lanes_of  # type: ignore[attr-defined]
        self._dealer = Dealer.over(runtime, data.lanes, lanes_of)
        self._runtime = runtime
        self._source = source
        self._window = data.shuffle_buffer
        self._scorer = scorer
        self._seed = seed
        self._states: list[dict[str, Any]] = []

    def weigh(
        self, shape: Shape, weighted: tuple[Ids | None, Ids | None], current: Ids, history: Ids
    ) -> RoundWeights:
        """Return the weights of this rank's part of what is ``weighted``. Collective."""
        cut = self._dealer.deal(current), self._dealer.deal(history)

        def score(mine: Ids) -> Weights:
            which = 0 if mine is cut[0].ids else 1
            ids = weighted[which]
            assert ids is not None
            scores = self._scorer.score_slices(self._source, ids, cut[which]).cpu().numpy()
            with large_arrays():
                return scores.astype(np.float64)

        mine = [None if ids is None else held.ids for ids, held in zip(weighted, cut, strict=True)]
        return weigh(shape, score, *mine, over=cut)

    def dealt(self, weights: RoundWeights, current: Ids, history: Ids) -> RoundWeights:
        """Return weights that know which ids this rank has. Collective."""
        if isinstance(weights.over[0], Slices):
            return weights
        return replace(weights, over=(self._dealer.deal(current), self._dealer.deal(history)))

    def account(self) -> LaneAccount:
        """Return the account of a new round. Local."""
        return LaneAccount(self._runtime, self._dealer)

    def sampler(
        self, size: int, groups: Sequence[Part], round_index: int, stream: int
    ) -> LaneSampler:
        """Return what draws global batches of ``size`` from groups. Collective."""
        made = LaneSampler(
            size, window=self._window, seed=self._seed, round_index=round_index, stream=stream
        )
        made.set_groups([LaneGroup(_slices(g.over), g.weights, g.draws) for g in groups])
        return made

    def state(self, weights: RoundWeights | None, account: LaneAccount | None) -> dict[str, Any]:
        """Return what only this rank has, of a round if one is in progress. Local."""
        state: dict[str, Any] = {"cache": self._scorer.cache.state_dict()}
        if weights is not None and account is not None:
            values = weights.current, weights.history
            state["weights"] = [
                None if some is None else (as_tensor(_slices(over).ids), as_tensor(some))
                for some, over in zip(values, weights.over, strict=True)
            ]
            state["account"] = account.state_dict()
        return state

    def load(self, states: Sequence[dict[str, Any]]) -> None:
        """Take the states of all ranks, however many there were; keep what is of my lanes. Local.

        :meth:`resumed` takes up what is of a round.
        """
        self._states = list(states)
        self._scorer.cache.load_parts([state["cache"] for state in states], self._dealer.own)

    def resumed(
        self, weights: RoundWeights, current: Ids, history: Ids
    ) -> tuple[RoundWeights, LaneAccount]:
        """Return this rank's weights and account of the round that was saved. Collective."""
        weights, account = self.dealt(weights, current, history), self.account()
        states, self._states = self._states, []
        found: list[Weights | None] = []
        for k, over in enumerate(weights.over):
            parts = [state["weights"][k] for state in states]
            if any(part is None for part in parts):
                found.append(None)
                continue
            ids, values = (np.concatenate([as_array(p[j]) for p in parts]) for j in (0, 1))
            found.append(_slices(over).pick(ids, values))
        account.load_states([state["account"] for state in states])
        return replace(weights, current=found[0], history=found[1]), account


def _slices(over: Sums) -> Slices:
    assert isinstance(over, Slices)
    return over
