import json
import os
import subprocess
import sys
import time
from pathlib import Path
from signal import SIGKILL, SIGTERM, SIGUSR1

import numpy as np
import pytest

from distcl.config import TrackingConfig
from distcl.tracking import create_tracker
from distcl.tracking.tracker import Histogram
from tests.spawn import distcl

pytest.importorskip("wandb", reason="the package wandb is not installed")

from tests.tracking.offline import OfflineRun

ROOT = Path(__file__).parents[2]
NO_KEY = {"WANDB_API_KEY": "", "NETRC": "/dev/null"}
SHORT = ["training.epochs=1", "training.pretrain_epochs=1", "stream.experiences=3"]
PIECES = ("manifest.json", "model.safetensors", "rank-00000.pt", "rank-00001.pt")
OURS = ("_runtime", "_timestamp", "_step", "_wandb")


def lines(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """A run on two ranks, tracked offline since there is no key."""
    folder = tmp_path_factory.mktemp("runs") / "tracked"
    sets = [*SHORT, 'tracking.kind=["jsonl", "wandb"]', "tracking.project=streams"]
    home = {"HOME": str(folder.parent / "home")}
    arguments = [part for text in sets for part in ("--set", text)]
    run = ("train", "configs/digits.toml", "--out", str(folder), *arguments)
    done = distcl(*run, ranks=2, **NO_KEY, **home)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("W&B has no key") == 1, done.stdout
    return folder


def test_wandb_and_jsonl_have_the_same_numbers_and_each_row_once(out):
    run, written = OfflineRun(out), lines(out)
    assert run.processes == 1  # of two ranks, rank 0 writes
    assert [row["_step"] for row in run.rows] == list(range(len(written) + 1))  # + the matrix
    for row, line in zip(run.rows, written, strict=False):
        logged = {k: v for k, v in row.items() if k not in OURS}
        expected = {k: v for k, v in line.items() if k != "time" and v is not None}
        assert logged.keys() == expected.keys()
        for name, value in logged.items():
            if name.endswith("/weights"):
                assert value["values"] == expected[name]["counts"]
                assert len(value["values"]) <= 64
                continue
            assert value == expected[name], name


def test_the_summary_has_the_numbers_of_summary_json_and_the_matrix(out):
    run, summary = OfflineRun(out), json.loads((out / "summary.json").read_text())
    for name in ("average_accuracy", "average_forgetting", "seconds", "seed"):
        assert run.summary[name] == summary[name], name
    matrix = run.rows[-1]
    assert matrix["accuracy_matrix"]["_type"] == "table-file"
    assert matrix["accuracy_heat_map"]["_type"] == "image-file"
    (folder,) = out.glob("wandb/offline-run-*")
    table = json.loads((folder / "files" / matrix["accuracy_matrix"]["path"]).read_text())
    assert [row[1:] for row in table["data"]] == summary["accuracy"]
    assert (folder / "files" / matrix["accuracy_heat_map"]["path"]).stat().st_size > 2000
    reported = [line for line in lines(out) if "draws/coverage" in line]
    assert [line["draws/coverage"] for line in reported] == [
        r["draws"]["coverage"] for r in summary["rounds"]
    ]
    assert (
        reported[-1]["priority/cur/ess_fraction"]
        == (summary["rounds"][-1]["priority"]["cur"]["ess_fraction"])
    )


def test_config_code_version_and_checkpoints_are_there(out):
    run = OfflineRun(out)
    assert run.config["training"]["epochs"] == 1
    assert run.config["distcl_version"]
    models = [artifact for artifact in run.artifacts if artifact.type == "model"]
    told = []
    for artifact in models:
        references = [entry.ref for entry in artifact.manifest.contents]
        assert all(ref.startswith("file://") for ref in references)  # nothing is copied
        told.append(next(alias for alias in artifact.aliases if alias != "latest"))
        if told[-1] != "final":
            assert {f"{out}/checkpoints/{told[-1]}/{name}" for name in PIECES} <= {
                ref.removeprefix("file://") for ref in references
            }
    assert len({artifact.name for artifact in models}) == 1
    kept = [path.stem for path in (out / "checkpoints").iterdir()]
    assert len(told) == 4 and set(kept) <= set(told)  # one a round, and the final weights


def test_everything_is_in_the_run_folder(out):
    elsewhere = [path for path in (out.parent / "home").rglob("*") if path.is_file()]
    assert [path for path in elsewhere if "matplotlib" not in path.parts] == []  # its font list


def tracker(out, resume):
    config = TrackingConfig(kind=["jsonl", "wandb"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        return create_tracker(config, out, 0, resume)


def test_a_run_that_is_requeued_is_one_run_with_each_step_once(tmp_path):
    first = tracker(tmp_path, resume=False)
    for n in range(3):
        first.log({"round": 1, "loss": 1.0 / (n + 1)}, 10 * n)
    state = first.state_dict()  # what the checkpoint holds
    for n in range(3, 6):
        first.log({"round": 1, "loss": 1.0 / (n + 1)}, 10 * n)
    first.finish()
    second = tracker(tmp_path, resume=True)
    second.load_state_dict(state)
    for n in range(3, 9):
        second.log({"round": 1, "loss": 1.0 / (n + 1)}, 10 * n)
    second.finish()
    run = OfflineRun(tmp_path)
    assert run.processes == 2 and len(run.ids) == 1
    for rows in (run.rows, lines(tmp_path)):
        assert [row["step"] for row in rows] == [10 * n for n in range(9)]
        assert [row["loss"] for row in rows] == [1.0 / (n + 1) for n in range(9)]
    assert [row["_step"] for row in run.rows] == list(range(9))


def test_a_run_that_begins_anew_is_another_run(tmp_path):
    for _ in range(2):
        one = tracker(tmp_path, resume=False)
        one.log({"h": Histogram(np.array([0, 2, 1]), np.array([0.0, 1.0, 2.0, 3.0]))}, 0)
        one.finish()
    assert len(OfflineRun(tmp_path).ids) == 2


def test_a_server_that_cannot_be_reached_does_not_stop_the_run(tmp_path):
    sets = [*SHORT, "tracking.kind=wandb", "run.report=false"]
    arguments = [part for text in sets for part in ("--set", text)]
    nowhere = {
        "WANDB_BASE_URL": "http://127.0.0.1:9",
        "WANDB_API_KEY": "0" * 40,
        "WANDB_MODE": "online",
    }
    done = distcl(
        "train",
        "configs/digits.toml",
        "--out",
        str(tmp_path / "run"),
        *arguments,
        **nowhere,
        HOME=str(tmp_path),
        WANDB_INIT_TIMEOUT="5",
    )
    assert done.returncode == 0, done.stderr
    warned = [line for line in done.stdout.splitlines() if "[tracking] wandb failed" in line]
    assert len(warned) == 1, done.stdout
    assert len(lines(tmp_path / "run")) > 5


def test_rows_lost_on_the_way_to_wandb_are_sent_by_the_next_process(tmp_path):
    first = tracker(tmp_path, resume=False)
    histogram = Histogram(np.array([0, 2, 1]), np.array([0.0, 1.0, 2.0, 3.0]))
    for n in range(4):
        first.log({"round": 1, "loss": 1.0 / (n + 1), "bad": float("nan"), "h": histogram}, n)
    state = first.state_dict()
    first.finish()
    (path,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    data = path.read_bytes()
    held = data.index(b"0.3333333333333333")  # within the third of four rows
    path.write_bytes(data[:held])  # as a node leaves it that goes down
    assert len(OfflineRun(tmp_path).rows) == 2
    second = tracker(tmp_path, resume=True)
    second.load_state_dict(state)
    second.log({"round": 1, "loss": 0.2}, 4)
    second.finish()
    run = OfflineRun(tmp_path)
    assert [row["_step"] for row in run.rows] == list(range(5))
    assert [row["loss"] for row in run.rows] == [1.0 / (n + 1) for n in range(5)]
    assert run.rows[3]["h"] == run.rows[0]["h"] and run.rows[3]["h"]["values"] == [2, 1]
    assert np.isnan([run.rows[3]["bad"], run.rows[0]["bad"]]).all()


def _interrupted(command, out, after_lines, number):
    """Start a run, signal it once metrics.jsonl has so many lines; return its exit code."""
    process = subprocess.Popen(
        [sys.executable, "-m", "distcl", *command],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
    )
    path = out / "metrics.jsonl"
    while process.poll() is None:
        if path.exists() and path.read_bytes().count(b"\n") >= after_lines:
            process.send_signal(number)
            break
        time.sleep(0.002)
    return process.wait(60)


@pytest.mark.timeout(420)  # seven processes, one after another
def test_a_run_interrupted_five_times_at_random_has_each_step_once_as_an_uninterrupted_one(
    tmp_path, monkeypatch
):
    monkeypatch.delenv("WANDB_SERVICE", raising=False)  # each process has its own
    monkeypatch.setenv("WANDB_MODE", "offline")
    sets = ["run.report=false", "run.poll_steps=5", "training.steps_per_round=400"]
    sets += ["stream.experiences=3", "training.pretrain_epochs=3", "checkpoint.every_steps=50"]
    sets += ["tracking.kind=wandb"]
    arguments = [part for text in sets for part in ("--set", text)]

    def train(out, *more):
        return "train", "configs/digits.toml", "--out", str(out), *arguments, *more

    whole, pieces = tmp_path / "whole", tmp_path / "pieces"
    assert distcl(*train(whole)).returncode == 0
    total = len(lines(whole))
    rng = np.random.default_rng(8)
    moments = sorted(rng.choice(np.arange(25, total - 40), 5, replace=False).tolist())
    signals = [SIGTERM, SIGKILL, SIGUSR1, SIGKILL, SIGTERM]
    codes = [
        _interrupted(train(pieces, "--resume", "auto"), pieces, moment, number)
        for moment, number in zip(moments, signals, strict=True)
    ]
    assert codes == [75, -SIGKILL, 75, -SIGKILL, 75]
    assert distcl(*train(pieces, "--resume", "auto")).returncode == 0

    def told(line):
        clocked = ("time", "samples_per_second")
        return {k: v for k, v in line.items() if k not in clocked}

    assert [told(line) for line in lines(pieces)] == [told(line) for line in lines(whole)]
    run = OfflineRun(pieces)
    assert run.processes == 6 and len(run.ids) == 1
    assert [row["_step"] for row in run.rows] == list(range(total + 1))  # + the matrix
    assert [row.get("loss") for row in run.rows[:-1]] == [line.get("loss") for line in lines(whole)]
    one, other = (json.loads((out / "summary.json").read_text()) for out in (whole, pieces))
    assert [r["draws"] for r in one["rounds"]] == [r["draws"] for r in other["rounds"]]
    for name in sorted(path.name for path in (whole / "draws").iterdir()):
        with np.load(whole / "draws" / name) as a, np.load(pieces / "draws" / name) as b:
            assert all(np.array_equal(a[key], b[key]) for key in a.files)
