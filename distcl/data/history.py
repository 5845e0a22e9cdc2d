"""What earlier experiences were: ids, not copies."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from distcl.types import Ids


class History:
    """Ids of earlier experiences' training samples, unique, oldest first. Local.

    Every rank holds the same, if every rank adds the same. The stream reads the samples again
    when they are replayed, so a sample costs eight bytes.
    """

    def __init__(self) -> None:
        self._ids: Ids = np.empty(0, dtype=np.int64)

    def add(self, ids: Ids) -> None:
        """Append the ids [N] of an experience, in their order; those already held are left out."""
        ids = np.asarray(ids, dtype=np.int64)
        first = np.sort(np.unique(ids, return_index=True)[1])
        fresh = ids[first]
        self._ids = np.concatenate([self._ids, fresh[~np.isin(fresh, self._ids)]])

    def ids(self) -> Ids:
        """Return every id held, int64 [H]."""
        return self._ids.copy()

    def __len__(self) -> int:
        return len(self._ids)

    def state_dict(self) -> dict[str, Any]:
        """Return {"ids": int64 tensor [H]}."""
        return {"ids": torch.from_numpy(self._ids.copy())}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        self._ids = state["ids"].numpy().astype(np.int64)
