import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest

from distcl.errors import UsageError
from distcl.monitoring.live import LiveEnd
from distcl.reporting.progress import FolderProgress
from distcl.reporting.status import read_metrics, read_status
from distcl.training.build import Quiet
from distcl.types import GROWING, WAITING, WATCHING, SourceInfo


def write_status(folder, state, reason=""):
    (folder / "status.json").write_text(json.dumps({"state": state, "reason": reason}))


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def test_time_left_of_scheduled_rounds_follows_from_the_share_that_is_done(tmp_path):
    write_status(tmp_path, "running")
    clock = Clock()
    progress = FolderProgress(Quiet(), tmp_path, stages=4, clock=clock)
    progress.round_begins("pretraining", 10)
    progress.round_begins("round 1", 200)
    clock.now = 60.0
    progress.step(100, 0.5, 1234.0)  # one and a half of four parts in 60 s: 100 s are left
    found = read_status(tmp_path, now=60.0)
    assert (found.state, found.samples_per_second) == ("running", 1234.0)
    assert found.left == pytest.approx(100.0)
    assert "round 1, 100 of 200, loss 0.5000" in str(found)
    assert "time left   about 1:40" in str(found)


def test_time_left_of_a_watched_stream_follows_from_its_position(tmp_path):
    write_status(tmp_path, "running")
    clock = Clock()
    progress = FolderProgress(Quiet(), tmp_path, stages=0, clock=clock)
    progress.round_begins("pretraining", 10)  # before the stream is watched
    progress.round_begins(WATCHING, 1000, "loss")
    clock.now = 30.0
    progress.step(250, 0.5, 0.0)
    progress.round_begins("round 1", 50)  # a round does not move the position
    assert read_status(tmp_path, now=30.0).left == pytest.approx(90.0)


def test_a_run_that_was_resumed_is_judged_by_its_own_pace(tmp_path):
    write_status(tmp_path, "running")
    clock = Clock()
    progress = FolderProgress(Quiet(), tmp_path, stages=10, clock=clock)
    progress.resumed(7)
    progress.round_begins("round 8", 10)
    clock.now = 20.0
    progress.round_begins("round 9", 10)
    assert read_status(tmp_path, now=20.0).left == pytest.approx(40.0)


def test_a_run_whose_process_has_ended_is_gone(tmp_path):
    write_status(tmp_path, "running")
    FolderProgress(Quiet(), tmp_path, stages=1).round_begins("round 1", 10)
    assert read_status(tmp_path).state == "running"
    ended = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], stdout=-1)
    record = json.loads((tmp_path / "progress.json").read_text())
    assert record["pid"] == os.getpid()
    (tmp_path / "progress.json").write_text(json.dumps(record | {"pid": int(ended.stdout)}))
    found = read_status(tmp_path)
    assert found.state == "gone" and "has ended" in found.reason and found.left is None


def test_a_failed_run_tells_why(tmp_path):
    write_status(tmp_path, "failed", "rank 1: out of memory")
    assert str(read_status(tmp_path)) == "state       failed: rank 1: out of memory"


def test_what_is_no_run_folder_or_cannot_be_read_is_named(tmp_path):
    with pytest.raises(UsageError, match=r"is not a run folder: it has no status\.json"):
        read_status(tmp_path / "absent")
    (tmp_path / "status.json").write_text("{")
    with pytest.raises(UsageError, match=r"status\.json' is not JSON"):
        read_status(tmp_path)


def test_a_last_line_that_is_being_written_is_let_be_and_any_other_bad_line_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"round": 0, "accuracy/0": 0.5}\n{"round": 1, "acc')
    assert read_metrics(tmp_path) == [{"round": 0, "accuracy/0": 0.5}]
    (tmp_path / "metrics.jsonl").write_text('{"round": 0}\nnonsense\n{"round": 1}\n')
    with pytest.raises(UsageError, match=r"metrics\.jsonl', line 2, is not JSON"):
        read_metrics(tmp_path)


def test_r2_is_no_percentage(tmp_path):
    write_status(tmp_path, "done")
    summary = {"metric": "r2", "average_accuracy": 0.61, "average_forgetting": 0.1, "rounds": []}
    summary |= {"seconds": 1.0, "stream_end": {"samples": 9, "r2": -0.25}}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    shown = str(read_status(tmp_path))
    assert "accuracy" not in shown and "%" not in shown
    assert shown.splitlines()[-3:] == [
        "R² at end   -0.250",
        "R²          0.610",
        "forgetting  0.100",
    ]


def test_the_error_at_the_end_of_the_stream_stands_before_the_accuracy(tmp_path):
    write_status(tmp_path, "done")
    summary = {"metric": "accuracy", "average_accuracy": 0.859, "rounds": [], "seconds": 1.0}
    summary |= {"stream_end": {"samples": 1000, "accuracy": 0.62}}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    assert str(read_status(tmp_path)).splitlines()[-2:] == [
        "error %     38.0",
        "accuracy %  85.9",
    ]


def test_other_scores_are_told_by_name(tmp_path):
    write_status(tmp_path, "done")
    summary = {"metric": "perplexity", "higher_is_better": False, "average_accuracy": 1234.5}
    summary |= {"average_forgetting": 12.3456, "rounds": [], "seconds": 1.0}
    summary |= {"stream_end": {"samples": 9, "perplexity": 3.25}}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    (tmp_path / "metrics.jsonl").write_text('{"round": 4, "perplexity/1": 3.0}\n')
    assert read_status(tmp_path).metric == "perplexity"
    assert str(read_status(tmp_path)).splitlines()[-3:] == [
        "perplexity at end 3.250",
        "perplexity  1234",
        "forgetting  12.35",
    ]
    write_status(tmp_path, "running")
    assert read_status(tmp_path).last_round == 4


def test_of_a_stream_that_may_grow_nobody_says_how_much_is_left(tmp_path):
    write_status(tmp_path, "running")
    clock, shown = Clock(), []

    class Shown(Quiet):
        def round_begins(self, title, steps, metric="loss"):
            shown.append((title, steps))

        def step(self, done, value, samples_per_second):
            shown.append(done)

    progress = FolderProgress(Shown(), tmp_path, stages=0, clock=clock)
    progress.round_begins(GROWING, 500, "error")
    clock.now = 10.0
    progress.step(500, 0.5, 0.0)
    assert "500 of 500" in str(read_status(tmp_path, now=10.0))
    progress.round_begins(WAITING, 0, "error")
    for clock.now in (100.0, 200.0):
        progress.step(500, math.nan, 0.0)  # at every look in vain; no line for a person
    found = read_status(tmp_path, now=201.0)
    assert (found.left, found.silent) == (None, 1.0)
    assert "now at      waiting for more samples\n" in str(found)
    progress.round_begins(GROWING, 900, "error")
    assert "500 of 900" in str(read_status(tmp_path, now=201.0))
    assert shown == [(GROWING, 500), 500, (WAITING, 0), (GROWING, 900)]


def test_whoever_waits_for_samples_says_so_and_what_came():
    said, looks, came = [], [], iter([0, 0, 7, 0])

    class Stream:
        info = SourceInfo(live_seconds=0.4)
        arrived = staticmethod(lambda: next(came, 0))
        grow = staticmethod(np.arange)

    class Alone:
        is_main = True
        broadcast = staticmethod(lambda value: value)

    end = LiveEnd(Stream(), Alone(), said.append)
    assert end.wait(looks.append).tolist() == list(range(7)) and end.open and looks == [1, 2]
    assert len(end.wait(looks.append)) == 0 and not end.open
    waiting = "[live] waiting 0.4 s at most for more samples"
    ended = "[live] none came in 0.4 s: the stream has ended"
    assert said == [waiting, "[live] 7 more samples have come", waiting, ended]
