"""The commands as functions: the same engine, the same run folder, the same errors."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import distcl
from distcl.errors import ConfigError, UsageError
from tests.small import SMALL, small

ROOT = Path(__file__).parents[2]

FEW = {
    "stream": {"experiences": 2, "samples_per_experience": 100},
    "model": {"options": {"hidden": [8]}},
    "training": {"batch_size": 50, "epochs": 1},
    "run": {"report": False},
}


def test_train_takes_a_dict_and_leaves_what_the_command_leaves(tmp_path: Path) -> None:
    before = json.dumps(FEW)
    summary = distcl.train(FEW, out=tmp_path / "a", overrides={"optimizer.lr": 0.2})
    assert json.dumps(FEW) == before
    assert summary == json.loads((tmp_path / "a" / "summary.json").read_text())
    assert summary["folder"] == str(tmp_path / "a")
    assert len(summary["accuracy"]) == 2
    again = distcl.train(tmp_path / "a" / "config.toml", out=str(tmp_path / "b"))
    given = distcl.load_config(FEW, ["optimizer.lr=0.2"], environ={})
    third = distcl.train(given, out=tmp_path / "c")
    for other in (again, third):
        assert other["accuracy"] == summary["accuracy"]
        for one, two in zip(other["rounds"], summary["rounds"], strict=True):
            assert one["draws_sha256"] == two["draws_sha256"]
    with pytest.raises(UsageError, match="holds a run"):
        distcl.train(FEW, out=tmp_path / "a")
    gone_on = distcl.train(tmp_path / "a" / "config.toml", out=tmp_path / "a", resume="auto")
    assert gone_on["accuracy"] == summary["accuracy"]


def test_folders_have_numbers_where_none_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.toml").write_text("[stream]\nexperiences = 1\n")
    quick = ["training.epochs=1", "run.report=false"]
    assert distcl.train("mine.toml", overrides=quick)["folder"] == "runs/mine"
    assert distcl.train("mine.toml", overrides=quick)["folder"] == "runs/mine-2"
    assert distcl.train({**FEW, "stream": {"experiences": 1}})["folder"] == "runs/train"
    named = small("run.out=there", "training.epochs=1", "stream.experiences=1")
    assert distcl.train(named)["folder"] == "there"


@pytest.mark.parametrize("command", ["run", "detect"])
def test_run_and_detect_watch_the_stream(command: str, tmp_path: Path) -> None:
    watch = distcl.run if command == "run" else distcl.detect
    summary = watch(small(), tmp_path / "out", overrides=list(SMALL))
    assert summary["status"] == "done"
    assert "drifts" in summary
    assert json.loads((tmp_path / "out" / "status.json").read_text())["command"] == command


def test_replace_is_as_strict_as_a_file() -> None:
    config = small()
    other = config.replace(**{"optimizer.lr": 0.5, "model.options.hidden": [7]})
    assert (other.optimizer.lr, other.model.options["hidden"]) == (0.5, [7])
    assert (config.optimizer.lr, config.model.options["hidden"]) == (0.2, [16])
    assert config.replace() == config
    for values, says in (
        ({"optimizer.lr": -1}, "configuration: optimizer.lr is -1, but must be a number, more"),
        ({"optimizer.lr": "fast"}, "optimizer.lr is 'fast', but must be a number"),
        ({"optimizer.lrr": 1}, "unknown key 'optimizer.lrr', did you mean 'optimizer.lr'"),
        ({"lr": 1}, "unknown section or key 'lr', did you mean 'optimizer.lr'"),
        ({"run.precision": "fp64", "parallel.strategy": "zero1"}, "works with parallel.strategy"),
    ):
        with pytest.raises(ConfigError, match=says):
            config.replace(**values)


def test_a_dict_is_as_strict_as_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    for sections, says in (
        ({"optimizer": {"lr": "fast"}}, "configuration: optimizer.lr is 'fast', but must be"),
        ({"optimizer": {"lrr": 1}}, "unknown key 'optimizer.lrr', did you mean 'optimizer.lr'"),
        ({"optimizer": {3: 1}}, "unknown key 'optimizer.3'"),
        ({"optimizer": 3}, "optimizer must be a section"),
        ({3: 3}, "unknown section or key '3'"),
        ({"continual_learning": {"ewc_step": 1}}, "is now continual_learning.penalty_step"),
    ):
        with pytest.raises(ConfigError, match=says):
            distcl.load_config(sections)  # type: ignore[arg-type]
    monkeypatch.setenv("DISTCL_OPTIMIZER__LR", "0.3")
    config = distcl.load_config({"optimizer": {"lr": 0.1}})
    assert config.optimizer.lr == 0.3
    assert distcl.load_config(config.replace(**{"optimizer.lr": 0.4})).optimizer.lr == 0.4


def test_the_readmes_lines_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    found = re.search(r"<!-- python -->\n```python\n(.*?)```", text, re.DOTALL)
    assert found is not None
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    exec(found[1], {})
    assert (tmp_path / "runs" / "python" / "report.html").exists()


def test_a_configuration_needs_no_torch() -> None:
    look = "import sys, distcl; distcl.Config().replace(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", look], check=True)
    assert {"train", "run", "detect", "Config"} <= set(distcl.__all__)
