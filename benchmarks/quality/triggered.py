"""Rounds when drift is detected, against rounds by the clock: accuracy in use, and its price."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from benchmarks.quality.grid import Grid

TITLE = "Rounds on drift, and by the clock"
TEXT = """\
`distcl run` on MNIST: 4 experiences of 4,000 images, turned by 30° more each time, so drifts begin
at 4,000, 8,000 and 12,000; gradual: over a quarter of the experience. The model is trained on the
first 2,000 and watches from there on. A round replays history (`er`, uniform draws) and takes 10
passes over what came last, at most 1,000 samples. On drift: ADWIN on the error, and the round waits
for 500 samples after an alarm. By the clock: a round every so many samples. *In use*: percent of
the samples watched that the model of their time got right, mean ± standard deviation over seeds.
*units*: samples trained on, times three."""

SIZE = 4_000
STREAMS = {
    "abrupt": ("stream.drift=rotate",),
    "gradual": ("stream.drift=rotate", "stream.transition_fraction=0.25"),
}
_CLOCK = "detector.name=benchmarks.quality.triggered:Clock"
ARMS: dict[str, tuple[str, tuple[str, ...]]] = {
    "no rounds": ("detect", ()),
    "on drift": ("run", ("monitor.collect=500",)),
    **{
        f"every {every:,} samples": ("run", (_CLOCK, f"detector.options={{every={every}}}"))
        for every in (4096, 2048, 1024)
    },
}
"""Name -> (command, keys)."""
COMMON = (
    "detector.name=adwin",
    "monitor.metric=error",
    "stream.experiences=4",
    f"stream.samples_per_experience={SIZE}",
    "optimizer.lr=0.1",
    "training.pretrain_epochs=5",
    "training.epochs=10",
    "run.report=false",
)
SEEDS = (100, 101, 102, 103, 104)


class Clock:
    """Fires at every ``every``-th sample that has been watched, whatever its value."""

    def __init__(self, every: int) -> None:
        self._every = every
        self._seen = 0

    def update(self, value: float) -> bool:
        """Count a sample."""
        self._seen += 1
        return self._seen % self._every == 0

    def reset(self) -> None:
        """Go on counting: a round does not shift the next one."""

    def state_dict(self) -> dict[str, Any]:
        """Return the count."""
        return {"seen": self._seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore it."""
        self._seen = state["seen"]


def measure(grid: Grid) -> dict[str, Any]:
    """Run every arm on every stream; return how right each model was in use, and its cost."""
    rows = []
    for stream, drift in STREAMS.items():
        for name, (command, keys) in ARMS.items():
            for seed in SEEDS:
                out = grid.run(command, (stream, name), (*COMMON, *drift, *keys), seed)
                summary = json.loads((out / "summary.json").read_text())
                row = {
                    "stream": stream,
                    "arm": name,
                    "seed": seed,
                    "in_use": right_in_use(out / "metrics.jsonl"),
                    "rounds": len(summary["rounds"]),
                    "units": summary["compute"]["units"],
                }
                rows.append(row)
                grid.tell(f"{stream}, {name}, seed {seed}: {row['in_use']:.4f} right in use")
    return {"suite": "triggered", "runs": rows}


def right_in_use(log: Path) -> float:
    """Return the share of the watched samples that were right, from a run's metrics.jsonl."""
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    watched = [line for line in lines if "monitor/error" in line]
    ends = [SIZE // 2, *(line["position"] for line in watched)]
    wrong = sum(
        line["monitor/error"] * (end - begin)
        for line, begin, end in zip(watched, ends, ends[1:], strict=False)
    )
    return float(1 - wrong / (ends[-1] - ends[0]))


def table(found: dict[str, Any]) -> str:
    """Return text and table of :func:`measure`'s results."""
    lines = ["| stream | rounds | n | in use | rounds a run | units |", "|---|---|---|---|---|---|"]
    for stream in STREAMS:
        for name in ARMS:
            runs = [r for r in found["runs"] if (r["stream"], r["arm"]) == (stream, name)]
            right = [100 * r["in_use"] for r in runs]
            rounds, units = (fmean(r[key] for r in runs) for key in ("rounds", "units"))
            lines.append(
                f"| {stream} | {name} | {len(runs)} | {fmean(right):.2f} ± {stdev(right):.2f} | "
                f"{rounds:.1f} | {units:,.0f} |"
            )
    command = "`python benchmarks/quality/run.py --only triggered`"
    source = f"{command} → `benchmarks/quality/results/triggered.json`"
    return "\n\n".join([TEXT, source, "\n".join(lines)])
