"""A run never destroys another: which folder it takes, and what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from distcl import job
from distcl.config import Config
from distcl.errors import UsageError
from distcl.reporting.run_folder import RunFolder, make_numbered, numbered_folders, protect
from tests.small import SMALL, small
from tests.spawn import run_ranks

QUICK = ("training.epochs=1", "training.pretrain_epochs=1", "checkpoint.keep=9")
BOTH = """
import sys
from pathlib import Path
from distcl.config import Config
from distcl.reporting.run_folder import RunFolder

sys.stdin.readline()
with RunFolder(Path(sys.argv[1]), Config(), True, "train", numbered=True).open() as config:
    print(config.run.out)
"""


def held(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def taken(path: Path, resume: str = "never", command: str = "train", **more: bool) -> Path:
    """The folder that a run takes."""
    folder = RunFolder(path, Config(), True, command, numbered=True)
    with folder.open(resume, **more) as config:
        assert config.run.out == str(folder.path)
        return folder.path


def test_without_out_each_run_has_a_folder_and_auto_takes_the_newest_of_its_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tmp_path / "runs" / "a[1]"
    assert taken(base) == base
    assert taken(base, command="run") == tmp_path / "runs" / "a[1]-2"
    assert taken(base) == tmp_path / "runs" / "a[1]-3"
    assert taken(base, "auto") == tmp_path / "runs" / "a[1]-3"
    assert taken(base, "auto", "run") == tmp_path / "runs" / "a[1]-2"
    assert taken(base, "auto", "detect") == tmp_path / "runs" / "a[1]-4"  # there is none: anew
    (tmp_path / "runs" / "a[1]-03").mkdir()
    (tmp_path / "runs" / "a[1]-b").mkdir()
    assert [path.name for path in numbered_folders(base)] == ["a[1]", "a[1]-2", "a[1]-3", "a[1]-4"]
    checkpoint = base / "checkpoints" / "step-00000007"
    assert taken(base, str(checkpoint)) == base
    monkeypatch.setenv("HOME", str(tmp_path))
    assert taken(base, "~/runs/a[1]/checkpoints/step-00000007") == base
    (tmp_path / "link").symlink_to(tmp_path / "runs")
    assert taken(base, str(tmp_path / "link" / checkpoint.relative_to(base.parent))) == base
    assert taken(base, overwrite=True) == base
    other = taken(tmp_path / "runs" / "a[1]-4")  # another configuration's name
    assert other == tmp_path / "runs" / "a[1]-4-2"


def test_processes_that_start_at_once_have_folders_of_their_own(tmp_path: Path) -> None:
    started = [
        subprocess.Popen(
            [sys.executable, "-c", BOTH, str(tmp_path / "a")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(4)
    ]
    for process in started:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    found = sorted(process.communicate()[0].strip() for process in started)
    assert found == sorted(str(tmp_path / name) for name in ("a", "a-2", "a-3", "a-4"))
    assert make_numbered(tmp_path / "a") == tmp_path / "a-5"


@pytest.mark.parametrize("left", ["status.json", "summary.json", "metrics.jsonl", "checkpoints/x"])
def test_whatever_a_run_left_is_a_run(left: str, tmp_path: Path) -> None:
    (tmp_path / left).parent.mkdir(exist_ok=True)
    (tmp_path / left).write_text("{}")
    (tmp_path / "notes.txt").write_text("mine")
    folder = RunFolder(tmp_path, Config(), True)
    with pytest.raises(UsageError, match=r"--resume auto.*--overwrite.*--out another"), folder.open():
        pass
    assert (tmp_path / left).exists()
    with folder.open(overwrite=True):
        assert left == "status.json" or not (tmp_path / left).exists()
    assert (tmp_path / "notes.txt").read_text() == "mine"
    with pytest.raises(UsageError, match="give one of them"), folder.open("auto", overwrite=True):
        pass


def test_a_run_is_refused_where_one_is_and_goes_on_only_if_asked(tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert job.execute("train", small(*QUICK), out)["folder"] == str(out)
    before = held(out)
    for command in ("train", "run", "detect"):
        with pytest.raises(UsageError, match="holds a run: go on with it"):
            job.execute(command, small(*QUICK), out)
    elsewhere = str(tmp_path / "other" / "checkpoints" / "step-1")
    with pytest.raises(UsageError, match="holds a run: go on with it"):
        job.execute("train", small(*QUICK), out, resume=elsewhere)
    assert held(out) == before
    first = min((out / "checkpoints").glob("step-*"))
    summary = job.execute("train", small(*QUICK), out, resume=str(first))
    assert (summary["folder"], len(summary["rounds"])) == (str(out), 2)
    job.execute("train", small(*QUICK, "stream.experiences=2"), out, overwrite=True)
    assert not list((out / "draws").glob("*2.npz"))  # of the longer run before
    for path in (out / "checkpoints").glob("step-*"):
        path.rename(tmp_path / path.name)
    with pytest.raises(UsageError, match="done and left no checkpoint"):
        job.execute("train", small(*QUICK), out, resume="auto")




def test_all_ranks_use_one_folder(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    found = run_ranks(3, _one, tmp_path / "a")
    assert found == [str(tmp_path / "a-2")] * 3
    assert (tmp_path / "a-2" / "config.toml").read_text().count(str(tmp_path / "a-2")) == 1
    assert not list((tmp_path / "a").iterdir())
    status = json.loads((tmp_path / "a-2" / "status.json").read_text())
    assert (status["state"], status["command"], status["name"]) == ("done", "train", "a")


def _one(base: Path) -> str:
    return str(job.execute("train", small(*QUICK), base, numbered=True)["folder"])


def test_the_command_line_refuses_with_code_2_and_numbers(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text("")
    words = [word for key in (*SMALL, *QUICK) for word in ("--set", key)]
    start = [sys.executable, "-m", "distcl", "train", "a.toml", *words]
    (tmp_path / "runs" / "a").mkdir(parents=True)
    (tmp_path / "runs" / "a" / "status.json").write_text('{"state": "failed"}')
    done = subprocess.run(start, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "the run folder is runs/a-2\n" in done.stdout
    assert done.stdout.endswith("everything is in runs/a-2\n")
    refused = subprocess.run([*start, "--out", "runs/a"], cwd=tmp_path, capture_output=True, text=True)
    assert refused.returncode == 2 and "'runs/a' holds a run" in refused.stderr


def test_what_is_made_of_runs_does_not_replace_their_files(tmp_path: Path) -> None:
    (tmp_path / "status.json").write_text("{}")
    protect(tmp_path / "report.html")
    protect(tmp_path / "mine.json")
    protect(tmp_path / "other" / "config.toml")
    for name in ("summary.json", "config.toml", "status.json", "metrics.jsonl"):
        with pytest.raises(UsageError, match="is part of a run"):
            protect(tmp_path / name)
