"""Services through accelerate.tracking: TensorBoard as the one whose files can be read here."""

import json

import pytest

from distcl.config import TrackingConfig
from distcl.tracking import create_tracker
from tests.spawn import distcl

pytest.importorskip("tensorboard", reason="the package tensorboard is not installed")

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def tracker(out, resume):
    return create_tracker(TrackingConfig(kind="tensorboard"), out, 0, resume)


def scalars(out):
    events = EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    return {
        name: [(event.step, event.value) for event in events.Scalars(name)]
        for name in events.Tags()["scalars"]
    }


def test_a_run_that_is_requeued_is_one_run_with_each_step_once(tmp_path):
    for _ in range(2):  # the second begins anew
        first = tracker(tmp_path, resume=False)
        for n in range(2):
            first.log({"loss": 0.5**n, "note": "text", "flag": True}, 10 * n)
        state = first.state_dict()
        first.log({"loss": 0.25}, 20)
        first.finish("preempted")
    second = tracker(tmp_path, resume=True)
    second.load_state_dict(state)
    for n in range(2, 5):
        second.log({"loss": 0.5**n}, 10 * n)
    second.summarize({"average_accuracy": 0.75, "drifts": [5]})
    second.finish()
    found = scalars(tmp_path)
    assert found == {
        "loss": [(10 * n, 0.5**n) for n in range(5)],
        "final/average_accuracy": [(40, 0.75)],
    }
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 10, 20, 30, 40]


def test_a_service_that_is_added_to_a_run_gets_what_was_before(tmp_path):
    first = create_tracker(TrackingConfig(), tmp_path, 0)
    first.log({"loss": 1.0}, 1)
    state = first.state_dict()
    first.finish()
    second = tracker(tmp_path, resume=True)
    second.load_state_dict(state)
    second.log({"loss": 0.5}, 2)
    second.finish()
    assert scalars(tmp_path) == {"loss": [(1, 1.0), (2, 0.5)]}


def test_a_job_on_two_ranks_writes_the_numbers_of_metrics_jsonl_once(tmp_path):
    short = ("training.epochs=1", "training.pretrain_epochs=1", "stream.experiences=2")
    sets = [part for text in (*short, "tracking.kind=tensorboard") for part in ("--set", text)]
    done = distcl("train", "configs/digits.toml", "--out", str(tmp_path / "run"), *sets, ranks=2)
    assert done.returncode == 0, done.stderr
    assert "[tracking]" not in done.stdout
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    expected = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    found = scalars(tmp_path / "run")
    assert found["loss"] == [(step, pytest.approx(loss)) for step, loss in expected]
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert found["final/average_accuracy"][0][1] == pytest.approx(summary["average_accuracy"])
