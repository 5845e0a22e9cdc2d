import json
import os
import time

import numpy as np
import pytest

from distcl.config import TrackingConfig
from distcl.config.load import load_config
from distcl.errors import ConfigError, UsageError
from distcl.tracking import create_tracker
from distcl.tracking.tracker import Histogram, JsonlTracker, Trackers, flat_values


def strict(text):
    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def test_a_line_has_round_step_time_and_values_in_that_order(tmp_path):
    tracker = JsonlTracker(tmp_path / "m.jsonl")
    begun = time.time()
    tracker.log({"loss": 0.5, "round": 2, "note": "ü", "row": [0.1, None]}, 7)
    tracker.log({"kept": True}, 8)
    first, second = strict((tmp_path / "m.jsonl").read_text())  # flushed before it is finished
    assert list(first) == ["round", "step", "time", "loss", "note", "row"]
    assert begun <= first.pop("time") <= second.pop("time") <= time.time()
    assert first == {"round": 2, "step": 7, "loss": 0.5, "note": "ü", "row": [0.1, None]}
    assert second == {"round": None, "step": 8, "kept": True}
    tracker.finish()


def test_numbers_that_json_has_not_become_null_and_are_named(tmp_path):
    tracker = JsonlTracker(tmp_path / "m.jsonl")
    values = {
        "loss": float("nan"),
        "a": {"b": [1.0, float("inf")]},
        "c": np.float32("-inf"),
        "d": 1,
    }
    tracker.log(values, 0)
    (line,) = strict((tmp_path / "m.jsonl").read_text())
    assert (line["loss"], line["a"], line["c"], line["d"]) == (None, {"b": [1.0, None]}, None, 1)
    assert line["nonfinite"] == {"loss": "nan", "a.b.1": "inf", "c": "-inf"}


def test_numpy_numbers_are_numbers(tmp_path):
    tracker = JsonlTracker(tmp_path / "m.jsonl")
    tracker.log({"a": np.int64(3), "b": np.float64(0.1), "c": np.bool_(True)}, np.int64(4).item())
    (line,) = strict((tmp_path / "m.jsonl").read_text())
    assert (line["a"], line["b"], line["c"]) == (3, 0.1, True)


@pytest.mark.parametrize("name", ["step", "time", "nonfinite"])
def test_reserved_names_are_refused(tmp_path, name):
    with pytest.raises(ValueError, match="may not be named step, time or nonfinite"):
        JsonlTracker(tmp_path / "m.jsonl").log({name: 1}, 0)


def test_a_new_run_replaces_an_old_file(tmp_path):
    for step in range(2):
        tracker = create_tracker(TrackingConfig(), tmp_path, rank=0)
        tracker.log({"round": 0}, step)
        tracker.finish()
    (line,) = strict((tmp_path / "metrics.jsonl").read_text())
    assert line["step"] == 1


@pytest.mark.parametrize(("kind", "rank"), [("none", 0), ("jsonl", 1)])
def test_other_ranks_and_none_write_nothing(tmp_path, kind, rank):
    tracker = create_tracker(TrackingConfig(kind=kind), tmp_path, rank)
    tracker.log({"loss": 1.0}, 0)
    tracker.finish()
    assert os.listdir(tmp_path) == []


def test_several_trackers_get_the_same(tmp_path):
    tracker = Trackers(JsonlTracker(tmp_path / name) for name in ("a", "b"))
    tracker.log({"loss": 1.0}, 3)
    tracker.finish()
    for name in ("a", "b"):
        assert strict((tmp_path / name).read_text())[0]["loss"] == 1.0


def test_a_file_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(UsageError, match=r"cannot write '.*absent/metrics\.jsonl': No such file"):
        create_tracker(TrackingConfig(), tmp_path / "absent", 0)


def test_a_resumed_file_is_cut_to_what_the_checkpoint_knew(tmp_path):
    first = create_tracker(TrackingConfig(), tmp_path, 0)
    first.log({"loss": 1.0}, 1)
    state = first.state_dict()
    first.log({"loss": 2.0}, 2)
    with (tmp_path / "metrics.jsonl").open("a") as stream:
        stream.write('{"round": null, "st')  # the process was killed while it wrote
    second = create_tracker(TrackingConfig(), tmp_path, 0, resume=True)
    second.load_state_dict(state)
    second.log({"loss": 2.0}, 2)
    assert [line["step"] for line in strict((tmp_path / "metrics.jsonl").read_text())] == [1, 2]


def test_a_tracker_that_fails_is_dropped_with_one_warning(tmp_path):
    class BrokenTracker(JsonlTracker):
        kind = "broken"

        def log(self, values, step):
            raise ConnectionError("no route to host\nand more")

    warnings = []
    whole = JsonlTracker(tmp_path / "whole.jsonl")
    trackers = Trackers([BrokenTracker(tmp_path / "broken.jsonl"), whole], warnings.append)
    for step in range(3):
        trackers.log({"loss": 1.0}, step)
    trackers.summarize({})
    trackers.finish()
    assert warnings == [
        "[tracking] broken failed, so the run goes on without it: ConnectionError: "
        "no route to host and more"
    ]
    assert len(strict((tmp_path / "whole.jsonl").read_text())) == 3


def test_a_histogram_is_written_without_empty_bins_at_its_ends(tmp_path):
    tracker = JsonlTracker(tmp_path / "m.jsonl")
    tracker.log({"h": Histogram(np.array([0, 2, 0, 1, 0]), np.arange(6.0))}, 0)
    tracker.log({"h": Histogram(np.zeros(3, dtype=int), np.arange(4.0))}, 0)
    first, second = strict((tmp_path / "m.jsonl").read_text())
    assert first["h"] == {"counts": [2, 0, 1], "edges": [1.0, 2.0, 3.0, 4.0]}
    assert second["h"] == {"counts": [0], "edges": [0.0, 1.0]}


def test_nested_values_become_flat_names():
    assert flat_values({"a": {"b": {"c": 1}}, "d": [2]}) == {"a/b/c": 1, "d": [2]}


@pytest.mark.parametrize("kind", ["[]", '["none", "jsonl"]', '["wandb", "wandb"]', '"csv"'])
def test_kinds_that_make_no_sense_are_refused(kind):
    with pytest.raises(ConfigError, match=r"tracking\.kind"):
        load_config(None, [f"tracking.kind={kind}"])


@pytest.mark.parametrize(
    ("kind", "install"),
    [
        *((name, f"distcl[{name}]") for name in ("wandb", "mlflow", "tensorboard")),
        *((name, name) for name in ("comet_ml", "clearml", "dvclive")),
        ("aim", "aim<4"),
    ],
)
def test_a_package_that_is_missing_is_named_with_what_to_install(
    tmp_path, monkeypatch, kind, install
):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError) as caught:
        create_tracker(TrackingConfig(kind=kind), tmp_path, 0)
    assert caught.value.exit_code == 2
    assert str(caught.value).endswith(f"needs the package {kind}: pip install '{install}'")
    assert os.listdir(tmp_path) == []
