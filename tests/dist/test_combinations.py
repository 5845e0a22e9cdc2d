"""Parts that know nothing of each other work together, or are refused at the start."""

from __future__ import annotations

import math
from itertools import product
from pathlib import Path

import pytest

from distcl import job, registry
from distcl.errors import ConfigError
from tests.small import small

DETECTORS = [part.name for part in registry.parts("detector")]
DRIFTS = [part.name for part in registry.parts("drift")]
SIGNALS = [part.name for part in registry.parts("signal")]
SOURCES = ("score", "candidates", "online")
TARGETS = ("auto", "union")
UPDATERS = [part.name for part in registry.parts("updater")]


@pytest.mark.parametrize("updater", UPDATERS)
def test_an_updater_works_with_every_signal_detector_and_drift(
    updater: str, tmp_path: Path
) -> None:
    """Every signal with every source; detectors, drifts and commands go round beside them."""
    shift = UPDATERS.index(updater)
    for i, (signal, source) in enumerate(product(SIGNALS, SOURCES)):
        detector = DETECTORS[(i + shift) % len(DETECTORS)]
        options = "{members=['adwin', 'page_hinkley']}" if detector == "ensemble" else "{}"
        keys = (
            f"continual_learning.update_mode={updater}",
            "continual_learning.mix_historic_data=true",
            "continual_learning.fisher_samples=20",
            f"priority.signal={signal}",
            f"priority.source={source}",
            f"priority.target={TARGETS[i % 2]}",
            f"detector.name={detector}",
            f"detector.options={options}",
            f"stream.drift={DRIFTS[(i + shift) % len(DRIFTS)]}",
            "stream.experiences=3",
            "stream.samples_per_experience=100",
            "training.epochs=1",
            "monitor.warmup=20",
            "monitor.window=100",
            "monitor.collect=20",
        )
        command = ("train", "run")[i % 3 == 0]
        try:
            summary = job.execute(command, small(*keys), tmp_path / str(i))
        except ConfigError as error:
            assert source == "online" and signal in ("loss_delta", "disagreement"), keys
            assert f"'{signal}'" in str(error) and "'online'" in str(error)
            assert not (tmp_path / str(i) / "metrics.jsonl").exists(), "not at the start"
            continue
        assert summary["status"] == "done", keys
        rows = [a for row in summary["accuracy"] for a in row if a is not None]
        assert rows and all(math.isfinite(a) for a in rows), keys
        if command == "train":
            assert len(summary["rounds"]) == 2  # and the first is pretraining
