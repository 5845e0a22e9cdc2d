import json
import os
import subprocess
import sys

import pytest

from distcl.errors import UsageError
from distcl.reporting.progress import FolderProgress
from distcl.reporting.status import read_metrics, read_status
from distcl.training.build import Quiet
from distcl.types import WATCHING


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
