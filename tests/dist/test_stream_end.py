"""``distcl run`` tells what the stream was, also where the model was never trained on it."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from distcl.cli.display import show_summary
from distcl.data.stream import create_stream
from distcl.reporting.page import write_report
from tests.small import execute, small
from tests.spawn import run_ranks

KEYS = (
    "stream.experiences=4",
    "training.pretrain_epochs=60",
    "monitor.window=211",
    "monitor.batch_size=50",
    "run.precision=fp64",
    "priority.correction=0.5",
)
NEVER = "detector.options={delta=1e-12, min_window_length=100000}"
ONCE = ("detector.options={delta=0.002}", "monitor.max_rounds=1")


def _run(command: str, keys: tuple[str, ...], out: Path) -> dict[str, Any]:
    return execute(command, keys, out)


def _right(out: Path, keys: tuple[str, ...], ids: Any) -> float:
    """The share that the final weights get right, by a small dense model."""
    config = small(*keys)
    stream = create_stream(config.stream, config.run.seed, config.data)
    state = load_file(out / "checkpoints" / "final.safetensors")
    weights = [state[name].double() for name in state if name.endswith("weight")]
    biases = [state[name].double() for name in state if name.endswith("bias")]
    batch = stream.read(np.asarray(ids))
    x = batch.x.double().flatten(1)
    hidden = torch.relu(x @ weights[0].T + biases[0])
    logits = hidden @ weights[1].T + biases[1]
    return float((logits.argmax(1) == batch.y).double().mean())


@pytest.mark.parametrize(
    ("command", "world", "more", "trained"),
    [("run", 3, (NEVER,), 1), ("detect", 1, (NEVER,), 1), ("run", 1, ONCE, 2)],
)
def test_what_was_never_trained_on_has_columns_and_the_end_of_the_stream_a_figure(
    command: str, world: int, more: tuple[str, ...], trained: int, tmp_path: Path
) -> None:
    keys, out = (*KEYS, *more), tmp_path / "out"
    summary = run_ranks(world, _run, command, keys, out)[0]
    config = small(*keys)
    experiences = create_stream(config.stream, config.run.seed, config.data).experiences
    columns = summary["experiences"]
    left = [c["name"] for c in columns if not c["trained"]]
    assert [c["trained"] for c in columns] == [True] * trained + [False] * len(left)
    assert left == [e.name for e in experiences[-len(left) :]] and len(left) >= 2
    last = summary["accuracy"][-1]
    assert len(last) == len(columns)
    for value, one in zip(last[trained:], experiences[-len(left) :], strict=True):
        assert value == pytest.approx(_right(out, keys, one.test), abs=1e-9)
    assert summary["average_accuracy"] == pytest.approx(np.mean(last[:trained]))
    assert summary["worst_experience_accuracy"] == min(last[:trained])
    end = summary["stream_end"]
    if trained == 1:
        assert end["samples"] == 211
        newest = np.concatenate([e.train for e in experiences])[-211:]
        assert end["accuracy"] == pytest.approx(_right(out, keys, newest), abs=1e-9)
        assert end["accuracy"] + 0.2 < summary["average_accuracy"]  # else this shows nothing

    assert json.loads((out / "summary.json").read_text()) == summary
    shown = io.StringIO()
    show_summary(Console(file=shown, width=100), summary)
    error = f"{100 * (1 - end['accuracy']):.1f} % of the stream's last {end['samples']} samples"
    assert re.search(rf"^error at the end +{re.escape(error)}", shown.getvalue(), re.MULTILINE)
    assert f"{trained + 1}*" in shown.getvalue() and "* never trained on" in shown.getvalue()
    write_report([out], tmp_path / "r.html")
    page = (tmp_path / "r.html").read_text()
    assert "error at the end" in page and "*: never trained on" in page
    assert f">{trained + 1}*<" in page


def test_without_any_round_there_is_a_row_all_the_same(tmp_path: Path) -> None:
    keys = (*KEYS, NEVER, "training.pretrain_epochs=0")
    summary = execute("run", keys, tmp_path)
    assert [c["trained"] for c in summary["experiences"]] == [False] * 4
    assert len(summary["accuracy"]) == 1 and summary["average_accuracy"] is None
    assert summary["stream_end"]["samples"] == 211
