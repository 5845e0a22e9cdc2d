"""How soon detectors see drifts at known places, how often they cry wolf, and what they miss."""

from __future__ import annotations

import json
from collections.abc import Sequence
from statistics import median
from typing import Any

from benchmarks.quality.grid import Grid

TITLE = "Drift detection"
TEXT = """\
`distcl detect` on MNIST: 3 experiences of 4,000 images, so drifts begin at 4,000 and 8,000; a model
trained on the first 2,000 watches from there on and never learns again. Abrupt and gradual (over a
quarter of the experience): turned by 30° more each time. None: no drift at all. A drift is found by
the first alarm before the next one begins; delay in samples from where it begins. Every other alarm
is false. Detectors as in `configs/`, fed with what is named."""

SIZE, EXPERIENCES = 4_000, 3
STREAMS = {
    "abrupt": ("stream.drift=rotate",),
    "gradual": ("stream.drift=rotate", "stream.transition_fraction=0.25"),
    "none": ("stream.drift=none",),
}
_KSWIN = "{alpha=0.0001, window_size=200, stat_size=60}"
_MEMBERS = '["adwin", {name="kswin", alpha=0.0001}, {name="page_hinkley", threshold=20.0}]'
DETECTORS = {
    "adwin, error": ("detector.name=adwin", "monitor.metric=error"),
    "kswin, loss": (
        "detector.name=kswin",
        "monitor.metric=loss",
        f"detector.options={_KSWIN}",
    ),
    "page_hinkley, loss": (
        "detector.name=page_hinkley",
        "monitor.metric=loss",
        "detector.options={threshold=20.0}",
    ),
    "majority of the three, loss": (
        "detector.name=ensemble",
        "monitor.metric=loss",
        f'detector.options={{vote="majority", window=200, members={_MEMBERS}}}',
    ),
}
COMMON = (
    f"stream.experiences={EXPERIENCES}",
    f"stream.samples_per_experience={SIZE}",
    "continual_learning.update_mode=base",
    "optimizer.lr=0.1",
    "training.pretrain_epochs=5",
    "run.report=false",
)
SEEDS = (100, 101, 102, 103, 104)


def measure(grid: Grid) -> dict[str, Any]:
    """Run every detector on every stream, and return where alarms were."""
    rows = []
    for stream, drift in STREAMS.items():
        for name, detector in DETECTORS.items():
            for seed in SEEDS:
                out = grid.run("detect", (stream, name), (*COMMON, *drift, *detector), seed)
                alarms = json.loads((out / "summary.json").read_text())["drifts"]
                rows.append({"stream": stream, "detector": name, "seed": seed, "alarms": alarms})
                grid.tell(f"{stream}, {name}, seed {seed}: alarms at {alarms}")
    return {"suite": "detection", "runs": rows}


def judge(alarms: Sequence[int], drifts: Sequence[int], end: int) -> tuple[list[int], int, int]:
    """Return the delays of drifts that were found, how many were missed, and false alarms."""
    delays, right = [], 0
    for begin, until in zip(drifts, [*drifts, end][1:], strict=True):
        inside = [alarm for alarm in alarms if begin <= alarm < until]
        if inside:
            delays.append(inside[0] - begin)
            right += 1
    return delays, len(drifts) - len(delays), len(alarms) - right


def table(found: dict[str, Any]) -> str:
    """Return text and table of :func:`measure`'s results."""
    end = SIZE * EXPERIENCES
    lines = [
        "| stream | detector | n | found | missed | median delay | false alarms a run |",
        "|---|---|---|---|---|---|---|",
    ]
    for stream in STREAMS:
        drifts = [] if stream == "none" else [SIZE * k for k in range(1, EXPERIENCES)]
        for name in DETECTORS:
            runs = [
                judge(run["alarms"], drifts, end)
                for run in found["runs"]
                if (run["stream"], run["detector"]) == (stream, name)
            ]
            if not runs:
                continue
            delays = [delay for some, _, _ in runs for delay in some]
            missed, false = (sum(run[k] for run in runs) for k in (1, 2))
            shown = f"{median(delays):,.0f}" if delays else "–"
            rate = f"{false / len(runs):.1f}"
            lines.append(
                f"| {stream} | {name} | {len(runs)} | {len(delays)} | {missed} | {shown} | {rate} |"
            )
    command = "`python benchmarks/quality/run.py --only detection`"
    source = f"{command} → `benchmarks/quality/results/detection.json`"
    return "\n\n".join([TEXT, source, "\n".join(lines)])
