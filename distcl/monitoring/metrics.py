"""What the monitor watches: one number per sample, whose rise tells that the data have changed.

A metric is one subclass of :class:`StreamMetric`. The registry calls its constructor with (spec,
name of the loss) and, as keywords, ``monitor.options``. Nothing here communicates: ranks
measure different samples, and the monitor gathers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_leaves

from distcl import registry
from distcl.config import MonitorConfig
from distcl.errors import ConfigError
from distcl.losses import create_loss, judged_by, one_by_one, per_sample_error
from distcl.registry import Count, checked
from distcl.types import Batch, DataSpec, Ids, PyTree, Source

_CHUNK = 1024


class StreamMetric(ABC):
    """Base of every metric.

    ``needs_labels``: y is looked at, so a sample is measured only when its label has come;
    ``needs_model``: logits are computed; ``good``: whether a high or a low value is good. Detectors
    take a rise as a change for the worse, so they are fed minus a metric of which high is good.
    """

    needs_labels = True
    needs_model = True
    good = "low"

    def __init__(self, spec: DataSpec, loss: str) -> None:
        self.spec = spec
        self.loss = loss

    def begin(self, source: Source, ids: Ids) -> None:  # noqa: B027  (not every metric needs it)
        """Learn which samples the model was trained on last, before others are watched. Local.

        Called with the same arguments on every rank, and must come to the same result.
        """

    @abstractmethod
    def measure(self, batch: Batch, logits: PyTree) -> torch.Tensor:
        """Return the metric of each sample, floating point [B]; logits are None if not needed.

        Local; called in inference mode, the model in eval mode.
        """


class LossMetric(StreamMetric):
    """Loss of each sample."""

    def __init__(self, spec: DataSpec, loss: str) -> None:
        super().__init__(spec, loss)
        self._criterion = create_loss(loss)

    def measure(self, batch: Batch, logits: PyTree) -> torch.Tensor:
        """See :meth:`StreamMetric.measure`."""
        return self._criterion(logits, batch.y)


class ErrorMetric(StreamMetric):
    """1 where the model is wrong, else 0; in regression, the loss."""

    def measure(self, batch: Batch, logits: PyTree) -> torch.Tensor:
        """See :meth:`StreamMetric.measure`."""
        return per_sample_error(logits, batch.y, self.loss)


class AccuracyMetric(ErrorMetric):
    """1 where the model is right, else 0."""

    good = "high"

    def __init__(self, spec: DataSpec, loss: str) -> None:
        super().__init__(spec, loss)
        if judged_by(loss, spec) != "accuracy":
            raise ConfigError(
                f"monitor.metric = 'accuracy' needs right and wrong answers, but model.loss = "
                f"'{loss}' on floating-point targets has none; choose 'loss'"
            )

    def measure(self, batch: Batch, logits: PyTree) -> torch.Tensor:
        """See :meth:`StreamMetric.measure`."""
        return 1 - super().measure(batch, logits)


class EntropyMetric(StreamMetric):
    """Entropy of the softmax of the outputs, in nats; mean over positions. Needs no labels."""

    needs_labels = False

    def __init__(self, spec: DataSpec, loss: str) -> None:
        super().__init__(spec, loss)
        if judged_by(loss, spec) != "accuracy" or loss == "bce":
            raise ConfigError(
                f"monitor.metric = 'entropy' needs scores of classes, but model.loss = '{loss}' on "
                "floating-point targets has none; choose 'loss' or 'input_distance'"
            )

    def measure(self, batch: Batch, logits: PyTree) -> torch.Tensor:
        """See :meth:`StreamMetric.measure`."""
        logits, gather = one_by_one(logits, batch.y, self.loss)
        logs = F.log_softmax(logits, 1)
        return gather(-(logs.exp() * logs).sum(1))


class InputDistance(StreamMetric):
    """How far a sample's features lie from those trained on; needs neither labels nor model.

    The mean over features j of |x_j - μ_j| / (σ_j + σ̄): mean μ and standard deviation σ over at
    most ``samples`` of those that the model was trained on last, spread evenly over them; σ̄ is the
    mean of σ, which keeps features finite that were constant.
    """

    needs_labels = False
    needs_model = False

    def __init__(self, spec: DataSpec, loss: str, samples: int) -> None:
        super().__init__(spec, loss)
        self._samples = samples
        self._mean = self._scale = torch.empty(0)

    def begin(self, source: Source, ids: Ids) -> None:
        """See :meth:`StreamMetric.begin`."""
        places = np.linspace(0, len(ids) - 1, min(self._samples, len(ids))).round().astype(np.int64)
        chunks = [
            source.read(ids[part]) for part in np.array_split(places, -(-len(places) // _CHUNK))
        ]
        x = torch.cat([_features(chunk.x) for chunk in chunks])
        self._mean = x.mean(0)
        spread = x.std(0, correction=0)
        self._scale = (spread + spread.mean()).clamp_min(torch.finfo(x.dtype).tiny)

    def measure(self, batch: Batch, logits: PyTree) -> torch.Tensor:
        """See :meth:`StreamMetric.measure`."""
        x = _features(batch.x)
        mean, scale = self._mean.to(x.device), self._scale.to(x.device)
        return ((x - mean).abs() / scale).mean(1)


@checked("monitor")
def input_distance(spec: DataSpec, loss: str, *, samples: Count = 4096) -> StreamMetric:
    """See :class:`InputDistance`."""
    return InputDistance(spec, loss, samples)


def create_metric(config: MonitorConfig, spec: DataSpec, loss: str) -> StreamMetric:
    """Return the configured metric. Local.

    Raises ConfigError if it does not fit the stream's targets, or needs labels that never come.
    """
    metric = registry.create("metric", config.metric, spec, loss, options=config.options)
    if not isinstance(metric, StreamMetric):
        raise ConfigError(
            f"monitor.metric = '{config.metric}' is not a distcl.monitoring.metrics.StreamMetric"
        )
    if metric.needs_labels and config.label_delay < 0:
        raise ConfigError(
            f"monitor.metric = '{config.metric}' needs labels, but monitor.label_delay = -1 says "
            "that none come; 'entropy' and 'input_distance' need none"
        )
    return metric


def _features(x: PyTree) -> torch.Tensor:
    leaves = tree_leaves(x)
    if not all(leaf.is_floating_point() for leaf in leaves):
        raise ConfigError("monitor.metric = 'input_distance' needs floating-point inputs")
    return torch.cat([leaf.double().reshape(len(leaf), -1) for leaf in leaves], 1)
