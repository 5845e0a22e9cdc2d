"""What a run's weights say of held-out samples: the same file at any number of ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from distcl import load_config
from distcl.checkpoint.export import export
from distcl.checkpoint.predictions import What, _watched_inputs, write_predictions
from distcl.data.stream import create_stream
from distcl.errors import CheckpointError, ConfigError, DataError, UsageError
from distcl.job import execute as run_job
from tests.dist import test_tokens as texts
from tests.small import execute, small
from tests.spawn import distcl, preload, run_ranks

preload(__name__)

JOB = (
    f"model.name={__name__}:net",
    "model.options={}",
    "stream.experiences=2",
    "stream.samples_per_experience=300",
    "training.eval_batch_size=50",  # 8 chunks an experience, the last one of 9
    "checkpoint.every_steps=5",
    "continual_learning.importance_weighting=false",
)


def net(spec: Any) -> nn.Module:
    """A network whose buffers no sum over ranks may move."""
    layers = nn.Flatten(), nn.Linear(64, 17), nn.BatchNorm1d(17), nn.ReLU(), nn.Linear(17, 10)
    return nn.Sequential(*layers)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("predict") / "run"
    execute("train", JOB, folder)
    return folder


class Adapted(nn.Module):
    """Its head is called by keyword, and its adapter comes last."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 3)
        self.add_module("head_", nn.ModuleDict({"lora_A": nn.Linear(4, 2)}))

    def forward(self, x: torch.Tensor) -> Any:
        return self.head(input=x), self.get_submodule("head_.lora_A")(x + 1)


def test_an_embedding_is_not_the_adapters() -> None:
    module, x = Adapted(), torch.ones(2, 4)
    seen = _watched_inputs(module)
    module(x)
    assert len(seen) == 1
    assert torch.equal(seen[0], x)


def predicted(run: Path, out: Path, what: What = "logits", data: Any = None) -> dict[str, Any]:
    write_predictions(run, out, what, data)
    with np.load(out) as arrays:
        return dict(arrays)


def test_the_file_has_what_the_exported_weights_say_one_by_one(run: Path, tmp_path: Path) -> None:
    model = net(None).eval()
    model.load_state_dict(load_file(export(run, tmp_path / "export")[0]))
    config = small(*JOB)
    stream = create_stream(config.stream, config.run.seed)
    found = {w: predicted(run, tmp_path / f"{w}.npz", w) for w in ("logits", "probs", "labels")}
    ids = np.concatenate([e.test for e in stream.experiences])
    batch = stream.read(ids)
    with torch.no_grad():
        logits = model(batch.x)
    for arrays in found.values():
        assert set(arrays) == {"ids", "experience", "outputs", "y"}
        assert arrays["ids"].dtype == np.int64
        np.testing.assert_array_equal(arrays["ids"], ids)
        np.testing.assert_array_equal(arrays["y"], batch.y.numpy())
        np.testing.assert_array_equal(arrays["experience"], np.repeat([1, 2], len(ids) // 2))
    np.testing.assert_allclose(found["logits"]["outputs"], logits, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found["probs"]["outputs"], logits.softmax(1), rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(found["labels"]["outputs"], logits.argmax(1))


@pytest.mark.parametrize("size", [50, 400])  # chunks that three ranks share unevenly; a single one
def test_three_ranks_write_the_bytes_of_one(run: Path, size: int, tmp_path: Path) -> None:
    given = run / "config.toml"
    text = given.read_text()
    given.write_text(text.replace("eval_batch_size = 50", f"eval_batch_size = {size}"))
    try:
        for world in (1, 3):
            results = run_ranks(world, write_predictions, run, tmp_path / f"{world}.npz")
            assert {rows for rows, _ in results} == {718}
    finally:
        given.write_text(text)
    assert (tmp_path / "1.npz").read_bytes() == (tmp_path / "3.npz").read_bytes()


def test_a_damaged_checkpoint_is_passed_over(run: Path, tmp_path: Path) -> None:
    whole = predicted(run, tmp_path / "whole.npz")
    final = run / "checkpoints" / "final.safetensors"
    data, told = final.read_bytes(), list[str]()
    newest = sorted((run / "checkpoints").glob("step-*"))[-1] / "model.safetensors"
    kept = newest.read_bytes()
    try:
        final.write_bytes(data[: len(data) // 2])
        rows, weights = write_predictions(run, tmp_path / "newest.npz", warn=told.append)
        assert (rows, weights) == (len(whole["ids"]), newest)
        newest.write_bytes(kept[: len(kept) // 2])
        assert write_predictions(run, tmp_path / "older.npz", warn=told.append)[1] != newest
    finally:
        final.write_bytes(data)
        newest.write_bytes(kept)
    assert "falling back to the newest checkpoint" in told[0]


def test_other_data_than_the_runs_have_its_classes(run: Path, tmp_path: Path) -> None:
    """A few samples of other labels: the model keeps its 10 outputs."""
    x = np.random.default_rng(0).random((40, 1, 8, 8), np.float32)
    np.savez(tmp_path / "few.npz", x=x, y=np.arange(40) % 12, x_test=x[:7], y_test=np.full(7, 11))
    out = tmp_path / "out.npz"
    options = "--data", "arrays", "--set", f"stream.path={tmp_path / 'few.npz'}"
    done = distcl("predict", str(run), "--out", str(out), *options, ranks=3)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{out}: logits of 7 samples, by {run}/checkpoints/final.safetensors\n"
    model = net(None).eval()
    model.load_state_dict(load_file(run / "checkpoints" / "final.safetensors"))
    with np.load(out) as arrays, torch.no_grad():
        logits = model(torch.from_numpy(x[:7]))
        np.testing.assert_allclose(arrays["outputs"], logits, rtol=1e-5, atol=1e-5)
        assert arrays["y"].tolist() == [11] * 7
    again = distcl("predict", str(run), "--out", str(out), *options)
    assert (again.returncode, again.stdout) == (2, "")
    assert again.stderr == f"distcl: '{out}' exists; give another file\n"


@pytest.mark.parametrize(
    ("options", "code", "says"),
    [
        (("--out", "x.npy"), 2, "'x.npy' must end in .npz or .parquet"),
        (("--out", "no/x.npz"), 2, "there is no folder 'no' to write 'x.npz' in"),
        (("--out", "x.npz", "--set", "stream.path=a"), 2, "--set describes --data SOURCE"),
        (("--out", "x.npz", "--data", "some.npz"), 2, "an .npz is --data arrays --set"),
        (("--out", "x.npz", "--what", "odds"), 2, "'odds' is not one of"),
        ((), 2, "Missing option '--out'"),
    ],
)
def test_what_is_asked_for_wrongly_is_told(
    run: Path, options: tuple[str, ...], code: int, says: str
) -> None:
    done = distcl("predict", str(run), *options)
    assert done.returncode == code
    assert says in done.stderr
    assert "Traceback" not in done.stderr


def test_what_has_no_run_or_no_such_outputs_is_told(run: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is neither a run folder"):
        write_predictions(tmp_path, tmp_path / "x.npz")
    x = np.random.default_rng(0).normal(size=(60, 6))
    np.savez(tmp_path / "values.npz", x=x, y=x[:, :2])
    path = f"stream.path={tmp_path / 'values.npz'}"
    keys = "stream.source=arrays", path, "stream.drift=none", "stream.samples_per_experience=0"
    execute("train", (*keys, "model.loss=mse", "training.epochs=1"), tmp_path / "values")
    for what in ("probs", "labels"):
        with pytest.raises(ConfigError, match=f"there are no {what} in regression"):
            write_predictions(tmp_path / "values", tmp_path / "x.npz", what)
    assert predicted(tmp_path / "values", tmp_path / "v.npz")["outputs"].shape == (36, 2)
    other = load_config(None, [*keys, "stream.experiences=1"], environ={}).stream
    with pytest.raises(DataError, match=r"--data have shape \[6\], but .* on \[1, 8, 8\]"):
        write_predictions(run, tmp_path / "x.npz", data=other)
    with pytest.raises(UsageError, match="exists"):
        write_predictions(run, tmp_path / "v.npz")
    assert not (tmp_path / "x.npz").exists()


def test_outputs_of_unequal_shapes_are_told_and_not_waited_for(tmp_path: Path) -> None:
    path = texts.write(tmp_path / "texts.jsonl")
    run_job("train", texts.config(path, "training.eval_batch_size=4"), tmp_path / "run")
    done = distcl("predict", str(tmp_path / "run"), "--out", str(tmp_path / "x.npz"), ranks=3)
    assert done.returncode != 0
    assert "outputs of samples have unequal shapes, [" in done.stderr
    assert "cut texts to one length" in done.stderr
    assert not (tmp_path / "x.npz").exists()
