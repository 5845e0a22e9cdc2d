"""What earlier experiences were: ids, and copies of the samples if their source does not stay."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils._pytree import tree_map

from distcl.data.ids import (
    BLOCK,
    GOLDEN,
    IdIndex,
    IdRuns,
    among,
    blocks,
    ids_tensor,
    in_runs,
    joined_ids,
    splitmix,
    tensor_ids,
)
from distcl.data.loader import iterate_chunks
from distcl.types import Batch, Ids, PyTree, Source, Stream, frozen, info_of, pack_ids, unpack_ids

_CHUNK = 1024


class ReplayBuffer:
    """Ids of earlier experiences' training samples, unique, oldest first, and how to read them.

    Local: every rank holds the same, if every rank adds the same. The stream reads the samples
    again when they are replayed, so a sample costs eight bytes; ids added in runs
    (:class:`distcl.data.ids.IdRuns`) stay in runs and cost next to nothing.

    ``capacity`` K > 0 bounds it: of all distinct ids ever added it holds K, every set of K equally
    likely over seeds, as Vitter's reservoir (1985, algorithm R) does. The K with the smallest
    keys stay, a key being a hash of (seed, id). So nothing need be counted or remembered, the
    result does not depend on the order or grouping of additions, and an id that comes again after
    it was let go stays out.

    ``copies`` (``history_store = "copy"``): the samples held, and no others, are copied into host
    memory, whole on every rank, since any rank may draw any id. The stream itself need not be able
    to read them again.

    General data of the stream (``info.general``) are held from the start and for good, first, and
    are not counted by ``capacity``. ``takes``: None is held besides where this is False.
    """

    def __init__(
        self,
        stream: Stream,
        capacity: int = 0,
        seed: int = 0,
        copies: bool = False,
        takes: bool = True,
    ) -> None:
        self.capacity = capacity
        self.copies = copies
        self.info = info_of(stream)
        self._stream = stream
        self._seed = seed
        self._ids: Ids = frozen(np.empty(0, dtype=np.int64))
        self._copied = IdIndex(self._ids)
        self._read: Ids = self._ids  # of each copy: another id in a bad one's place
        self._samples: tuple[PyTree, PyTree] = (None, None)  # x and y, leaves [H, ...]
        self._takes = takes
        self._general = self.info.general
        if self._general is not None:
            self.retain(self._general)

    @property
    def source(self) -> Source:
        """What reads samples, held or not: this buffer, or the stream where that is the same."""
        return self if self.copies or self.info.replaces else self._stream

    def __len__(self) -> int:
        return len(self._ids)

    def ids(self) -> Ids:
        """Return every id held, int64 [H], read-only."""
        return self._ids

    def after(self, ids: Ids) -> Ids:
        """Return the ids that would be held after ``add(ids)``, int64 [H].

        Read-only ``ids`` may be returned themselves.
        """
        held = self._with(ids) if self._takes else self._ids
        n = 0 if self._general is None else len(self._general)
        if not 0 < self.capacity < len(held) - n:
            return held
        kept = held[n + _smallest_keys(held[n:], self.capacity, self._seed)]
        return joined_ids([held[:n], kept]) if n else kept

    def _with(self, ids: Ids) -> Ids:
        """Return the ids held and those of ``ids`` that are not."""
        new = not len(self._ids) or not len(ids) or ids.min() > self._ids.max()
        if isinstance(ids, IdRuns):
            if not new:
                ids = in_runs(some[~among(some, self._ids)] for some in blocks(ids))
        else:
            ids = np.asarray(ids, dtype=np.int64)
            ids = _first_of_each(ids if new else ids[~among(ids, self._ids)])
        if len(self._ids):
            return joined_ids([self._ids, ids])
        return ids if isinstance(ids, IdRuns) or not ids.flags.writeable else ids.copy()

    def add(self, ids: Ids) -> None:
        """Append the ids [N] of an experience, in their order; those already held are left out."""
        self.retain(self.after(ids))

    def retain(self, ids: Ids) -> None:
        """Hold these ids, of those held or new, and no others; what is to be copied is read."""
        self._ids = ids if isinstance(ids, IdRuns) else frozen(ids)
        if self.copies:
            wanted = np.unique(ids)
            parts = [(b.ids, b.x, b.y) for b in iterate_chunks(self, wanted, _CHUNK)]
            self._samples = (None, None)  # before there are two of all
            read, x, y = tree_map(lambda *some: torch.cat(some), *parts) if parts else _NOTHING
            self._keep(wanted, read.numpy(), x, y)

    def _keep(self, ids: Ids, read: Ids, x: PyTree, y: PyTree) -> None:
        self._copied, self._read, self._samples = IdIndex(ids), read, (x, y)

    def read(self, ids: Ids) -> Batch:
        """Read samples, held or not, in the order asked. Local. The batch has the ids really read.

        In the place of a held one that is bad comes the next by id, of those held, that is not.
        """
        ids = np.asarray(ids, dtype=np.int64)
        if self.copies:
            return self._from_copies(ids, *self._copied.locate(ids))
        batch = self._stream.read(ids)
        read = batch.ids.numpy()
        bad = np.flatnonzero(read != ids)
        strays = bad[among(ids[bad], self._ids) & ~among(read[bad], self._ids)] if len(bad) else bad
        if not len(strays):
            return batch
        held, read = np.sort(self._ids), read.copy()
        pairs = zip(ids[strays], read[strays], strict=True)
        read[strays] = [self._stand_in(held, *pair) for pair in pairs]
        return self._stream.read(read)

    def _stand_in(self, held: Ids, bad: int, found: int) -> int:
        """Return the next sound one of the ids ``held``, ascending; ``found``, if there is none."""
        n, first, k = len(held), int(np.searchsorted(held, bad, "right")), 0
        while k < n:  # those behind it, then those before it
            other = held[(first + k) % n, None]
            read = int(self._stream.read(other).ids[0])
            if held[np.searchsorted(held, read) % n] == read:
                return read
            # none of its experience is sound from there to what was read, or else to its end
            beyond = read if read > other[0] else pack_ids(int(unpack_ids(other)[0][0]) + 1, 0)
            k = max(k + 1, (int(np.searchsorted(held, beyond)) - first) % n)
        return found

    def _from_copies(self, ids: Ids, rows: Ids, held: npt.NDArray[np.bool_]) -> Batch:
        if not held.any():
            return self._stream.read(ids)
        rows, asked = rows[held], ids[held]
        read = torch.from_numpy(self._read[rows])
        self.info.replaced.update(asked[self._read[rows] != asked].tolist())
        x, y = tree_map(lambda t: t[torch.from_numpy(rows)], self._samples)
        if not held.all():
            other = self._stream.read(ids[~held])
            back = torch.from_numpy(np.argsort(np.argsort(~held, kind="stable")))
            read, x, y = tree_map(
                lambda a, b: torch.cat([a, b])[back], (read, x, y), (other.ids, other.x, other.y)
            )
        return Batch(read, x, y, len(ids))

    def state_dict(self) -> dict[str, Any]:
        """Return {"ids": :func:`data.ids.ids_tensor`, "copies": None, or what is copied}.

        That is ids int64 [H], the samples, and the ids int64 [H] of what was read for each.
        """
        copies = None
        if self.copies:
            ids, read = torch.from_numpy(self._copied.ids), torch.from_numpy(self._read)
            copies = {"ids": ids, "read": read, "x": self._samples[0], "y": self._samples[1]}
        return {"ids": ids_tensor(self._ids), "copies": copies}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned; without copies there, samples are read anew."""
        ids, copies = tensor_ids(state["ids"]), state["copies"]
        if self.copies and copies is not None:
            self._keep(copies["ids"].numpy(), copies["read"].numpy(), copies["x"], copies["y"])
        if self._general is not None:  # which may be new
            ids = joined_ids([self._general, ids[~among(ids, self._general)]])
        self._ids = ids
        if self.copies and len(self._copied.ids) < len(ids):
            self.retain(ids)


_NOTHING: tuple[torch.Tensor, PyTree, PyTree] = torch.empty(0, dtype=torch.int64), None, None


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
    """Return a hash of (seed, id) for each id, uint64 [N]: SplitMix64, twice."""
    key = splitmix(np.full(1, seed, dtype=np.uint64) + GOLDEN)
    return splitmix((splitmix(ids.astype(np.uint64) + GOLDEN) ^ key) + GOLDEN)
