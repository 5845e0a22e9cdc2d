import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest

import distcl
from distcl import load_config, registry
from distcl.cli import app
from distcl.config.load import SECTIONS
from distcl.config.reference import reference
from distcl.distributed.doctor import examine
from distcl.errors import DataError, DivergenceError

LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "SLURM_PROCID", "WORLD_SIZE", "DISTCL_DEBUG")

SUMMARY = {"status": "done", "rounds": [], "accuracy": [[0.5]], "average_accuracy": 0.5}


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    for name in LAUNCHER_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(app, "RANK_0_FIRST", 0.0)


@pytest.fixture
def distcl_command(monkeypatch, capsys):
    """Run the command line in this process; return (exit code, stdout, stderr)."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["distcl", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            app.main()
        return (int(caught.value.code or 0), *capsys.readouterr())

    return run


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "a.toml"
    path.write_text("[run]\nseed = 3\n")
    return path


@pytest.fixture
def job(monkeypatch):
    """Stand in for distcl.job: note what it was asked, and do what a test says."""
    job = types.ModuleType("distcl.job")
    job.asked = []
    job.act = lambda display, tell: None

    def execute(command, config, out, progress, tell, resume, allowed, overwrite, numbered, **more):
        assert more == {"callbacks": ()}
        job.asked.append((command, config, out, progress))
        job.resumed, job.folder = (resume, allowed), (overwrite, numbered)
        job.act(progress, tell)
        return {**SUMMARY, "folder": str(out)}

    job.execute = execute
    monkeypatch.setitem(sys.modules, "distcl.job", job)
    monkeypatch.setattr(distcl, "job", job, raising=False)
    return job


def test_who_reads_may_have_had_enough():
    """As in ``distcl --help | head -1``."""
    environ = {**os.environ, "PYTHONPATH": str(Path(distcl.__file__).parents[1])}
    command = [sys.executable, "-m", "distcl", "list"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, env=environ, **pipes) as process:
        process.stdout.close()
        assert process.stderr.read() == b""


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["run", "--help"], ["list"], ["config"], ["init", "x.toml"]],
    ids=lambda arguments: " ".join(arguments),
)
def test_light_commands_do_not_import_torch(arguments, tmp_path):
    environ = {**os.environ, "PYTHONPATH": str(Path(distcl.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "distcl", *arguments],
        cwd=tmp_path,
        env=environ,
        capture_output=True,
        text=True,
    )
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert done.returncode == 0
    assert done.stdout
    assert "distcl.cli.app" in imported
    assert not {"torch", "accelerate", "numpy", "matplotlib"} & imported


def test_without_a_command_the_help_is_shown(distcl_command):
    code, out, _ = distcl_command()
    assert code == 0
    assert all(name in out for name in ("run", "train", "detect", "config", "init", "doctor"))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["trian"], "distcl: No such command 'trian'."),
        (["run", "--sett", "x"], "distcl: No such option: --sett"),
        (["run"], "distcl: distcl run needs a CONFIG; 'distcl init' writes one\n"),
        (["run", "no.toml"], "distcl: no.toml: no such file\n"),
        (["train", "a.toml", "--config", "b.toml"], "distcl: two configurations are given, "),
        (["config", "--set", "run.seed"], "distcl: --set run.seed: must have the form "),
        (["config", "--set", "run.sed=1"], "unknown key 'run.sed', did you mean 'run.seed'?\n"),
    ],
)
def test_wrong_usage_is_one_line_and_code_2(distcl_command, arguments, expected):
    code, out, err = distcl_command(*arguments)
    assert (code, out) == (2, "")
    assert expected in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("command", ["run", "train", "detect"])
def test_the_job_gets_command_config_and_folder(distcl_command, job, config_file, command):
    code, out, _ = distcl_command(command, config_file, "--set", "run.precision=fp64", "--out", "o")
    assert code == 0
    asked, config, folder, progress = job.asked[0]
    assert (asked, folder, config.run.seed, config.run.precision) == (command, Path("o"), 3, "fp64")
    assert config.run.out == "o"
    assert progress is not None
    assert "50.0" in out and "everything is in o" in out


def test_the_folder_has_a_default_and_a_key(distcl_command, job, config_file):
    distcl_command("run", "--config", config_file)
    distcl_command("run", config_file, "--set", "run.out=elsewhere")
    assert [asked[2] for asked in job.asked] == [Path("runs/a"), Path("elsewhere")]
    assert job.folder == (False, False)
    distcl_command("run", config_file, "--overwrite")
    assert job.folder == (True, True)


def test_resume_and_the_keys_that_may_change_are_passed_on(distcl_command, job, config_file):
    distcl_command("train", config_file)
    assert job.resumed == ("never", [])
    distcl_command("train", config_file, "--resume", "auto", "--allow-changed", "optimizer.lr")
    assert job.resumed == ("auto", ["optimizer.lr"])


def test_json_is_alone_on_stdout(distcl_command, job, config_file):
    job.act = lambda display, tell: display.message("progress")
    code, out, err = distcl_command("run", config_file, "--json")
    assert code == 0
    assert json.loads(out) == {**SUMMARY, "folder": "runs/a"}
    assert "progress" in err


def test_quiet_prints_nothing(distcl_command, job, config_file):
    assert distcl_command("run", config_file, "--quiet") == (0, "", "")
    assert job.asked[0][3] is None
    code, out, _ = distcl_command("run", config_file, "--quiet", "--json")
    assert code == 0
    assert json.loads(out) == {**SUMMARY, "folder": "runs/a"}


def fails_with(error):
    def act(display, tell):
        raise error

    return act


@pytest.mark.parametrize(
    ("error", "code", "expected"),
    [
        (DataError("x.npz: has NaN in row 3"), 3, "distcl: x.npz: has NaN in row 3\n"),
        (DivergenceError("round 2, step 5"), 4, "distcl: round 2, step 5\n"),
        (
            ZeroDivisionError("division\nby zero"),
            1,
            "distcl: internal error: ZeroDivisionError: division\n"
            "set DISTCL_DEBUG=1 for the traceback\n",
        ),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_errors_have_codes_and_no_traceback(
    distcl_command, job, config_file, error, code, expected
):
    job.act = fails_with(error)
    assert distcl_command("run", config_file) == (code, "", expected)


def test_debug_adds_the_traceback(distcl_command, job, config_file, monkeypatch):
    monkeypatch.setenv("DISTCL_DEBUG", "1")
    job.act = fails_with(ZeroDivisionError("zero"))
    code, _, err = distcl_command("run", config_file)
    assert code == 1
    assert "Traceback" in err and "internal error: ZeroDivisionError: zero" in err


@pytest.mark.parametrize("variable", ["RANK", "LOCAL_RANK", "SLURM_PROCID"])
def test_other_ranks_print_nothing(distcl_command, job, config_file, monkeypatch, variable):
    monkeypatch.setenv(variable, "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert distcl_command("run", config_file, "--json") == (0, "", "")
    assert job.asked[0][3] is None
    job.act = fails_with(DataError("x"))
    assert distcl_command("run", config_file) == (3, "", "")
    assert distcl_command("trian") == (2, "", "")
    assert distcl_command("config") == (0, "", "")
    assert distcl_command("doctor")[1:] == ("", "")


def test_a_leftover_rank_does_not_make_the_command_silent(distcl_command, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    code, out, _ = distcl_command("doctor")
    assert code == 1
    assert "RANK is set but WORLD_SIZE is not" in out


def test_another_ranks_failure_is_told_on_stderr(distcl_command, job, config_file):
    job.act = lambda display, tell: tell("rank 1: out of memory")
    assert distcl_command("run", config_file)[2] == "distcl: rank 1: out of memory\n"


def test_config_shows_what_is_in_force(distcl_command, config_file, tmp_path):
    code, out, _ = distcl_command("config", config_file, "--set", "run.poll_steps=7", "--origins")
    assert code == 0
    assert f"seed = 3 # {config_file}:2\n" in out
    assert "poll_steps = 7 # --set\n" in out
    shown = tmp_path / "shown.toml"
    shown.write_text(out)
    assert load_config(shown) == load_config(config_file, ["run.poll_steps=7"])


def test_config_prints_the_reference(distcl_command):
    assert distcl_command("config", "--reference") == (0, reference(), "")


def test_init_writes_once_and_overwrites_when_forced(distcl_command, tmp_path):
    path = tmp_path / "new.toml"
    assert distcl_command("init", path)[0] == 0
    written = load_config(path)
    assert written.priority.source == "online"
    assert len(path.read_text().splitlines()) <= 60
    assert distcl_command("init", tmp_path / "all.toml", "--all")[0] == 0
    assert load_config(tmp_path / "all.toml") == written
    whole = (tmp_path / "all.toml").read_text()
    keys = [f"{key} = " for model in SECTIONS.values() for key in model.model_fields]
    assert all(f"\n{key}" in whole or f"\n# {key}" in whole for key in keys)
    path.write_text("mine")
    assert distcl_command("init", path) == (
        2,
        "",
        f"distcl: {path} exists; --force overwrites it\n",
    )
    assert path.read_text() == "mine"
    assert distcl_command("init", path, "--force")[0] == 0
    assert load_config(path) == written
    assert distcl_command("init", tmp_path / "no" / "x.toml")[0] == 2


def test_what_init_writes_draws_by_priority(distcl_command, tmp_path):
    """In every round, with the epochs that it leaves at their default; more as it learns more."""
    path = tmp_path / "new.toml"
    assert distcl_command("init", path)[0] == 0
    fast = ("stream.experiences=3", "optimizer.lr=0.2", "run.report=false")
    sets = [word for one in fast for word in ("--set", one)]
    assert distcl_command("train", path, "--out", tmp_path / "out", *sets)[0] == 0
    for done in json.loads((tmp_path / "out" / "summary.json").read_text())["rounds"]:
        found = done["priority"]["hist"]
        assert 0.5 <= found["ess_fraction"] < 0.85
        assert 0.4 < found["gate"] < 1
        assert done["forward_passes_per_sample"] == 0


def test_list_prints_every_part_with_its_description(distcl_command):
    code, out, _ = distcl_command("list")
    lines = [line.split(maxsplit=1) for line in out.splitlines()]
    assert code == 0
    for kind in registry.kinds():
        assert [kind] in lines
        for part in registry.parts(kind):
            assert [part.name, part.description] in lines


def test_list_shows_what_a_source_takes(distcl_command):
    code, out, _ = distcl_command("list", "source", "table")
    assert code == 0 and out.startswith("Return (train, test) of the rows of CSV files")
    assert ["separator", '","'] in [line.split() for line in out.splitlines()]
    code, out, _ = distcl_command("list", "source", "torch")
    assert "dataset must be given" in " ".join(out.split())
    code, _, err = distcl_command("list", "sorce")
    assert code == 2 and "no kind 'sorce', did you mean 'source'?" in err


def test_doctor_finds_nothing_broken_here(distcl_command):
    code, out, err = distcl_command("doctor")
    assert (code, err) == (0, "")
    assert "gloo" in out and "broken" not in out


@pytest.mark.parametrize(
    ("environ", "level", "words"),
    [
        ({"WORLD_SIZE": "2"}, "broken", "WORLD_SIZE is set but RANK is not"),
        ({"RANK": "0"}, "broken", "RANK is set but WORLD_SIZE is not"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "broken", "RANK = 2 but WORLD_SIZE = 2"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "x"}, "broken", "not set: MASTER_PORT"),
        ({"RANK": "one", "WORLD_SIZE": "2"}, "broken", "'one' is not a number"),
        ({"OMP_NUM_THREADS": "all"}, "warning", "'all' is not a number of threads"),
        ({"LOCAL_WORLD_SIZE": "2"}, "warning", "2 processes here would each use all cores"),
        (
            {
                "SLURM_STEP_ID": "0",
                "SLURM_STEP_NUM_TASKS": "4",
                "SLURM_STEP_NODELIST": "n[1-4]",
                "WORLD_SIZE": "1",
            },
            "broken",
            "srun started 4 processes",
        ),
        ({"DISTCL_SEED": "1"}, "broken", "DISTCL_SEED: unknown section or key 'seed'"),
    ],
)
def test_doctor_names_what_is_misconfigured(environ, level, words):
    assert any(f.level == level and words in f.text for f in examine(environ))


def test_doctor_says_so_when_the_run_folder_cannot_be_written(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    found = [f for f in examine({}, tmp_path / "runs") if f.topic == "disk"]
    assert found[0].level == "warning" and f"{tmp_path} is not writable" in found[0].text


def test_a_process_that_was_in_no_group_is_not_ended_at_once(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit) as ended:
        app.leave(3)
    assert ended.value.code == 3
