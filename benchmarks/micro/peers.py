"""A whole drift job on MNIST against the published loop, written out in benchmarks/.

The job: five tasks under cumulative affine drift, importance on, EWC; the same model, batches,
penalty and transformed images for both; one pass over a task, so that scores have a share of the
time as in the published job. Of fewer images than that has, the Fisher and the held-out images are
fewer as well: 256 of 10,000 images, and a sixth, as in MNIST. Both take both cores by torch's
threads, which is faster here than two processes are. Times are of the job, from the first task to
the last evaluation, imports left out. The limit is the same job's forwards, backwards and steps in
plain torch, on both cores.
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
import tomlkit

from benchmarks.micro import ROOT
from benchmarks.micro.rows import Row, compared, times_faster
from distcl.config import StreamConfig
from distcl.data.sources.arrays import ArraySource
from distcl.data.stream import DriftStream
from distcl.errors import UsageError

MNIST = "DISTCL_MNIST"
"""The environment variable that names mnist.npz: x_train, y_train, x_test, y_test."""
LOOP = ROOT / "benchmarks" / "reference_loop.py"
TASKS, EPOCHS = 5, 1
WHOLE, FISHER = 10_000, 256
"""Images of a task as published, and how many of them EWC's Fisher is of."""
MODELS: dict[str, tuple[dict[str, Any], int]] = {
    "perceptron": ({"name": "mlp", "options": {"hidden": [100, 100]}}, WHOLE),
    "convolutional net": ({"name": "cnn", "options": {"channels": [16, 32, 64]}}, 1_500),
}
"""Name -> (``[model]``, images of a task)."""
WAYS = {"cached": ">= 2.5", "per sample": ">= 4"}
"""How images are transformed -> target."""
JOB: dict[str, dict[str, Any]] = {
    "stream": {"source": "arrays", "experiences": TASKS},
    "optimizer": {"lr": 0.05},
    "training": {"batch_size": 64, "epochs": EPOCHS, "pretrain_epochs": 0},
    "continual_learning": {
        "update_mode": "ewc_online",
        "penalty_step": "explicit",
        "ewc_lambda": 5.0,
        "importance_weighting": True,
    },
    "priority": {"score_batch": 512},
    "run": {"report": False, "poll_steps": 50},
}


def measure(quick: bool) -> list[Row]:
    """Run the jobs (``quick``: one, of 500 images a task). Raises UsageError without MNIST."""
    given = os.environ.get(MNIST, "")
    if not given:
        raise UsageError(f"set {MNIST} to the path of mnist.npz")
    if not Path(given).is_file():
        raise UsageError(f"{MNIST}: there is no file '{given}'")
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for model, (_, samples) in list(MODELS.items())[: 1 if quick else None]:
            samples = 500 if quick else samples
            _write(np.load(given), folder, samples)
            fisher = max(1, FISHER * samples // WHOLE)
            limit = _reference(folder, model, fisher, "--arithmetic")["seconds"]
            for way, target in list(WAYS.items())[: 1 if quick else None]:
                ours, right = _ours(folder, model, fisher, way)
                theirs, others = _theirs(folder, model, fisher, way)
                name, unit = f"drift job, {model}, transforms {way}", "s, of the published loop"
                rows.append(times_faster(name, ours, theirs, unit, target, limit))
                if way == "cached":
                    unit = "accuracy, of the published loop"
                    rows.append(compared(f"{name}: accuracy", right, others, unit))
    return rows


def _write(mnist: Any, folder: Path, samples: int) -> None:
    """Write raw.npz, images before any drift, and tasks.npz, all tasks' one after another."""
    rng = np.random.default_rng(0)
    train = rng.permutation(len(mnist["x_train"]))[:samples]
    test = rng.permutation(len(mnist["x_test"]))[: samples // 6]
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
        raw_y=raw["y"],
        x=np.concatenate([batch.x for batch in trained]),
        y=np.concatenate([batch.y for batch in trained]),
        x_test=np.concatenate([batch.x for batch in tested]),
        y_test=np.concatenate([batch.y for batch in tested]),
    )


def _ours(folder: Path, model: str, fisher: int, way: str) -> tuple[float, float]:
    """Run the job by distcl."""
    own: dict[str, Any] = {"path": str(folder / "raw.npz"), "drift": "affine"}
    if way == "cached":
        own = {"path": str(folder / "tasks.npz"), "drift": "none"}
        own["options"] = {"experiences": "order"}
    learning = {**JOB["continual_learning"], "fisher_samples": fisher}
    job = {**JOB, "model": MODELS[model][0], "stream": {**JOB["stream"], **own}}
    job["continual_learning"] = learning
    config = folder / "job.toml"
    config.write_text(tomlkit.dumps(job), encoding="utf-8")
    command = [sys.executable, "-m", "distcl", "train", "--quiet", str(config)]
    _run([*command, "--out", str(folder / "run"), "--overwrite"])
    summary = json.loads((folder / "run" / "summary.json").read_text())
    return summary["seconds"] - summary["setup_seconds"], summary["average_accuracy"]


def _theirs(folder: Path, model: str, fisher: int, way: str) -> tuple[float, float]:
    more = ["--per-sample"] if way == "per sample" else []
    found = _reference(folder, model, fisher, *more)
    return found["seconds"], found["accuracy"]


def _reference(folder: Path, model: str, fisher: int, *more: str) -> dict[str, float]:
    """Run the published loop."""
    command = [sys.executable, str(LOOP), str(folder / "tasks.npz"), *more]
    command += ["--model", json.dumps(MODELS[model][0]), "--epochs", str(EPOCHS)]
    command += ["--fisher", str(fisher)]
    found: dict[str, float] = json.loads(_run(command))
    return found


def _run(command: list[str]) -> str:
    """Run a command with as many threads as torch likes, and no settings of ours."""
    mine = ("DISTCL_", "OMP_NUM_THREADS")
    environ = {key: value for key, value in os.environ.items() if not key.startswith(mine)}
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UsageError(f"{' '.join(command[:5])} … ended with {done.stderr.strip()[-400:]}")
    return done.stdout
