"""A run folder, opened: what it says, its model, and what that says of samples."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import Subset, TensorDataset

import distcl
from distcl.checkpoint.predictions import write_predictions
from distcl.errors import CheckpointError, ConfigError, DataError, UsageError
from tests.dist.test_objects import CONFIG, Net, Points, net, pairs
from tests.spawn import preload, run_ranks

preload(__name__)

DOC = Path(__file__).parents[2] / "docs" / "EXTENDING.md"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("open") / "run"
    distcl.train(CONFIG, folder, model=net(), stream=pairs())
    return folder


def test_what_a_run_says(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = distcl.open_run(str(run))
    assert opened.summary["status"] == "done"
    assert opened.config.training.batch_size == 16
    assert str(opened).endswith("run', done)")
    values, rows, columns = opened.matrix
    assert values.shape == (3, 3)
    np.testing.assert_array_equal(values, opened.summary["accuracy"])
    assert rows == ["pretrained", "round 1", "round 2"]
    assert columns == ["experience 1", "experience 2", "experience 3"]
    monkeypatch.setitem(sys.modules, "pandas", None)
    lines = opened.metrics()
    assert lines[-1]["round"] == 2
    assert opened.plot().get_axes()
    with pytest.raises(UsageError, match="has no plot 'acc'; it has accuracy, forgetting, confusion"):
        opened.plot("acc")
    assert opened.report() == run / "report.html"
    assert (run / "report.html").is_file()
    with pytest.raises(CheckpointError, match="neither a run folder"):
        distcl.open_run(run.parent)


def test_a_run_that_goes_on_is_read_again(tmp_path: Path) -> None:
    status = tmp_path / "status.json"
    (tmp_path / "config.toml").touch()
    status.write_text('{"state": "running"}')
    opened = distcl.open_run(tmp_path)
    with pytest.raises(UsageError, match="has no plot 'accuracy'; it has none yet"):
        opened.plot()
    status.write_text('{"state": "done"}')
    assert repr(opened).endswith(", done)")


def test_metrics_are_a_frame_where_pandas_is(run: Path) -> None:
    pandas = pytest.importorskip("pandas")
    frame = distcl.open_run(run).metrics()
    assert isinstance(frame, pandas.DataFrame)
    assert frame["round"].iloc[-1] == 2


def test_a_model_is_loaded_with_its_weights(run: Path) -> None:
    given = net()
    loaded = distcl.open_run(run, model=given).load_model()
    assert isinstance(loaded, Net)
    assert not loaded.training
    assert not torch.equal(loaded.head.weight, given.head.weight)
    with pytest.raises(ConfigError, match=r"Net' was given as an object, .* as model=…"):
        distcl.open_run(run, stream=pairs()).load_model()
    with pytest.raises(CheckpointError, match="head"):
        distcl.open_run(run, model=nn.Linear(6, 3)).load_model()


def predicted(run: Path, out: Path) -> Any:
    opened = distcl.open_run(run, model=net(), stream=pairs())
    return opened.predict(Points(29, 1), "probs", out)


def test_predictions_are_those_of_the_model_at_any_number_of_ranks(
    run: Path, tmp_path: Path
) -> None:
    model, data = distcl.open_run(run, model=net()).load_model(), Points(29, 1)
    with torch.no_grad():
        probs = model(data.x).softmax(1).numpy()
    for world in (1, 3):
        found = run_ranks(world, predicted, run, tmp_path / f"{world}.npz")
        np.testing.assert_allclose(found[0]["outputs"], probs, atol=1e-6)
        assert set(found[0]) == {"ids", "experience", "outputs", "y"}
        assert set(found[0]["experience"].tolist()) == {1}
        np.testing.assert_array_equal(found[0]["y"], data.y)
        assert all(set(one) == {"ids"} for one in found[1:])
    assert (tmp_path / "1.npz").read_bytes() == (tmp_path / "3.npz").read_bytes()
    opened = distcl.open_run(run, model=net(), stream=pairs())
    for bare in (data.x, data.x.numpy()):
        arrays = opened.predict(bare, "labels")
        assert set(arrays) == {"ids", "experience", "outputs"}
        np.testing.assert_array_equal(arrays["outputs"], probs.argmax(1))
    inside = opened.predict(data, "embedding")["outputs"]
    with torch.no_grad():
        np.testing.assert_allclose(inside, model.get_submodule("body")(data.x), atol=1e-6)
    held_out = opened.predict()
    assert held_out["experience"].tolist() == [1] * 11 + [2] * 20 + [3] * 8
    with pytest.raises(DataError, match=r"have shape \[5\], but .* on \[6\]"):
        opened.predict(torch.ones(3, 5))
    with pytest.raises(DataError, match="neither a Source nor a map-style dataset"):
        opened.predict(3)
    with pytest.raises(UsageError, match="exists; give another file"):
        opened.predict(data, out=tmp_path / "1.npz")
    with pytest.raises(UsageError, match="what = 'prob', did you mean 'probs'"):
        opened.predict(data, "prob")  # type: ignore[arg-type]
    split = [tuple(Subset(one, range(len(one))) for one in pair) for pair in pairs()]
    with pytest.raises(DataError, match=r"have shape \[5\], but .* on \[6\]"):  # the run's own
        distcl.open_run(run, model=net(), stream=split).predict(torch.ones(3, 5))
    checkpoint = sorted((run / "checkpoints").glob("step-*"))[-1]
    newest = distcl.open_run(checkpoint, model=net(), stream=pairs())
    assert repr(newest).endswith(", checkpoint)")
    np.testing.assert_array_equal(newest.predict(data, "probs")["outputs"], found[0]["outputs"])


def test_a_parquet_file_has_the_same(run: Path, tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    opened = distcl.open_run(run, model=net(), stream=pairs())
    arrays = opened.predict(Points(29, 1), out=tmp_path / "x.parquet")
    table = parquet.read_table(tmp_path / "x.parquet")
    assert table.column_names == ["ids", "outputs", "y", "experience"]
    for name, values in arrays.items():
        np.testing.assert_array_equal(np.array(table[name].to_pylist(), values.dtype), values)


def test_a_run_of_names_needs_no_objects(tmp_path: Path) -> None:
    few = {
        "stream": {"experiences": 2, "samples_per_experience": 100},
        "training": {"epochs": 1},
        "run": {"report": False, "precision": "fp64"},
    }
    distcl.train(few, tmp_path / "run")
    opened = distcl.open_run(tmp_path / "run")
    assert opened.load_model()(torch.zeros(2, 1, 8, 8).double()).shape == (2, 10)
    assert write_predictions(tmp_path / "run", tmp_path / "x.npz")[0] == len(opened.predict()["y"])


def test_several_labels_of_bare_samples(tmp_path: Path) -> None:
    x = torch.randn(24, 2, 5)
    data, model = TensorDataset(x, (x[:, 0] > 0).long()), nn.Conv1d(2, 3, 1)
    quick = {"training": {"epochs": 1}, "run": {"report": False}}
    distcl.train(quick, tmp_path / "run", model=model, stream=[(data, data)])
    opened = distcl.open_run(tmp_path / "run", model=model, stream=[(data, data)])
    labels = opened.predict(x, "labels")["outputs"]
    assert labels.shape == (24, 5)
    np.testing.assert_array_equal(labels, opened.predict(data, "labels")["outputs"])


def test_the_documents_example_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (code,) = re.findall(r"```python\n(import torch.*?open_run.*?)```", DOC.read_text(), re.DOTALL)
    assert len([line for line in code.splitlines() if line]) <= 15
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    exec(code, {"__name__": "notebook"})  # a cell: no file, and no __main__ to go by
    accuracy, shape = capsys.readouterr().out.split(maxsplit=1)
    assert float(accuracy) > 0.6
    assert shape == "(10, 2)\n"
