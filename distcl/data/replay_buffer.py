"""What earlier experiences were: ids, and copies of the samples if their source does not stay."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils._pytree import tree_map

from distcl.data.ids import (
    BLOCK,
    IdRuns,
    among,
    blocks,
    ids_tensor,
    in_runs,
    joined_ids,
    tensor_ids,
)
from distcl.data.loader import iterate_chunks
from distcl.types import Batch, DataSpec, Experience, Ids, PyTree, Stream, frozen

_CHUNK = 1024


class History:
    """Ids of earlier experiences' training samples, unique, oldest first. Local.

    Every rank holds the same, if every rank adds the same. The stream reads the samples again
    when they are replayed, so a sample costs eight bytes; ids added in runs
    (:class:`distcl.data.ids.IdRuns`) stay in runs and cost next to nothing.

    ``capacity`` K > 0 bounds it: of all distinct ids ever added it holds K, every set of K equally
    likely over seeds, as Vitter's reservoir (1985, algorithm R) does. The K with the smallest
    keys stay, a key being a hash of (seed, id). So nothing need be counted or remembered, the
    result does not depend on the order or grouping of additions, and an id that comes again after
    it was let go stays out.

    ``copies``: keeps copies of exactly the samples held.
    """

    def __init__(
        self, capacity: int = 0, seed: int = 0, copies: CopyingStream | None = None
    ) -> None:
        self.capacity = capacity
        self._seed = seed
        self._copies = copies
        self._ids: Ids = frozen(np.empty(0, dtype=np.int64))

    def after(self, ids: Ids) -> Ids:
        """Return the ids that would be held after ``add(ids)``, int64 [H].

        Read-only ``ids`` may be returned themselves.
        """
        held = self._with(ids)
        if not 0 < self.capacity < len(held):
            return held
        return held[_smallest_keys(held, self.capacity, self._seed)]

    def _with(self, ids: Ids) -> Ids:
        """Return the ids held and those of ``ids`` that are not."""
        if isinstance(ids, IdRuns):
            if not len(self._ids) or ids.min() > self._ids.max():
                return joined_ids([self._ids, ids]) if len(self._ids) else ids
            ids = in_runs(some[~among(some, self._ids)] for some in blocks(ids))
            return joined_ids([self._ids, ids])
        ids = np.asarray(ids, dtype=np.int64)
        known = _among(ids, self._ids)
        fresh = _first_of_each(ids[~known] if known.any() else ids)
        if len(self._ids):
            return joined_ids([self._ids, fresh])
        return fresh.copy() if fresh.flags.writeable else fresh

    def add(self, ids: Ids) -> None:
        """Append the ids [N] of an experience, in their order; those already held are left out."""
        self._hold(self.after(ids))

    def retain(self, ids: Ids) -> None:
        """Hold these ids, of those held, and no others."""
        self._hold(ids)

    def _hold(self, ids: Ids) -> None:
        self._ids = ids if isinstance(ids, IdRuns) else frozen(ids)
        if self._copies is not None:
            self._copies.keep(ids)

    def ids(self) -> Ids:
        """Return every id held, int64 [H], read-only."""
        return self._ids

    def __len__(self) -> int:
        return len(self._ids)

    def state_dict(self) -> dict[str, Any]:
        """Return {"ids": :func:`data.ids.ids_tensor`, "copies": the copies' state or None}."""
        return {
            "ids": ids_tensor(self._ids),
            "copies": None if self._copies is None else self._copies.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        self._ids = tensor_ids(state["ids"])
        if self._copies is not None:
            self._copies.load_state_dict(state["copies"])


def _first_of_each(ids: Ids) -> Ids:
    """Return ``ids`` without repeats, in the order in which each comes first."""
    if _all_differ(ids):  # the usual case, at a fraction of the memory
        return ids
    _, first = np.unique(ids, return_index=True)
    return ids[np.sort(first)]


def _all_differ(ids: Ids) -> bool:
    """Return whether no id is there twice."""
    if (ids[1:] > ids[:-1]).all():
        return True
    low, span = ids.min(), int(ids.max() - ids.min()) + 1
    if not 0 < span <= 8 * len(ids):
        ordered = np.sort(ids)
        return bool((ordered[1:] > ordered[:-1]).all())
    there = np.zeros(span, dtype=np.bool_)
    for some in blocks(ids):
        there[some - low] = True
    return int(np.count_nonzero(there)) == len(ids)


def _among(ids: Ids, others: Ids) -> npt.NDArray[np.bool_]:
    """Return which of ``ids`` are among ``others``; fast if they are sorted."""
    if len(others) == 0 or len(ids) == 0 or ids.min() > others.max():
        return np.zeros(len(ids), dtype=np.bool_)
    if isinstance(others, IdRuns):
        return others.contains(ids)
    others = np.sort(others)
    at = np.searchsorted(others, ids).clip(max=len(others) - 1)
    found: npt.NDArray[np.bool_] = others[at] == ids
    return found


def _smallest_keys(ids: Ids, number: int, seed: int) -> Ids:
    """Return, ascending, the positions of the ``number`` ids whose keys are smallest."""
    best: Ids = np.empty(0, dtype=np.int64)
    keys = np.empty(0, dtype=np.uint64)
    step = max(BLOCK, number)
    for start in range(0, len(ids), step):  # keys of all of them at once would be as large as ids
        some = ids[start : start + step]
        best = np.concatenate([best, np.arange(start, start + len(some))])
        keys = np.concatenate([keys, _keys(some, seed)])
        if len(best) > number:
            kept = np.argpartition(keys, number - 1)[:number]
            best, keys = best[kept], keys[kept]
    return np.sort(best)


def _keys(ids: Ids, seed: int) -> npt.NDArray[np.uint64]:
    """Return a hash of (seed, id) for each id, uint64 [N]: SplitMix64's finalizer, twice."""
    return _mix(_mix(ids.astype(np.uint64)) ^ _mix(np.full(1, seed, dtype=np.uint64)))


def _mix(z: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    z = z + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


class CopyingStream:
    """A stream whose samples are copied when :meth:`keep` says so, then read from the copies.

    For ``history_store = "copy"``: the stream itself need not be able to read them again. The
    copies lie in host memory and whole on every rank, since any rank may draw any id: H samples a
    rank. Held-out samples are not copied. Local.
    """

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self.spec: DataSpec = stream.spec
        self.experiences: list[Experience] = stream.experiences
        self.replaces = bool(getattr(stream, "replaces", False))
        self.replaced: set[int] = getattr(stream, "replaced", set())
        self.unusable = int(getattr(stream, "unusable", 0))
        self.sequential = bool(getattr(stream, "sequential", False))
        self.live_seconds = float(getattr(stream, "live_seconds", 0.0))
        self._ids: Ids = np.empty(0, dtype=np.int64)  # sorted
        self._read: Ids = self._ids  # what was read for each: another one in a bad one's place
        self._copies: tuple[PyTree, PyTree] = (None, None)  # x and y, leaves [H, ...]

    def __len__(self) -> int:
        return len(self._stream)

    def read(self, ids: Ids) -> Batch:
        """Read samples, in the order asked: kept ones from the copies, others from the stream.

        The ids returned are those of the samples, as :meth:`distcl.types.Source.read` has it.
        """
        ids = np.asarray(ids, dtype=np.int64)
        at = np.searchsorted(self._ids, ids).clip(max=max(0, len(self._ids) - 1))
        held = self._ids[at] == ids if len(self._ids) else np.zeros(len(ids), dtype=np.bool_)
        if not held.any():
            return self._stream.read(ids)
        rows = torch.from_numpy(at[held])
        read = torch.from_numpy(self._read[at[held]])
        self.replaced.update(ids[held][self._read[at[held]] != ids[held]].tolist())
        x, y = tree_map(lambda t: t[rows], self._copies)
        if not held.all():
            other = self._stream.read(ids[~held])
            back = torch.from_numpy(np.argsort(np.argsort(~held, kind="stable")))
            read, x, y = tree_map(
                lambda a, b: torch.cat([a, b])[back], (read, x, y), (other.ids, other.x, other.y)
            )
        return Batch(read, x, y, len(ids))

    def arrived(self) -> int:
        """See :meth:`distcl.data.stream.DriftStream.arrived`."""
        return int(self._stream.arrived())  # type: ignore[attr-defined]

    def grow(self, more: int) -> Ids:
        """See :meth:`distcl.data.stream.DriftStream.grow`."""
        return self._stream.grow(more)  # type: ignore[attr-defined, no-any-return]

    def lanes_of(self, ids: Ids, lanes: int) -> Ids:
        """See :meth:`distcl.data.stream.DriftStream.lanes_of`."""
        return self._stream.lanes_of(ids, lanes)  # type: ignore[attr-defined, no-any-return]

    def keep(self, ids: Ids) -> None:
        """Hold copies of these samples [H] and no others; those not yet held are read now."""
        ids = np.unique(ids)
        parts = [(b.ids, b.x, b.y) for b in iterate_chunks(self, ids, _CHUNK)]
        self._copies = (None, None)
        self._ids = self._read = ids
        if parts:
            read, x, y = tree_map(lambda *some: torch.cat(some), *parts)
            self._read, self._copies = read.numpy(), (x, y)

    def state_dict(self) -> dict[str, Any]:
        """Return ids int64 [H], the samples, and their own ids int64 [H]."""
        ids, read = torch.from_numpy(self._ids), torch.from_numpy(self._read)
        return {"ids": ids, "read": read, "x": self._copies[0], "y": self._copies[1]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        self._ids, self._read = state["ids"].numpy(), state["read"].numpy()
        self._copies = (state["x"], state["y"])
