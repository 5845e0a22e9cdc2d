"""How a round mixes current data and history: how many draws of each, in groups to draw from."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from fractions import Fraction
from math import floor

import numpy as np

from distcl.config import ContinualLearningConfig, TrainingConfig
from distcl.priority.weighting import WeightVector, joined
from distcl.sampling.groups import Part
from distcl.types import exact, frozen

MAIN, HISTORY = 0, 1
"""The plan of the training batches, and that of history batches for updaters that take them."""


class Mix:
    """The sizes of rounds, by ``training.*`` and ``continual_learning.*``. All is local.

    ``union``: current data and history are drawn by common weights, as one group.
    """

    def __init__(
        self, training: TrainingConfig, continual: ContinualLearningConfig, union: bool
    ) -> None:
        self._training = training
        self._ratio = exact(continual.current_ratio)
        self._mixed = continual.mix_historic_data
        self._union = union
        self.sizes = {
            MAIN: training.batch_size,
            HISTORY: continual.replay_batch_size or training.batch_size,
        }
        """The global batch size of each plan."""

    def draws(self, current: int, history: int) -> tuple[int, int]:
        """Return how many current and history samples a pass draws into training batches.

        r·N and (1-r)·N rounded down, of current data at least one; all of both where r is 1.
        """
        history = history if self._mixed else 0
        if self._ratio == 1:
            return current, history
        return max(1, floor(self._ratio * current)), floor((1 - self._ratio) * history)

    def steps(self, current: int, history: int, epochs: int | None = None) -> int:
        """Return the number of steps of a round, or of ``epochs`` passes."""
        of_a_pass = -(-sum(self.draws(current, history)) // self.sizes[MAIN])
        if epochs is not None:
            return epochs * of_a_pass
        steps = self._training.steps_per_round or self._training.epochs * of_a_pass
        return max(1, round(exact(self._training.step_factor) * steps))

    def batch_sizes(
        self, current: int, history: int, replayed: bool, steps: int, whole: Collection[int] = ()
    ) -> Iterator[tuple[int, int]]:
        """Yield the sizes of the global training and history batches of each of ``steps``.

        The last batch of a pass may be smaller, but for plans in ``whole``. ``replayed``: there are
        history batches.
        """
        passes = {MAIN: sum(self.draws(current, history)), HISTORY: history if replayed else 0}

        def size(which: int, step: int) -> int:
            most, draws = self.sizes[which], passes[which]
            if which in whole or not draws:
                return most if draws else 0
            return min(most, draws - step % -(-draws // most) * most)

        for step in range(steps):
            yield size(MAIN, step), size(HISTORY, step)

    def replays(self, current: int, history: int, history_batch: bool) -> Fraction:
        """Return how often a round draws a stored sample, on average."""
        if not history:
            return Fraction(0)
        drawn = self.draws(current, history)
        mixed = Fraction(self.sizes[MAIN] * drawn[1], sum(drawn))
        steps = self.steps(current, history)
        return steps * (mixed + history_batch * self.sizes[HISTORY]) / history

    def groups(
        self, parts: Sequence[WeightVector], current: int, history: int, replayed: bool
    ) -> dict[int, list[Part]]:
        """Return what each plan draws from; ``replayed``: there are history batches.

        ``parts``: the weights of the ``current`` data, and of the ``history`` or a pool of it. Ids
        and weights are read-only, so that plans share them: nothing may change them later.
        """
        mine, stored = parts
        drawn = self.draws(current, history)
        main = [_part(mine, drawn[0])]
        if drawn[1]:
            main.append(_part(stored, drawn[1]))
            if self._union and stored.values is not None:  # each one of a pool counts for several
                each = history / stored.number
                stands_for = replace(stored, values=stored.values * each)
                union = _part(joined(mine, stands_for), sum(drawn))
                if each > 1:
                    multiples = np.repeat([1.0, each], [mine.number, stored.number])
                    union = replace(union, multiples=multiples)
                main = [union]
        groups = {MAIN: main}
        if replayed:
            groups[HISTORY] = [_part(stored, history)]
        return groups


def _part(weights: WeightVector, draws: int) -> Part:
    values = None if weights.values is None else frozen(weights.values)
    return Part(frozen(weights.ids), values, weights.slices, draws=draws)


def at_most_once(group: Part) -> Part:
    """Return a group of no more draws than it has samples with a weight: bad ones have none."""
    if group.values is None:
        return group
    return replace(group, draws=min(group.draws, int(np.count_nonzero(group.values))))
