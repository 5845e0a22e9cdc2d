"""The plan of an epoch: what is drawn in each step, all at once or in windows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np

from distcl.distributed.memory import large_arrays
from distcl.errors import UsageError
from distcl.priority.weighting import Positions, Weights
from distcl.sampling import draws
from distcl.sampling.groups import Part
from distcl.types import Ids

DRAWS = {
    "multinomial": draws.multinomial,
    "systematic": draws.systematic,
    "without_replacement": draws.without_replacement,
    "credit": draws.credit,
}

Window = tuple[Positions, list[Part]]
"""The draws of a window, or of the epoch, in order: positions in the groups, one after another."""


Credit = dict[int, Weights]
"""What the samples of each group have earned so far, see :func:`distcl.sampling.draws.credit`."""


@dataclass(frozen=True, slots=True)
class DrawOptions:
    """What tells apart the plans of samplers, see DistributedWeightedSampler."""

    global_batch_size: int
    window: int | None
    num_samples: int | None
    seed: int
    draw: str
    drop_last: bool
    stream: int


class EpochPlan:
    """Draws an epoch, or one window of it after another, see DistributedWeightedSampler.

    ``schedule``: the groups to draw from, each with the window from which on they hold. Windows are
    drawn when they are asked for; the newest two are held. Every rank makes the same plan.
    ``credit``: what a plan had at ``step``, see :meth:`credit_at`.
    """

    def __init__(
        self,
        options: DrawOptions,
        schedule: Sequence[tuple[int, list[Part]]],
        round_index: int,
        epoch: int,
        step: int = 0,
        credit: Credit | None = None,
    ) -> None:
        self.options = options
        self.round_index = round_index
        self.epoch = epoch
        self.schedule = [*schedule]
        first = self.schedule[0][1] if self.schedule else []
        self._next = self._index(step)  # the first window not drawn
        self._drawn: dict[int, Window] = {}
        self._credit: Credit = {g: held.copy() for g, held in (credit or {}).items()}
        self._credit_before: dict[int, Credit] = {}  # the windows that are held
        self.passes = sum(group.draws for group in first)
        """Draws of a pass, as many as the groups say."""
        self.total = self.passes
        """Draws of the epoch."""
        self._sizes: list[int] = []  # of each group in a batch, in windows
        self._order: Ids = np.empty(0, dtype=np.intp)  # of a batch, in windows
        self._permutations = [draws.Permutations(options.seed, options.stream) for _ in first]
        if options.window and self.passes:
            size, number = options.global_batch_size, options.num_samples or self.passes
            steps = number // size if options.drop_last else -(-number // size)
            self._sizes = draws.apportion(size, [group.draws for group in first])
            evenly = [(np.arange(size) + 0.5) / size for size in self._sizes]
            self._order = np.argsort(np.concatenate(evenly), kind="stable")
            self.total = steps * size

    @property
    def steps(self) -> int:
        """The number of steps of the epoch, equal on all ranks."""
        if not self.schedule:
            raise UsageError("the sampler has nothing to draw from: call set_weights first")
        full, rest = divmod(self.total, self.options.global_batch_size)
        return full + (rest > 0 and not self.options.drop_last)

    def _index(self, step: int) -> int:
        return step // self.options.window if self.options.window else 0

    def change(self, step: int, groups: list[Part]) -> None:
        """Draw from other groups from ``step`` on: the first of a window that is not drawn yet."""
        window, number = self.options.window, len(groups)
        if not window:
            raise UsageError("weights change within an epoch only in windows: give window")
        first, rest = divmod(step, window)
        before = len(self.schedule[0][1]) if self.schedule else 0
        if rest or first < self._next or number != before:
            raise UsageError(
                f"{number} groups from step {step} on: the plan has {before}, and windows of "
                f"{window} steps, drawn up to step {self._next * window}"
            )
        for g in self._credit:
            was, now = self.schedule[-1][1][g].ids, groups[g].ids
            if now is not was and not np.array_equal(now, was):
                raise UsageError("draw = 'credit' keeps what each id has earned: give the same ids")
        self.schedule.append((first, groups))

    def span(self, step: int) -> tuple[int, int]:
        """Return the first draw of a step and the one after its last."""
        if not 0 <= step < self.steps:
            raise ValueError(f"step {step} is not among the {self.steps} steps of the epoch")
        begin = step * self.options.global_batch_size
        return begin, min(begin + self.options.global_batch_size, self.total)

    def read(self, step: int, begin: int, end: int) -> tuple[Positions, list[Part]]:
        """Return draws ``begin`` to ``end``, which are of a step, and the groups they are from."""
        positions, groups = self.window(step)
        window = self.options.window
        first = step // window * window * self.options.global_batch_size if window else 0
        return positions[begin - first : end - first], groups

    def window(self, step: int) -> Window:
        """Return the window of a step, or the epoch.

        Steps come in order; one may go back as far as the window before the newest.
        """
        index = self._index(step)
        while self._next <= index:
            self._credit_before[self._next] = {g: c.copy() for g, c in self._credit.items()}
            with large_arrays() if self.options.window is None else nullcontext():
                self._drawn[self._next] = self._draw(self._next, self._credit)
            self._drawn.pop(self._next - 2, None)
            self._credit_before.pop(self._next - 2, None)
            self._next += 1
        while len(self.schedule) > 1 and self.schedule[1][0] < self._next:
            del self.schedule[0]
        if index not in self._drawn:
            raise UsageError(f"step {step} is of a window that is gone")
        return self._drawn[index]

    def known(self, number: int) -> Iterator[Window]:
        """Yield the first windows by the weights known now, drawn anew if they are not held."""
        credit = {g: held.copy() for g, held in self._credit.items()}
        for index in range(number):
            if index in self._drawn:
                yield self._drawn[index]
            elif index < self._next and credit:
                raise UsageError(f"window {index} is gone, and with it what its draws had earned")
            else:
                yield self._draw(index, credit)

    def schedule_at(self, step: int) -> list[tuple[int, list[Part]]]:
        """Return the schedule that a resume at ``step`` needs."""
        index = self._index(step)
        if index < self._next and index not in self._drawn:
            raise UsageError(f"step {step} is of a window that is gone")
        now = [(index, self._drawn[index][1])] if index in self._drawn else []
        return now + [entry for entry in self.schedule if entry[0] > index or not now]

    def credit_at(self, step: int) -> Credit:
        """Return the credit that a resume at ``step`` needs; none of other draws."""
        window = self.options.window
        if window and self.options.draw == "credit" and self._index(step) > self._next:
            self.window((self._index(step) - 1) * window)  # steps before it were taken
        return self._credit_before.get(self._index(step), self._credit)

    def _draw(self, index: int, credit: Credit) -> Window:
        """Draw a window, or the epoch; ``credit`` becomes what is left of it."""
        groups = [groups for first, groups in self.schedule if first <= index][-1]
        kind = draws.index_type(sum(len(group.ids) for group in groups))
        rng = draws.generator(self.options.seed, self.options.stream, self.round_index, self.epoch)
        parts, offset = [], 0
        for g, group in enumerate(groups):
            if self.options.window:
                drawn = self._of_window(index, g, group, credit)
            elif group.values is None:
                drawn = draws.uniform(len(group.ids), group.draws, rng)
            else:
                drawn = DRAWS[self.options.draw](group.values, group.draws, rng)
            part = drawn.astype(kind, copy=False)
            if offset:
                part += kind(offset)
            parts.append(part)
            offset += len(group.ids)
        if self.options.window:
            columns = [p.reshape(-1, size) for p, size in zip(parts, self._sizes, strict=True)]
            return np.concatenate(columns, axis=1)[:, self._order].ravel(), groups
        if len(parts) == 1:
            return parts[0], groups
        joined = np.concatenate(parts)
        rng.shuffle(joined)
        return joined, groups

    def _of_window(self, index: int, g: int, group: Part, credit: Credit) -> Positions:
        """Return a group's draws in a window; steps and windows count on over epochs."""
        window, size = self.options.window, self._sizes[g]
        assert window
        first = self.epoch * self.steps + index * window
        number = size * min(window, self.steps - index * window)
        if group.values is None:
            return self._permutations[g].take(
                self.round_index, len(group.ids), first * size, number, kind=2 * g + 1
            )
        count = self.epoch * -(-self.steps // window) + index
        key = self.options.seed, self.options.stream, self.round_index, count, 2 * g
        rng = draws.generator(*key)
        if self.options.draw != "credit":
            return DRAWS[self.options.draw](group.values, number, rng)
        if g not in credit:
            credit[g] = rng.random(len(group.ids))
        return draws.credit(group.values, number, rng, credit[g])
