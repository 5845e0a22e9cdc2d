"""The monitor on real ranks: the same verdicts everywhere; warm-up, cool-down, reset; late labels.

The stream has 2 x 301 samples, of which the first 150 pretrain the model. The detector ``Every``
fires at every 100th value, so what must happen can be counted by hand.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distcl import registry
from distcl.data.stream import create_stream
from distcl.errors import ConfigError
from distcl.training.build import Quiet, assemble
from distcl.monitoring.monitor import Monitor
from distcl.distributed.runtime import Runtime
from distcl.training.trainer import ContinuousTrainer
from distcl.types import unpack_ids
from tests import monitor_parts
from tests.small import small
from tests.spawn import run_ranks

BASE = (
    "stream.experiences=2",
    "training.epochs=1",
    "continual_learning.importance_weighting=false",
    "detector.name=tests.monitor_parts:Every",
    "detector.options={n=100}",
    "monitor.batch_size=50",
)
ROW = "monitor.metric=tests.monitor_parts:Row"
BLIND = "monitor.metric=tests.monitor_parts:BlindRow"


class Messages(Quiet):
    def __init__(self) -> None:
        self.said: list[str] = []

    def message(self, text: str) -> None:
        self.said.append(text)


def _watch(out: Path, command: str, cases: list[tuple[str, ...]]) -> list[dict[str, Any]]:
    """Watch the stream once for each case, on this rank and its peers; say what happened."""
    runtime, found = Runtime(small().run), []
    with runtime.guard():
        for overrides in cases:
            config = small(*BASE, *overrides)
            stream, messages = create_stream(config.stream, 0), Messages()
            trainer = ContinuousTrainer(assemble(config, runtime, stream, out, messages), config)
            options = config.detector.options
            detector = registry.create("detector", config.detector.name, options=options)
            monitor_parts.FED.clear()
            monitor = Monitor(trainer, detector, config.monitor, 0)
            monitor.run() if command == "run" else monitor.detect()
            order = unpack_ids(np.concatenate([e.train for e in stream.experiences]))[1]
            place = {(e, int(row)): i for i, (e, row) in enumerate(_rows(stream))}
            found.append(
                {
                    "drifts": monitor.drifts,
                    "rounds": [_span(e, place) for e in monitor.experiences],
                    "fed": list(monitor_parts.FED),
                    "rows": order.tolist(),
                    "said": [text for text in messages.said if not text.startswith("[acc")],
                    "begun": getattr(monitor.detection.metric, "begun", None),
                }
            )
    return found


def _rows(stream: Any) -> Any:
    ids = np.concatenate([e.train for e in stream.experiences])
    experience, rows, _ = unpack_ids(ids)
    return zip(experience.tolist(), rows.tolist(), strict=True)


def _span(experience: Any, place: dict[tuple[int, int], int]) -> tuple[int, int]:
    """Return the stream positions [from, until) that an experience was formed of."""
    ids = np.concatenate([experience.train, experience.test])
    e, rows, _ = unpack_ids(ids)
    places = sorted(place[pair] for pair in zip(e.tolist(), rows.tolist(), strict=True))
    assert places == list(range(places[0], places[-1] + 1))
    return places[0], places[-1] + 1


PRETRAIN = (0, 150)
CASES = {
    "plain": ((ROW,), [249, 349, 449, 549], [(150, 250), (250, 350), (350, 450), (450, 550)]),
    "warm-up": ((ROW, "monitor.warmup=150"), [349, 449, 549], [(150, 350), (350, 450), (450, 550)]),
    # The round of 249 begins at 250 and resets the detector; 349 falls into the cool-down.
    "cool-down": ((ROW, "monitor.cooldown=120"), [249, 449], [(150, 250), (250, 450)]),
    "collect": ((ROW, "monitor.collect=25"), [249, 399, 549], [(150, 300), (300, 450), (450, 600)]),
    "window": ((ROW, "monitor.window=60", "monitor.max_rounds=1"), [249], [(190, 250)]),
    # Labels 70 late: the value of sample 249 is known at 319, when 280 samples are labelled.
    "late": (
        (ROW, "monitor.label_delay=70"),
        [319, 449, 549],
        [(150, 280), (280, 380), (380, 480)],
    ),
    # Seen at once, but a round waits: at 350, labels of 280 are there. 449 is seen at 450; at 550.
    "late, blind": (
        (BLIND, "monitor.label_delay=70", "monitor.collect=30"),
        [249, 449],
        [(150, 280), (280, 480)],
    ),
    "too late": ((BLIND, "monitor.label_delay=400"), [249], []),
    "never": ((BLIND, "monitor.label_delay=-1"), [249, 349, 449, 549], []),
}


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[list[dict[str, Any]]]]:
    out = tmp_path_factory.mktemp("watched")
    cases = [case[0] for case in CASES.values()]
    return {world: run_ranks(world, _watch, out, "run", cases) for world in (1, 2)}


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("name", CASES)
def test_drifts_and_rounds_come_when_they_must(watched: Any, name: str, world: int) -> None:
    _, drifts, rounds = CASES[name]
    for rank in range(world):  # the same verdict on every rank
        found = watched[world][rank][list(CASES).index(name)]
        assert found["drifts"] == drifts
        assert found["rounds"] == [PRETRAIN, *rounds]


@pytest.mark.parametrize("world", [1, 2])
def test_the_detector_of_rank_0_is_fed_every_sample_once_in_order(watched: Any, world: int) -> None:
    for name, end in (("late", 532), ("never", 602), ("too late", 602)):
        found = watched[world][0][list(CASES).index(name)]
        if name != "late":  # after a verdict, the rest of a block is not looked at
            assert found["fed"] == [float(row) for row in found["rows"][150:end]]
        assert set(found["fed"]) <= {float(row) for row in found["rows"][150:end]}
    if world == 2:
        assert all(found["fed"] == [] for found in watched[2][1])


def test_what_is_said_of_labels_that_come_late_or_never(watched: Any) -> None:
    never, too_late, late = (
        watched[2][0][list(CASES).index(name)]["said"] for name in ("never", "too late", "late")
    )
    assert sum("labels never come" in text for text in never) == 1
    assert [text for text in never if "[drift]" in text] == [
        f"[drift] at stream position {n}" for n in (249, 349, 449, 549)
    ]
    told = [text for text in too_late if not text.startswith("[stream]")]
    assert told[-1] == "the stream ended before labels followed its last drift: no round for it"
    assert not any("no round" in text or "never" in text for text in late)


def test_a_metric_of_ones_own_learns_what_was_trained_on_and_is_turned_round(
    tmp_path: Path,
) -> None:
    own = ("monitor.metric=tests.monitor_parts:Scaled", "monitor.options={factor=2.0}")
    fresh = (*own, "training.pretrain_epochs=0", "monitor.warmup=40", "detector.options={n=90}")
    run, first = run_ranks(1, _watch, tmp_path, "run", [own, fresh])[0]
    assert run["begun"] == [150, 100, 100, 100, 100]
    assert run["fed"][:100] == [-2.0 * row for row in run["rows"][150:250]]
    assert first["begun"][0] == 40 and first["drifts"][0] == 40 + 90 - 1
    assert first["rounds"][0] == (40, 140)


METRICS = {  # what the built-in detectors find by each, around the change at 600
    "error": (),
    "loss": (),
    "accuracy": (),
    "entropy": (),
    "input_distance": ("monitor.label_delay=-1",),
}
REAL = (
    "run.precision=fp64",
    "stream.samples_per_experience=600",
    "stream.drift=permute",
    "training.pretrain_epochs=30",
    "detector.name=adwin",
    "detector.options={}",
)


def test_every_metric_finds_a_real_drift_at_the_same_place_on_1_and_2_ranks(
    tmp_path: Path,
) -> None:
    cases = [(*REAL, f"monitor.metric={name}", *more) for name, more in METRICS.items()]
    results = {world: run_ranks(world, _watch_fp64, tmp_path, cases) for world in (1, 2)}
    for i, name in enumerate(METRICS):
        alone = results[1][0][i]["drifts"]
        assert len(alone) == 1 and 600 <= alone[0] < 850, (name, alone)  # it is at 600
        assert results[2][0][i]["drifts"] == results[2][1][i]["drifts"] == alone


def _watch_fp64(out: Path, cases: list[tuple[str, ...]]) -> list[dict[str, Any]]:
    return _watch(out, "detect", cases)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ("monitor.metric=error", "monitor.label_delay=-1"),
            r"metric = 'error' needs labels, but monitor\.label_delay = -1 says that none come",
        ),
        (
            ("monitor.metric=tests.monitor_parts:Wide",),
            r"must return one .* \[50\], but .* \[50, 2",
        ),
        (("monitor.metric=tests.monitor_parts:not_a_metric",), "is not a distcl.*StreamMetric"),
        (
            ("monitor.metric=input_distance", "training.pretrain_epochs=0"),
            r"takes the first monitor\.warmup samples for these, which is 0 of 602",
        ),
        (
            ("monitor.metric=input_distance", "monitor.options={samples=0}"),
            r"monitor\.options\.samples: input should be greater than or equal to 1, not 0",
        ),
        (("monitor.metric=error", "monitor.options={a=1}"), "metric 'error' has no option 'a'"),
    ],
)
def test_a_metric_that_does_not_fit_is_refused(
    overrides: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        _watch(tmp_path, "run", [overrides])
