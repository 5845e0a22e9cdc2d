"""A whole drift job on MNIST against the published loop, written out in benchmarks/.

The job: five tasks under cumulative affine drift, importance on, EWC; the same model, batches,
epochs, penalty and transformed images for both. The reference takes both cores by torch's threads;
distcl by two processes. Times are of the job, from the first task to the last evaluation, imports
left out; both take turns, each time with another seed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from distcl.bench.rows import Row, compared, times_faster
from distcl.config import StreamConfig
from distcl.data.arrays import ArraySource
from distcl.data.streams import DriftStream
from distcl.errors import UsageError

MNIST = "DISTCL_MNIST"
"""The environment variable that names mnist.npz: x_train, y_train, x_test, y_test."""
LOOP = Path(__file__).parents[2] / "benchmarks" / "reference_loop.py"
TASKS, EPOCHS, TESTS = 5, 3, 1_000
SAME = {
    "model.name": "cnn",
    "model.options": "{channels = [16, 32, 64]}",
    "optimizer.lr": 0.05,
    "training.batch_size": 64,
    "training.epochs": EPOCHS,
    "training.pretrain_epochs": 0,
    "continual_learning.update_mode": "ewc_online",
    "continual_learning.ewc_step": "explicit",
    "continual_learning.ewc_lambda": 5.0,
    "continual_learning.fisher_samples": 256,
    "continual_learning.importance_weighting": "true",
    "priority.score_batch": 512,
    "run.report": "false",
    "run.poll_steps": 50,
    "stream.source": "arrays",
    "stream.experiences": TASKS,
}


def measure(quick: bool) -> list[Row]:
    """Run the job on 4,000 (``quick``: 500) images a task. Raises UsageError without MNIST."""
    given = os.environ.get(MNIST, "")
    if not given:
        raise UsageError(f"set {MNIST} to the path of mnist.npz")
    if not Path(given).is_file():
        raise UsageError(f"{MNIST}: there is no file '{given}'")
    if not LOOP.is_file():
        raise UsageError("benchmarks/reference_loop.py is in the repository only")
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        _write(np.load(given), folder, 500 if quick else 4_000)
        for way in ("cached",) if quick else ("cached", "per sample"):
            turns = [_turn(folder, way, seed) for seed in range(1 if quick else 2)]
            ours, theirs = (
                {key: float(np.median([turn[who][key] for turn in turns])) for key in turns[0][who]}
                for who in ("ours", "theirs")
            )
            target = ">= 2.5" if way == "cached" else ">= 4"
            name, unit = f"drift job, transforms {way}", "s, of the published loop"
            rows.append(times_faster(name, ours["seconds"], theirs["seconds"], unit, target))
            if way == "cached":
                unit = "accuracy, of the published loop"
                pair = ours["accuracy"], theirs["accuracy"]
                rows.append(compared(f"{name}: accuracy", *pair, unit, ">= 0.97"))
    return rows


def _write(mnist: Any, folder: Path, samples: int) -> None:
    """Write raw.npz, images before any drift, and tasks.npz, all tasks' one after another."""
    rng = np.random.default_rng(0)
    train = rng.permutation(len(mnist["x_train"]))[:samples]
    test = rng.permutation(len(mnist["x_test"]))[:TESTS]
    raw = {
        "x": mnist["x_train"][train][:, None].astype(np.float32) / 255,
        "y": mnist["y_train"][train].astype(np.int64),
        "x_test": mnist["x_test"][test][:, None].astype(np.float32) / 255,
        "y_test": mnist["y_test"][test].astype(np.int64),
    }
    np.savez(folder / "raw.npz", **raw)
    config = StreamConfig(drift="affine", experiences=TASKS)
    parts = ArraySource(raw["x"], raw["y"]), ArraySource(raw["x_test"], raw["y_test"])
    stream = DriftStream(*parts, config, seed=0)
    trained = [stream.read(experience.train) for experience in stream.experiences]
    tested = [stream.read(experience.test) for experience in stream.experiences]
    np.savez(
        folder / "tasks.npz",
        count=TASKS,
        raw=raw["x"],
        x=np.concatenate([batch.x for batch in trained]),
        y=np.concatenate([batch.y for batch in trained]),
        x_test=np.concatenate([batch.x for batch in tested]),
        y_test=np.concatenate([batch.y for batch in tested]),
    )


def _turn(folder: Path, way: str, seed: int) -> dict[str, dict[str, float]]:
    return {"ours": _ours(folder, way, seed), "theirs": _theirs(folder, way, seed)}


def _ours(folder: Path, way: str, seed: int) -> dict[str, float]:
    """Run the job by distcl, on two processes."""
    own = {"stream.path": folder / "raw.npz", "stream.drift": "affine"}
    if way == "cached":
        own = {"stream.path": folder / "tasks.npz", "stream.drift": "none"}
        own["stream.options"] = '{experiences = "order"}'
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", "-m", "distcl", "train", "--quiet"]
    config = folder / "job.toml"
    config.write_text("", encoding="utf-8")
    command += [str(config), "--out", str(folder / "run"), "--set", f"run.seed={seed}"]
    for key, value in (SAME | own).items():
        command += ["--set", f"{key}={value}"]
    environ = {key: value for key, value in os.environ.items() if not key.startswith("DISTCL_")}
    _run(command, {**environ, "OMP_NUM_THREADS": "1"})
    summary = json.loads((folder / "run" / "summary.json").read_text())
    return {"seconds": summary["seconds"], "accuracy": summary["average_accuracy"]}


def _theirs(folder: Path, way: str, seed: int) -> dict[str, float]:
    """Run the published loop, in one process with as many threads as torch likes."""
    command = [sys.executable, str(LOOP), str(folder / "tasks.npz"), "--seed", str(seed)]
    command += ["--epochs", str(EPOCHS), *(["--per-sample"] if way == "per sample" else [])]
    environ = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    found: dict[str, float] = json.loads(_run(command, environ))
    return found


def _run(command: list[str], environ: dict[str, str]) -> str:
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UsageError(f"{' '.join(command[:5])} … ended with {done.stderr.strip()[-400:]}")
    return done.stdout
