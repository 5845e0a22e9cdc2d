"""docs/EXTENDING.md is run as it stands: its files are written, its configurations are executed."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from distcl import registry
from distcl.config.load import load_config
from distcl.job import execute

TEXT = (Path(__file__).parents[2] / "docs" / "EXTENDING.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(?:python|toml)\n(# (\S+\.(?:py|toml)).*?\n)```", TEXT, re.DOTALL)
FILES = {name: block for block, name in BLOCKS}
CONFIGS = [name for name in FILES if name.endswith(".toml")]
LAST = re.findall(r"```python\n(from distcl import register.*?)```", TEXT, re.DOTALL)

SMALL = (
    "stream.experiences=2",
    "stream.samples_per_experience=300",
    "model.options.hidden=[16]",
    "optimizer.lr=0.2",
    "training.batch_size=50",
    "training.epochs=2",
    "training.pretrain_epochs=15",
)
WATCHED = (
    "stream.drift=permute",
    "stream.samples_per_experience=600",
    "training.pretrain_epochs=40",
    "monitor.batch_size=50",
)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    for name, content in FILES.items():
        (tmp_path / name).write_text(content, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(registry, "_parts", dict(registry._parts))
    yield tmp_path
    for name in FILES:
        sys.modules.pop(name.removesuffix(".py"), None)


def run(path, *more):
    own = load_config(path)
    sets = [s for s in SMALL if not (s.startswith("model.options") and own.model.name != "mlp")]
    sets = [s for s in sets if not (s.startswith("optimizer.lr") and own.optimizer.own)]
    command = "run" if "(distcl run)" in path.read_text() else "train"
    sets += WATCHED if command == "run" else ()
    return execute(command, load_config(path, [*sets, *more]), path.parent / "out")


def test_the_document_has_a_file_and_a_configuration_of_every_kind():
    shown = {name.removesuffix(".toml").removeprefix("my_") for name in CONFIGS}
    assert {name.removesuffix(".py").removeprefix("my_") for name in FILES} - shown == {
        f"{name}.toml" for name in shown
    }
    # a transform of shards is shown in docs/DATA.md
    assert shown - {"stream"} == set(registry.kinds()) - {"source", "transform"}
    assert len(LAST) == 1


@pytest.mark.parametrize("name", CONFIGS)
def test_a_part_of_ones_own_runs_as_documented(folder, name):
    summary = run(folder / name)
    assert summary["status"] == "done"
    assert summary["accuracy"][-1][0] > 0.3  # it learns; chance is 0.1, or 0.25 for the waves
    if name in ("my_detector.toml", "my_metric.toml"):
        assert summary["drifts"] and 600 <= summary["drifts"][0] < 900
    if name == "my_signal.toml":
        assert summary["rounds"][0]["priority"]["cur"]["ess_fraction"] < 1


def test_a_registered_name_works_as_documented(folder):
    exec(LAST[0], {})
    assert {"invert", "margin"} <= {
        p.name for kind in registry.kinds() for p in registry.parts(kind)
    }
    more = ("stream.drift=invert", "stream.drift_options={}", "priority.signal=margin")
    summary = run(folder / "my_drift.toml", *more, "continual_learning.importance_weighting=true")
    assert summary["rounds"][0]["priority"]["cur"]["n"] == 300


def test_the_line_for_the_table_of_the_registry_has_its_form():
    (line,) = re.findall(r"^ *(\(\"drift\", .*\)),$", TEXT, re.MULTILINE)
    kind, _, target, _ = eval(line)
    assert kind in registry.kinds() and target.split(":")[0] + ".py" in FILES
