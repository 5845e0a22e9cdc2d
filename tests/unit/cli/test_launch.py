"""The job scripts, and the sbatch command that distcl launch makes of them."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from distcl.cli.launch import Submission, scripts_folder, submission, submit
from distcl.errors import UsageError

ROOT = Path(__file__).parents[3]
SCRIPTS = sorted((ROOT / "launch" / "slurm").glob("*.sbatch"))
MARKS = ("# == the same in every script of this folder: begin ==", "end ==\n")


def job(**more) -> Submission:
    return submission(["train", "a.toml"], Path("runs/a"), **more)


def test_there_are_four_scripts():
    assert [path.stem for path in SCRIPTS] == [
        "multi_node",
        "multi_node_accelerate",
        "multi_node_torchrun",
        "single_node",
    ]
    assert scripts_folder() == ROOT / "launch" / "slurm"


def test_what_the_scripts_share_is_the_same_in_all():
    common = {path.read_text().partition(MARKS[0])[2].partition(MARKS[1])[0] for path in SCRIPTS}
    assert len(common) == 1
    assert "scontrol requeue" in common.pop()


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_scripts_ask_for_the_warning_and_may_be_requeued(path):
    text = path.read_text()
    for line in ("--signal=B:USR1@120", "--requeue", "--open-mode=append"):
        assert f"#SBATCH {line}\n" in text
    assert f"launch/slurm/{path.name}" in text  # the usage names the script itself


def test_scripts_pass_shellcheck():
    if shutil.which("shellcheck") is None:
        pytest.skip("not installed: shellcheck (tests/install installs it)")
    files = [*SCRIPTS, ROOT / "tests/install", ROOT / ".ci/run"]
    done = subprocess.run(["shellcheck", *files], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_one_node_is_torchruns_and_more_are_sruns_unless_told():
    assert job().script.stem == "single_node"
    assert job(via="torchrun").script.stem == "single_node"
    assert job(asked={"nodes": 2}).script.stem == "multi_node"
    assert job(via="srun").script.stem == "multi_node"
    assert job(asked={"nodes": 2}, via="torchrun").script.stem == "multi_node_torchrun"
    assert job(via="accelerate").script.stem == "multi_node_accelerate"


def test_options_become_those_of_sbatch():
    asked = {"nodes": 2, "gpus-per-node": 4, "time": "1:00:00", "partition": "gpu", "account": ""}
    made = job(asked=asked, cpus=8, options=["--qos=debug"])
    assert made.command == [
        *("sbatch", "--parsable", "--nodes=2", "--gpus-per-node=4", "--job-name=a"),
        *("--time=1:00:00", "--partition=gpu", "--ntasks-per-node=4", "--cpus-per-task=8"),
        *("--output=runs/a/slurm-%j.out", "--qos=debug"),
        *(str(ROOT / "launch/slurm/multi_node.sbatch"), "train", "a.toml", "--out", "runs/a"),
    ]
    assert made.environment == {"PYTHON": sys.executable}


def test_a_launcher_per_node_has_the_cores_of_all_its_processes():
    made = job(processes=3, cpus=2, setup="modules.sh")
    assert {"--ntasks-per-node=1", "--cpus-per-task=6"} <= set(made.command)
    assert made.environment | {"PYTHON": ""} == {
        "PYTHON": "",
        "PROCESSES": "3",
        "JOB_SETUP": "modules.sh",
    }
    assert str(made).startswith(f"PYTHON={sys.executable} PROCESSES=3 JOB_SETUP=modules.sh sbatch ")


def test_without_slurm_it_says_where_to_submit(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    made = submission(["train", "a.toml"], tmp_path / "run")
    with pytest.raises(UsageError, match="sbatch is not on the PATH"):
        submit(made)


def test_a_refusal_of_slurm_is_passed_on(tmp_path, monkeypatch):
    (tmp_path / "sbatch").write_text("#!/bin/sh\necho 'invalid account' >&2; exit 1\n")
    (tmp_path / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    made = submission(["train", "a.toml"], tmp_path / "run")
    with pytest.raises(UsageError, match="SLURM refused the job: invalid account"):
        submit(made)


def test_an_installed_package_has_the_scripts(tmp_path):
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
    tree = tmp_path / "source"
    kept = shutil.ignore_patterns(".*", "*.egg-info", "build", "runs", "__pycache__")
    for name in ("distcl", "launch"):
        shutil.copytree(ROOT / name, tree / name, ignore=kept)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    done = subprocess.run([*pip, "-w", tmp_path, tree], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    names = zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist()
    for path in SCRIPTS:
        assert any(name.endswith(f"share/distcl/launch/slurm/{path.name}") for name in names)
