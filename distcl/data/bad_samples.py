"""Bad samples that are skipped: every rank learns of them, and they are not drawn again."""

from __future__ import annotations

import logging
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch

from distcl.data.ids import IdRuns, blocks, in_runs
from distcl.data.replay_buffer import ReplayBuffer
from distcl.distributed.runtime import Runtime
from distcl.errors import DataError
from distcl.types import Experience, Ids, Stream, info_of, pack_ids, unpack_ids

log = logging.getLogger("distcl")


class BadSamples:
    """Samples that turned out bad while a stream was read; the same on every rank after ``update``.

    It does nothing, and communicates nothing, unless the stream's source replaces bad samples
    (``data.on_bad_sample = "skip"``). A sample is bad in every experience.
    """

    def __init__(self, stream: Stream, runtime: Runtime) -> None:
        self._runtime = runtime
        self._stream = stream
        self._replaced = info_of(stream).replaced
        self._bad: Ids = np.empty(0, dtype=np.int64)  # as ids of experience 0

    @property
    def count(self) -> int:
        """How many samples are left out: known as the source was opened, or found since."""
        return info_of(self._stream).unusable + len(self._bad)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return the bad samples that all know, and those that some rank has found. Collective.

        ``bad``: as ids of experience 0, int64 [N]; ``found``: the ids asked for, int64 [N].
        """
        return {"bad": torch.from_numpy(self._bad), "found": torch.from_numpy(self._found())}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Restore what ``state_dict`` returned."""
        self._bad = state["bad"].numpy()
        self._replaced.update(state["found"].tolist())

    def _found(self) -> Ids:
        """Return the ids in whose place any rank has read another, int64 [N]. Collective."""
        run = self._runtime
        mine = torch.tensor(sorted(self._replaced), dtype=torch.int64, device=run.device)
        each = 0
        if info_of(self._stream).replaces:
            each = int(run.all_reduce(torch.tensor(len(mine), device=run.device), "max"))
        if not each:
            return np.empty(0, dtype=np.int64)
        padded = mine.new_full((each,), -1)
        padded[: len(mine)] = mine
        found: Ids = np.unique(run.all_gather(padded, each * run.world_size).cpu().numpy())
        return found[found >= 0]

    def update(self) -> None:
        """Gather what each rank has found. Collective."""
        found = np.setdiff1d(_samples(self._found()), self._bad)
        self._bad = np.union1d(self._bad, found)
        if len(found) and self._runtime.is_main:
            shown = ", ".join(map(str, found[:8].tolist())) + (", …" if len(found) > 8 else "")
            log.warning("[bad samples] %d skipped so far; new: %s", self.count, shown)

    def clear(self, history: ReplayBuffer, experience: Experience) -> Experience:
        """Drop bad samples from the history; return the experience without them. Collective."""
        self.update()
        if len(self._bad):
            history.retain(self.without(history.ids()))
        train, test = self.without(experience.train), self.without(experience.test)
        if not (len(train) and len(test)):
            what = "held-out" if len(train) else "training"
            raise DataError(f"all {what} samples of experience {experience.index + 1} are bad")
        return replace(experience, train=train, test=test)

    def silence(self, *weighted: tuple[Ids, npt.NDArray[np.float64] | None]) -> None:
        """Set the weights [N] of bad ones among ids [N] to zero, in place. Collective.

        It follows the scoring pass, which has read every candidate.
        """
        self.update()
        for ids, weights in weighted:
            if weights is not None and len(self._bad):
                weights[self.among(ids)] = 0

    def among(self, ids: Ids) -> npt.NDArray[np.bool_]:
        """Return which of ``ids`` [N] are bad, bool [N]. Local."""
        return np.isin(_samples(ids), self._bad)

    def without(self, ids: Ids) -> Ids:
        """Return ``ids`` without bad ones. Local."""
        if not len(self._bad):
            return ids
        if isinstance(ids, IdRuns):
            return in_runs(some[~self.among(some)] for some in blocks(ids))
        return ids[~self.among(ids)]


def _samples(ids: Ids) -> Ids:
    """Return the ids that the same samples have in experience 0."""
    _, rows, test = unpack_ids(ids)
    return np.where(test, pack_ids(0, rows, test=True), rows)
