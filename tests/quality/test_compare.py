"""``distcl compare`` in real processes: equal cost, paired runs, going on."""

import json
import re
import shutil

import pytest

from distcl.cli.compare import AS_GIVEN
from distcl.reporting.comparison import Variant
from tests.spawn import distcl

CONFIG = """
[stream]
experiences = 2
[training]
epochs = 2
pretrain_epochs = 0
[continual_learning]
importance_weighting = true
[checkpoint]
every_round = false
save_final = false
"""
OFF = "continual_learning.importance_weighting=false"
COMMAND = ("--vs", OFF, "--seeds", "2", "--jobs", "2", "--json")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("compare")
    (path / "a.toml").write_text(CONFIG)
    return path


@pytest.fixture(scope="module")
def first(folder):
    done = compare(folder)
    assert done.returncode == 0, done.stderr
    return done


def compare(folder, *more):
    return distcl("compare", str(folder / "a.toml"), "--out", str(folder / "out"), *COMMAND, *more)


def test_the_cheaper_variant_gets_more_steps_until_both_cost_the_same(first):
    scored, uniform = json.loads(first.stdout)["arms"]
    assert scored["step_factor"] == 1.0 and uniform["step_factor"] > 1.05
    for a, b in zip(scored["runs"], uniform["runs"], strict=True):
        assert b["units"] == pytest.approx(a["units"], rel=0.01)
        assert a["units"] > 3 * a["trained"] and b["units"] == 3 * b["trained"]
        assert b["steps"] > a["steps"]


def test_pairs_have_the_same_seed_and_stream_and_start(folder, first):
    arms = json.loads(first.stdout)["arms"]
    assert [[run["seed"] for run in arm["runs"]] for arm in arms] == [[0, 1], [0, 1]]
    assert json.loads((folder / "out" / "compare.json").read_text()) == json.loads(first.stdout)
    page = (folder / "out" / "report.html").read_text()
    assert json.loads(first.stdout)["verdict"] in page


def test_what_is_done_is_not_done_again(folder, first):
    given = folder / "out" / Variant(AS_GIVEN).folder
    kept = (given / "seed-0" / "summary.json").stat().st_mtime_ns
    shutil.rmtree(given / "seed-1")
    again = compare(folder)
    assert again.returncode == 0, again.stderr
    assert again.stderr.count("[4/4] as given, seed 1") == 1 and again.stderr.count("seed") == 1
    assert (given / "seed-0" / "summary.json").stat().st_mtime_ns == kept
    assert (
        json.loads(again.stdout)["differences"][0]["accuracy"]
        == (json.loads(first.stdout)["differences"][0]["accuracy"])
    )


def test_what_is_asked_is_counted_and_what_is_more_is_called_calibration(first):
    told = first.stderr
    assert "[calibration] 2 runs on seed 0, to make compute equal" in told
    assert re.findall(r"^\[(\d/\d)\]", told, re.MULTILINE) == ["3/4", "4/4"]


def test_runs_of_another_configuration_or_command_are_not_replaced(folder, first):
    kept = (folder / "out" / "compare.json").read_bytes()
    for more in (("--set", "training.epochs=3"), ("--command", "run")):
        done = compare(folder, *more)
        assert done.returncode == 2
        assert "--overwrite" in done.stderr and str(folder / "out") in done.stderr
    assert (folder / "out" / "compare.json").read_bytes() == kept


def test_a_run_that_fails_is_named_with_its_reason(folder, tmp_path):
    more = ("--set", "stream.source=arrays", "--set", "stream.path=gone.npz")
    done = compare(folder, *more, "--out", str(tmp_path / "out"))
    assert done.returncode == 3
    # all of them fail, and either variant may be the first
    assert re.search(r"the run of '[^']+' with seed \d failed", done.stderr), done.stderr
    assert "gone.npz" in done.stderr


def test_wrong_input_is_refused_before_anything_runs(tmp_path):
    (tmp_path / "a.toml").write_text(CONFIG)
    for vs, told in (((), "needs a variant"), (("--vs", "training.epoch=1"), "training.epochs")):
        done = distcl("compare", str(tmp_path / "a.toml"), *vs, "--out", str(tmp_path / "out"))
        assert done.returncode == 2 and told in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
