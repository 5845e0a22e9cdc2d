"""Whole jobs on floating-point targets: R² in the matrix, at one and two ranks the same."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from distcl.errors import DistclError
from tests.small import execute
from tests.forked import distcl
from tests.spawn import run_ranks


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """1,000 samples of 6 features; two values that depend on them, and three labels of 0 or 1."""
    folder = tmp_path_factory.mktemp("regression")
    rng = np.random.default_rng(0)
    z = rng.normal(size=(1000, 6))
    x = z + np.arange(6) / 2  # so that a permutation can be seen in the inputs
    values = np.stack([np.sin(z[:, 0]) + z[:, 1], 3 * z[:, 2]], 1)
    np.savez(folder / "values.npz", x=x, y=values)
    np.savez(folder / "labels.npz", x=x, y=(z[:, :3] > 0).astype("f4"))
    np.savez(folder / "classes.npz", x=x, y=(z[:, 0] > 0).astype("i8"))
    return folder


def _overrides(path: Path, *more: str) -> tuple[str, ...]:
    return (
        "stream.source=arrays",
        f"stream.path={path}",
        "stream.drift=permute",
        "stream.experiences=2",
        "stream.samples_per_experience=0",
        "model.loss=mse",
        "model.options.hidden=[32]",
        "optimizer.name=adam",
        "optimizer.lr=0.01",
        "training.epochs=20",
        "training.pretrain_epochs=20",
        "continual_learning.importance_weighting=false",
        *more,
    )


@pytest.mark.parametrize("mode", ["base", "ewc_online"])
def test_a_regression_trains_and_is_the_same_at_one_and_two_ranks(
    data: Path, mode: str, tmp_path: Path
) -> None:
    overrides = _overrides(
        data / "values.npz",
        "run.precision=fp64",
        "stream.experiences=3",
        "training.epochs=2",
        f"continual_learning.update_mode={mode}",
        "continual_learning.importance_weighting=true",
    )
    alone, pair = (
        run_ranks(world, execute, "train", overrides, tmp_path / str(world))[0] for world in (1, 2)
    )
    assert alone["metric"] == pair["metric"] == "r2"
    np.testing.assert_allclose(pair["accuracy"], alone["accuracy"], rtol=0, atol=1e-9)
    digests = [[r["draws_sha256"] for r in summary["rounds"]] for summary in (alone, pair)]
    assert digests[0] == digests[1] and len(set(digests[0])) == 2
    lines = [json.loads(line) for line in (tmp_path / "1" / "metrics.jsonl").open()]
    logged = [[line[f"r2/{j}"] for j in (1, 2, 3)] for line in lines if "r2/1" in line]
    np.testing.assert_array_equal(logged, alone["accuracy"])
    assert not any(key.startswith("accuracy") for line in lines for key in line)


def test_r2_is_high_where_trained_and_low_where_not(data: Path, tmp_path: Path) -> None:
    for loss in ("mse", "torch.nn:L1Loss"):
        overrides = _overrides(data / "values.npz", f"model.loss={loss}")
        summary = execute("train", overrides, tmp_path / loss)
        matrix = np.array(summary["accuracy"])
        assert summary["metric"] == "r2" and matrix.shape == (2, 2)
        assert (np.diag(matrix) > 0.85).all() and matrix[0, 1] < 0.5 and matrix[1, 0] < 0.5


@pytest.mark.parametrize("metric", ["error", "loss", "input_distance"])
def test_a_stream_of_targets_is_watched(data: Path, metric: str, tmp_path: Path) -> None:
    more = (
        f"monitor.metric={metric}",
        "detector.name=page_hinkley",
        "detector.options.threshold=10.0",
    )
    summary = execute("run", _overrides(data / "values.npz", *more), tmp_path)
    assert summary["metric"] == "r2" and summary["drifts"]
    assert all(drift >= 400 for drift in summary["drifts"])
    assert summary["accuracy"][0][0] > 0.5 and summary["forward_transfer"] is not None


def test_labels_of_0_and_1_are_judged_by_accuracy(data: Path, tmp_path: Path) -> None:
    summary = execute("train", _overrides(data / "labels.npz", "model.loss=bce"), tmp_path)
    assert summary["metric"] == "accuracy"
    assert 0.75 < summary["accuracy"][1][1] <= 1


@pytest.mark.parametrize(
    ("file", "overrides", "code", "message"),
    [
        ("values.npz", ["stream.drift=split"], 2, "stream.drift = 'split' needs class labels"),
        ("values.npz", ["stream.drift=label_shift"], 2, "'label_shift' needs class labels"),
        ("values.npz", ["model.loss=bce", "monitor.metric=entropy"], 2, "'entropy' needs scores"),
        ("values.npz", ["monitor.metric=accuracy"], 2, "'accuracy' needs right and wrong"),
        ("classes.npz", [], 2, "'mse' needs floating-point targets, but the stream has class"),
        ("values.npz", ["optimizer.name=sgd", "optimizer.lr=1e30"], 4, "round 0"),
        (
            "values.npz",
            ["detector.options.delta=2.0"],
            2,
            "detector.options.delta: input should be",
        ),
    ],
)
def test_what_does_not_fit_is_refused_by_name(
    data: Path, file: str, overrides: list[str], code: int, message: str, tmp_path: Path
) -> None:
    with pytest.raises(DistclError) as caught:
        execute("run", (*_overrides(data / file), *overrides), tmp_path)
    assert caught.value.exit_code == code and message in str(caught.value)
    assert json.loads((tmp_path / "status.json").read_text())["exit_code"] == code


def test_a_damaged_file_ends_the_command_with_3_and_one_line(tmp_path: Path) -> None:
    (tmp_path / "train-images-idx3-ubyte").write_bytes(b"\0\0\x08\x01" + bytes(12))
    config = tmp_path / "mnist.toml"
    config.write_text(f'[stream]\nsource = "mnist"\npath = "{tmp_path}"\n')
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(b"\0\0\x08\x01" + bytes(4))
    done = distcl("train", str(config), "--out", str(tmp_path / "out"))
    assert done.returncode == 3, done.stderr
    assert "train-images-idx3-ubyte' has magic number 0x00000801" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
