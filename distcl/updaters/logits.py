"""Logits by sample id: a table of them, and the last ones that training gave a sample."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from distcl.data.ids import IdIndex, blocks
from distcl.distributed.runtime import Runtime
from distcl.errors import ConfigError, UsageError
from distcl.priority.scoring import Scorer
from distcl.types import Batch, Ids, PyTree, Source, info_of


def one_tensor(outputs: PyTree, method: str) -> torch.Tensor:
    """Return a model's outputs if they are one tensor; else ConfigError naming the method."""
    if not isinstance(outputs, torch.Tensor):
        raise ConfigError(
            f"continual_learning.update_mode = '{method}' needs a model that returns one tensor, "
            f"not a {type(outputs).__name__}"
        )
    return outputs


def compute_logits(
    scorer: Scorer,
    source: Source,
    ids: Ids,
    method: str,
    keep: Callable[[torch.Tensor, PyTree], torch.Tensor] = lambda logits, _: logits,
) -> tuple[Ids, torch.Tensor]:
    """Return logits [N, ...] of ``ids`` (at least one), eval mode, in host memory. Collective.

    ``keep(logits [B, ...], y)`` -> what of them is returned instead, [B, ...].

    With them come the ids int64 [N] of what was read: others than asked, in the place of bad ones.
    Each rank computes the logits of its chunks, cut as for scoring; all ranks get all.
    """
    forward, size, dtype = scorer.forward, scorer.batch_size, scorer.forward.runtime.dtype
    mine: list[torch.Tensor] = []  # ids read of a block
    read, logits = [ids[:0]], []

    def measure(batch: Batch) -> torch.Tensor:
        mine.append(batch.ids)
        return keep(one_tensor(forward.outputs(batch).logits, method).to(dtype), batch.y)

    for block in blocks(ids):
        logits.append(forward.per_batch(source, block, size, measure).to("cpu", dtype))
        forward.forwards += len(block)
        if info_of(source).replaces:
            own = torch.cat(mine)[: len(forward.mine(block, size))].to(forward.runtime.device)
            block = forward.gather(own, len(block), size).cpu().numpy()
        mine.clear()
        read.append(block)
    return np.concatenate(read), torch.cat(logits)


class LogitTable:
    """Logits [M, ...] by id, in host memory, the same on every rank. Local."""

    def __init__(self) -> None:
        self._index = IdIndex(np.empty(0, dtype=np.int64))
        self.logits = torch.empty(0)

    @property
    def ids(self) -> Ids:
        """The ids held, [M], ascending."""
        return self._index.ids

    def _hold(self, ids: Ids, logits: torch.Tensor) -> None:
        self._index, self.logits = IdIndex(ids), logits

    def put(self, ids: Ids, logits: torch.Tensor) -> None:
        """Add logits [N, ...] of ids [N], none of which is held."""
        both = np.concatenate([self.ids, ids])
        order = np.argsort(both)
        logits = logits.cpu()
        rows = torch.cat([self.logits, logits]) if len(self.ids) else logits
        self._hold(both[order], rows[torch.from_numpy(order)])

    def keep(self, ids: Ids) -> None:
        """Forget all but these ids [N]; ids not held are passed over."""
        held = np.isin(self.ids, ids)
        self._hold(self.ids[held], self.logits[torch.from_numpy(held)])

    def of(self, ids: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """Return the logits [B, ...] of ids [B] (on the CPU), on ``like``'s device, in its dtype.

        Raises UsageError naming the first id that is not held.
        """
        if len(ids) == 0:
            return like[:0].detach()
        wanted = ids.numpy()
        at, held = self._index.locate(wanted)
        if not held.all():
            raise UsageError(f"no logits are kept of sample id {wanted[~held][0]}")
        return self.logits[torch.from_numpy(at)].to(like, non_blocking=True)

    def state_dict(self) -> dict[str, Any]:
        """Return ids int64 [M] and logits [M, ...]."""
        return {"ids": torch.from_numpy(self.ids), "logits": self.logits}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        self._hold(state["ids"].numpy(), state["logits"])


class LastLogits:
    """The logits of the last training batch that held each of ``ids``, noted by whoever had it.

    Every rank notes its own samples; :meth:`merge` puts the ranks together. Memory per rank: [M,
    ...] logits on the device.
    """

    def __init__(self, ids: Ids, runtime: Runtime) -> None:
        self._index = IdIndex(np.sort(ids))
        self._runtime = runtime
        self._step = 0
        self._noted = torch.full((len(ids),), -1, dtype=torch.int64, device=runtime.device)
        self._logits: torch.Tensor | None = None

    @property
    def ids(self) -> Ids:
        """The ids whose logits are noted, [M], ascending."""
        return self._index.ids

    def note(self, ids: torch.Tensor, logits: torch.Tensor) -> None:
        """Note logits [B, ...] of one step; every rank calls it in every step. Local, no sync."""
        if len(self.ids) == 0:
            return
        if self._logits is None:
            self._logits = logits.new_zeros((len(self.ids), *logits.shape[1:]))
        at, held = self._index.locate(ids.numpy())
        rows = torch.from_numpy(at[held]).to(logits.device, non_blocking=True)
        columns = torch.from_numpy(np.flatnonzero(held)).to(logits.device, non_blocking=True)
        self._logits[rows] = logits.detach()[columns]
        self._noted[rows] = self._step
        self._step += 1

    def merge(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return (noted bool [M] on the CPU, logits [M, ...] or None before any step). Collective.

        The latest step wins, on the lowest rank if several had the sample. Two all-reduces.
        """
        if self._logits is None:
            return torch.zeros(len(self.ids), dtype=torch.bool), None
        world, rank = self._runtime.world_size, self._runtime.rank
        stamp = torch.where(self._noted >= 0, self._noted * world + world - 1 - rank, -1)
        latest = self._runtime.all_reduce(stamp.clone(), "max")
        lost = (stamp != latest) | (latest < 0)
        self._logits[lost] = 0
        return (latest >= 0).cpu(), self._runtime.all_reduce(self._logits)

    def state_dict(self) -> dict[str, Any]:
        """Return what this rank noted."""
        return {
            "ids": torch.from_numpy(self.ids),
            "step": self._step,
            "noted": self._noted,
            "logits": self._logits,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned, on the same rank."""
        self._index = IdIndex(state["ids"].numpy())
        self._step, self._noted, self._logits = state["step"], state["noted"], state["logits"]


def merged_notes(states: Sequence[dict[str, Any]], rank: int) -> dict[str, Any]:
    """Return :class:`LastLogits` states of all ranks as one, held by rank 0; others get none."""
    newest = max(states, key=lambda state: int(state["step"]))
    noted = torch.stack([state["noted"] for state in states])
    best = noted.max(dim=0)
    logits = [state["logits"] for state in states if state["logits"] is not None]
    state = dict(newest)
    if rank > 0 or not logits:
        state["noted"] = torch.full_like(best.values, -1)
        return state
    state["noted"] = best.values
    state["logits"] = torch.stack(logits)[best.indices, torch.arange(noted.shape[1])]
    return state
