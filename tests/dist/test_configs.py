"""Every file in configs/ runs: through its own command, on few samples, one pass a round.

A new config is enrolled by being there. One whose source reads files needs a maker of such files in
``tests.config_files.FILES``; one for another strategy than ddp, or for several processes, runs on two real ranks.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from distcl import registry
from distcl.config import Config
from distcl.config.load import load_config
from distcl.job import execute
from tests.config_files import CONFIGS, command_of, small_sets
from tests.draws import outcome, recorded
from tests.forked import distcl
from tests.spawn import run_ranks


def _one_process(config: Config) -> bool:
    return config.parallel.strategy == "ddp" and config.parallel.processes < 2


def test_every_method_stands_in_a_config() -> None:
    configs = [load_config(path) for path in CONFIGS]
    shown = {
        "updater": {c.continual_learning.update_mode for c in configs},
        "signal": {c.priority.signal for c in configs if c.continual_learning.importance_weighting},
        "detector": {c.detector.name for c in configs},
        "drift": {name for c in configs for name in c.stream.drifts},
        # as cifar10, and as jsonl, but for where they are
        "source": {c.stream.source for c in configs} | {"cifar100", "hf_text"},
    }
    for kind, names in shown.items():
        assert names == {part.name for part in registry.parts(kind)}, kind


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """What is recorded was computed so: sums depend on the number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


outcomes: dict[Path, dict[str, object]] = {}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_shipped_config_runs_and_nothing_warns(
    path: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    recwarn: pytest.WarningsRecorder,
) -> None:
    command = command_of(path)
    sets = small_sets(path, tmp_path)
    strategy = load_config(path, sets).parallel.strategy
    if strategy.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed; type: pip install 'distcl[deepspeed]'")
    if not _one_process(load_config(path, sets)):
        arguments = [word for text in sets for word in ("--set", text)]
        done = distcl(command, str(path), "--out", str(tmp_path / "out"), *arguments, ranks=2)
        assert done.returncode == 0, done.stderr
        assert not done.stderr, done.stderr
        outcomes[path] = outcome(tmp_path / "out")
        return
    config = load_config(path, sets)
    capfd.readouterr()
    summary = execute(command, config, tmp_path / "out")
    outcomes[path] = outcome(tmp_path / "out")
    assert not capfd.readouterr().err
    assert not [str(w.message) for w in recwarn]
    assert summary["status"] == "done"
    assert all(math.isfinite(a) for row in summary["accuracy"] for a in row if a is not None)
    if command == "train":
        first = bool(config.training.pretrain_epochs and not config.model.pretrained)
        number = config.stream.stated or len(summary["accuracy"][0])
        assert len(summary["rounds"]) + first == number


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_it_draws_and_learns_what_it_did(
    path: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    recwarn: pytest.WarningsRecorder,
) -> None:
    if path not in outcomes:  # this test alone was asked for
        test_a_shipped_config_runs_and_nothing_warns(path, tmp_path, capfd, recwarn)
    alone = _one_process(load_config(path))
    expected, found = recorded(path, 1 if alone else 2), outcomes[path]
    assert found["draws"] == expected["draws"]
    if alone:
        assert found["weights"] == expected["weights"]


def _execute(command: str, path: Path, sets: list[str], out: Path) -> str:
    return str(execute(command, load_config(path, sets), out)["status"])


@pytest.mark.parametrize("name", ["lm", "lora"])
def test_two_ranks_draw_the_texts_that_one_does(name: str, tmp_path: Path) -> None:
    path = next(path for path in CONFIGS if path.stem == name)
    sets = small_sets(path, tmp_path)
    assert run_ranks(2, _execute, "train", path, sets, tmp_path / "out") == ["done"] * 2
    assert outcome(tmp_path / "out")["draws"] == recorded(path, 1)["draws"]
