"""A detector and metrics of a user's own, for the tests of the monitor."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from distcl.monitoring.metrics import StreamMetric
from distcl.types import Batch, DataSpec, Ids, PyTree, Source, unpack_ids

FED: list[float] = []
"""What the detectors of this process were fed."""


class Every:
    """Fires at every n-th value since the last reset."""

    def __init__(self, n: int) -> None:
        self.n = n
        self.seen = 0

    def update(self, value: float) -> bool:
        FED.append(value)
        self.seen += 1
        return self.seen % self.n == 0

    def reset(self) -> None:
        self.seen = 0

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.seen = state["seen"]


class Row(StreamMetric):
    """The row of each sample: tells what was measured, in which order."""

    needs_model = False

    def measure(self, batch: Batch, logits: PyTree) -> torch.Tensor:
        assert logits is None
        return torch.from_numpy(unpack_ids(batch.ids.numpy())[1]).double()


class BlindRow(Row):
    needs_labels = False


class Scaled(Row):
    """Compares with what was trained on, has an option, and is good when high."""

    needs_labels = False
    good = "high"

    def __init__(self, spec: DataSpec, loss: str, factor: float = 1.0) -> None:
        super().__init__(spec, loss)
        self.factor = factor
        self.begun: list[int] = []

    def begin(self, source: Source, ids: Ids) -> None:
        assert len(source.read(ids)) == len(ids)
        self.begun.append(len(ids))

    def measure(self, batch: Batch, logits: PyTree) -> torch.Tensor:
        return self.factor * super().measure(batch, logits)


class Wide(Row):
    def measure(self, batch: Batch, logits: PyTree) -> torch.Tensor:
        return torch.from_numpy(np.zeros((len(batch), 2)))


def not_a_metric(spec: DataSpec, loss: str) -> int:
    return 3
