"""Global batches drawn a window of steps at a time, so that new weights may come on the way."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from distcl.errors import UsageError
from distcl.priority import draws, shaping
from distcl.priority.groups import Group
from distcl.priority.sampler import DRAWS, part_of
from distcl.types import Ids, as_tensor


@dataclass(frozen=True, slots=True)
class Part(Group):
    """A group whose ids int64 [N] and weights float64 [N] (None: permutations) are arrays.

    They are all there are, or this rank's, which ``over`` sums.
    """

    ids: Ids
    weights: shaping.Weights | None
    over: shaping.Sums = shaping.WHOLE


class WindowPlan:
    """This rank's part of each global batch of a round, for :class:`BatchLoader`. All is local.

    Window j is the steps from j·R on, R of them. It is drawn when its first step is asked for, by
    the groups in force for it; all ranks draw the same, a pure function of (seed, stream, round,
    window, draw, groups). So new weights cost the draws of R steps, however large an epoch is.

    Every batch holds the same number of samples of each group, in proportion to the groups' draws
    (at least one), mixed evenly. Groups without weights go through one permutation after another.

    Args:
        batch_size: samples of a global batch.
        window: R, in steps.
        rank: this process, below ``world_size``.
        world_size: number of processes.
        seed: from 0 to 2**64 - 1.
        draw: ``multinomial`` or ``systematic``, the latter over each window by itself.
        stream: keeps apart plans that share a seed.
    """

    def __init__(
        self,
        batch_size: int,
        window: int,
        rank: int,
        world_size: int,
        seed: int,
        draw: str,
        stream: int,
    ) -> None:
        self.batch_size = batch_size
        self.window = window
        self._rank, self._world = rank, world_size
        self._seed, self._stream = seed, stream
        self._draw = DRAWS[draw]

    def begin(self, round_index: int, groups: Sequence[Part], steps: int) -> None:
        """Plan a round of ``steps`` steps; nothing is copied."""
        self._round, self._steps, self.first_step = round_index, steps, 0
        self._schedule: list[tuple[int, list[Part]]] = [(0, list(groups))]  # from a window on
        self._next = 0  # the first window not drawn
        self._drawn: dict[int, tuple[Ids, list[Part]]] = {}
        self._sizes = apportion(self.batch_size, [g.draws for g in groups])
        evenly = [(np.arange(size) + 0.5) / size for size in self._sizes]
        self._order = np.argsort(np.concatenate(evenly), kind="stable")
        self._uniform = [Permutations(self._seed, self._stream) for _ in groups]

    def set_groups(self, groups: Sequence[Part], *, from_step: int) -> None:
        """Draw by these groups from a window on that is not drawn yet; they are as many as before.

        Raises UsageError if ``from_step`` is not the first step of a window, or was handed out, to
        a DataLoader that reads ahead for one.
        """
        first, rest = divmod(from_step, self.window)
        if rest or first < self._next or len(groups) != len(self._sizes):
            raise UsageError(
                f"{len(groups)} groups from step {from_step} on: the plan has {len(self._sizes)}, "
                f"and windows of {self.window} steps, drawn up to step {self._next * self.window}"
            )
        self._schedule.append((first, list(groups)))

    def groups(self, step: int) -> list[Part]:
        """Return what a step's batch was drawn from; steps as for :meth:`global_batch`."""
        return self._of_window(step // self.window)[1]

    def __len__(self) -> int:
        return self._steps

    def __iter__(self) -> Iterator[list[int]]:
        """Yield this rank's part of each batch, a list of ids, from ``first_step`` on."""
        for step in range(self.first_step, self._steps):
            ids = self.global_batch(step)
            lo, hi = part_of(len(ids), self._rank, self._world)
            yield ids[lo:hi].tolist()

    def total(self, step: int) -> int:
        """Return the size of a global batch; steps as for :meth:`global_batch`."""
        return len(self.global_batch(step))

    def global_batch(self, step: int) -> Ids:
        """Return the ids of all ranks' parts of a batch, int64 [B].

        Steps come in order; one may go back as far as the window before the newest.
        """
        index, row = divmod(step, self.window)
        ids: Ids = self._of_window(index)[0][row]
        return ids

    def _of_window(self, index: int) -> tuple[Ids, list[Part]]:
        while self._next <= index:
            self._drawn[self._next] = self._draw_window(self._next)
            self._drawn.pop(self._next - 2, None)
            self._next += 1
        return self._drawn[index]

    def _draw_window(self, index: int) -> tuple[Ids, list[Part]]:
        """Return ids int64 [steps, B], and the groups that they are drawn from."""
        while len(self._schedule) > 1 and self._schedule[1][0] <= index:
            del self._schedule[0]
        groups = self._schedule[0][1]
        first = index * self.window
        steps = min(self.window, self._steps - first)
        columns = []
        for g, (group, size) in enumerate(zip(groups, self._sizes, strict=True)):
            if group.weights is None:
                at = self._uniform[g].take(
                    self._round, len(group.ids), first * size, steps * size, kind=2 * g + 1
                )
            else:
                rng = draws.generator(self._seed, self._stream, self._round, index, 2 * g)
                at = self._draw(group.weights, steps * size, rng)
            columns.append(group.ids[at].reshape(steps, size))
        return np.concatenate(columns, axis=1)[:, self._order], groups

    def state_dict(self, consumed: int) -> dict[str, Any]:
        """Return what a resume after ``consumed`` steps needs: ints and tensors."""
        index = consumed // self.window
        now = [(index, self._drawn[index][1])] if index in self._drawn else []
        ahead = [(first, groups) for first, groups in self._schedule if first > index or not now]
        return {
            "round": self._round,
            "steps": self._steps,
            "consumed": consumed,
            "schedule": [
                {"window": first, "groups": [_packed(group) for group in groups]}
                for first, groups in now + ahead
            ],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where ``state_dict`` was called, at any world size."""
        schedule = [(e["window"], [_unpacked(g) for g in e["groups"]]) for e in state["schedule"]]
        self.begin(state["round"], schedule[0][1], state["steps"])
        self._schedule = schedule
        self.first_step = state["consumed"]
        self._next = self.first_step // self.window


class Permutations:
    """Permutations of N positions, one after another without end, read at any place.

    The k-th is a function of (seed, k and the counters), so any rank and a resumed run read the
    same. Holds one, 4 N bytes (8 N from 2**32 positions on).
    """

    def __init__(self, seed: int, stream: int) -> None:
        self._seed = seed
        self._stream = stream
        self._held: tuple[tuple[int, ...], draws.Positions] | None = None

    def take(
        self, round_index: int, number: int, first: int, n: int, kind: int = 0
    ) -> draws.Positions:
        """Return draws ``first`` to ``first`` + n of ``number`` positions, [n]."""
        found = []
        while n:
            index, at = divmod(first, number)
            key = (self._stream, round_index, index, kind)
            if self._held is None or self._held[0] != (number, *key):
                drawn = draws.uniform(number, number, draws.generator(self._seed, *key))
                self._held = (number, *key), drawn
            found.append(self._held[1][at : at + n])
            first, n = first + len(found[-1]), n - len(found[-1])
        return np.concatenate(found)


def apportion(total: int, shares: Sequence[int]) -> list[int]:
    """Split ``total`` in proportion to ``shares``, at least 1 each; the largest takes the rest.

    Raises UsageError if there are more shares than ``total``.
    """
    if len(shares) > total:
        raise UsageError(f"a batch of {total} cannot hold samples of {len(shares)} groups")
    sizes = [max(1, total * share // sum(shares)) for share in shares]
    sizes[sizes.index(max(sizes))] += total - sum(sizes)
    return sizes


def _packed(group: Part) -> dict[str, Any]:
    weights = as_tensor(group.weights)
    return {"ids": as_tensor(group.ids), "weights": weights, "draws": group.draws}


def _unpacked(packed: dict[str, Any]) -> Part:
    weights = None if packed["weights"] is None else packed["weights"].numpy()
    return Part(packed["ids"].numpy(), weights, packed["draws"])
