"""The study of sampling: it runs in small, and the documents say what its files say."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import fmean

import pytest

from benchmarks.quality import detection, tables, triggered
from benchmarks.quality.suites import CHOSEN, EWC_CHOSEN, PAPERS_CHOSEN, SUITES, gated
from distcl import load_config
from distcl.config.reference import template

ROOT = Path(__file__).parents[2]
RUN = ROOT / "benchmarks" / "quality" / "run.py"
RESULTS = ROOT / "benchmarks" / "quality" / "results"


def run(*words: str) -> subprocess.CompletedProcess[str]:
    """Run the study as a user does."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, str(RUN), *words], env=environment, capture_output=True, text=True
    )


def test_results_are_written_from_the_files() -> None:
    written = (ROOT / "docs" / "RESULTS.md").read_text(encoding="utf-8")
    assert written == tables.render(RESULTS), "type: python benchmarks/quality/run.py --tables"


def test_the_method_shows_what_the_files_say() -> None:
    written = (ROOT / "docs" / "METHOD.md").read_text(encoding="utf-8")
    assert tables.BEGIN in written and written == tables.filled(written, RESULTS)


def test_every_file_is_in_the_results_beside_its_command() -> None:
    written = (ROOT / "docs" / "RESULTS.md").read_text(encoding="utf-8")
    files = sorted(RESULTS.glob("*.json"))
    assert files
    for path in files:
        line = f"run.py --only {path.stem}` → `benchmarks/quality/results/{path.name}`"
        assert line in written
        assert json.loads(path.read_text())["suite"] == path.stem


def test_a_difference_is_that_of_the_runs() -> None:
    for path in RESULTS.glob("*.json"):
        for study in json.loads(path.read_text()).get("studies", []):
            first, *others = study["arms"]
            for arm, difference in zip(others, study["differences"], strict=True):
                pairs = [
                    b["average_accuracy"] - a["average_accuracy"]
                    for a, b in zip(first["runs"], arm["runs"], strict=True)
                    if not (a["diverged"] or b["diverged"])
                ]
                assert difference["accuracy"]["n"] == len(pairs)
                assert difference["accuracy"]["mean"] == pytest.approx(fmean(pairs))
                assert [r["seed"] for r in arm["runs"]] == study["seeds"]
                costs = [sum(r["units"] for r in a["runs"]) for a in (first, arm)]
                if len(pairs) == len(arm["runs"]):
                    assert costs[1] == pytest.approx(costs[0], rel=0.01)


def test_the_rate_of_the_headline_is_the_best_for_uniform() -> None:
    chosen = {**CHOSEN, "affine, ewc_online": EWC_CHOSEN, **PAPERS_CHOSEN}
    for path in RESULTS.glob("rates*.json"):
        for study in json.loads(path.read_text())["studies"]:
            means = {
                arm["name"]: fmean(run["average_accuracy"] for run in arm["runs"])
                for arm in study["arms"]
                if not any(run["diverged"] for run in arm["runs"])
            }
            assert max(means, key=means.__getitem__) == chosen[study["name"]]
    choices = {
        "rates",
        "rates_ewc",
        "rates_papers",
        "refresh",
        "gate",
    }  # whose seeds are reported nowhere
    others = [s for name, suite in SUITES.items() if name not in choices for s in suite.studies]
    assert not set(range(10)) & {seed for study in others for seed in study.seeds}


def test_recommended_is_what_init_writes(tmp_path: Path) -> None:
    (tmp_path / "init.toml").write_text(template())
    written = load_config(tmp_path / "init.toml")
    keys = ["continual_learning.update_mode=er", "training.ema=0.98", *gated()]
    ours = load_config(None, keys)
    assert ours == written


def test_alarms_are_judged_by_the_drift_that_they_follow() -> None:
    judged = detection.judge([50, 120, 130, 450], [100, 300], 400)
    assert judged == ([20], 1, 3)
    assert detection.judge([310, 399, 100], [100, 300], 400) == ([0, 10], 0, 1)
    assert detection.judge([5], [], 400) == ([], 0, 1)


def test_the_clock_fires_at_even_distances_across_resets_and_restarts() -> None:
    clock = triggered.Clock(every=3)
    fired = []
    for k in range(9):
        fired.append(clock.update(0.5))
        clock.reset()
        if k == 4:
            state = clock.state_dict()
            clock = triggered.Clock(every=3)
            clock.load_state_dict(state)
    assert fired == [False, False, True] * 3


def test_what_was_right_in_use_counts_every_watched_sample_once(tmp_path: Path) -> None:
    begin = triggered.SIZE // 2
    lines = [
        {"round": 0, "loss": 1.0},
        {"position": begin + 64, "monitor/error": 0.5},
        {"position": begin + 80, "monitor/error": 0.25},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert triggered.right_in_use(tmp_path / "metrics.jsonl") == 1 - (32 + 4) / 80


@pytest.mark.timeout(400)
def test_a_small_study_runs_and_makes_its_table(tmp_path: Path) -> None:
    done = run("--quick", "--work", str(tmp_path))
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "quick" / "quick.json").read_text())
    arms = found["studies"][0]["arms"]
    assert [arm["name"] for arm in arms] == ["uniform", "published", "recommended"]
    assert arms[0]["step_factor"] > 1  # published scores, so others get more steps
    assert "| rotated | uniform | 2 |" in (tmp_path / "quick" / "RESULTS.md").read_text()


def test_without_mnist_it_says_so(tmp_path: Path) -> None:
    done = run("--only", "headline", "--data", str(tmp_path / "no.npz"))
    assert done.returncode == 0
    assert "skipped: there is no MNIST at" in done.stdout
