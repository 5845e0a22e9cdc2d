"""The detector, and the metric that it is fed."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from distcl.config import MonitorConfig
from distcl.distributed.runtime import raise_together
from distcl.errors import ConfigError, DivergenceError
from distcl.monitoring.metrics import StreamMetric, create_metric
from distcl.training.trainer import ContinuousTrainer
from distcl.types import Batch, Detector, Ids


class DriftDetection:
    """All ranks measure samples with the model in use; rank 0 feeds the detector, for all."""

    def __init__(
        self, trainer: ContinuousTrainer, detector: Detector, config: MonitorConfig
    ) -> None:
        self.detector = detector
        self.metric = create_metric(config, trainer.parts.stream.spec, trainer.loss_name)
        self.metric_name = config.metric.rpartition(":")[2]
        self.compares = type(self.metric).begin is not StreamMetric.begin
        """Whether the metric compares samples with those trained on."""
        self._name = config.metric
        self._trainer = trainer
        self._chunk = trainer.training.eval_batch_size
        self._reference: Ids = np.empty(0, np.int64)

    def compare_with(self, ids: Ids) -> None:
        """Tell the metric which samples the model was trained on last. Local."""
        self._reference = ids
        if len(ids):
            self.metric.begin(self._trainer.history.source, ids)

    def feed(self, ids: Ids, quiet: int) -> tuple[int | None, float]:
        """Feed the detector the metric of samples, the first ``quiet`` of which do not count.

        Returns the place among ``ids`` at which it fired, or None, and the metric's mean, on every
        rank. What comes after that place is not fed. Collective.
        """
        values, error = self._values(ids), None
        runtime, fired = self._trainer.parts.runtime, -1
        if runtime.is_main:
            sign = 1 if self.metric.good == "low" else -1
            try:
                for k, value in enumerate(values.tolist()):
                    if self.detector.update(sign * value) and k >= quiet:
                        fired = k
                        break
            except DivergenceError as found:  # then all must raise, to roll back together
                error, fired = found, len(ids)
        answer = int(runtime.all_reduce(torch.tensor(fired, device=runtime.device), "max"))
        if answer == len(ids):
            raise_together(runtime, error)
        return (answer if answer >= 0 else None), float(values.mean())

    def _values(self, ids: Ids) -> torch.Tensor:
        """Return the metric of each sample, [B], on the CPU of every rank."""
        forward, metric = self._trainer.parts.forward, self.metric

        def measure(batch: Batch) -> torch.Tensor:
            with forward.runtime.strategy.autocast():
                logits = forward.module(batch.x) if metric.needs_model else None
                values = metric.measure(batch, logits)
            if values.shape != (len(batch),):
                raise ConfigError(
                    f"monitor.metric = '{self._name}' must return one number per sample, "
                    f"shape [{len(batch)}], but returned {list(values.shape)}"
                )
            return values.to(forward.runtime.dtype)

        return forward.per_batch(self._trainer.history.source, ids, self._chunk, measure).cpu()

    def state_dict(self) -> dict[str, Any]:
        """Return rank 0's detector and the samples compared with: tensors and plain values."""
        return {
            "reference": torch.from_numpy(self._reference.copy()),
            "detector": self.detector.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        self.compare_with(state["reference"].numpy())
        self.detector.load_state_dict(state["detector"])
