"""A folder of shards to which more are added while a run watches it; it waits, so it is slow."""

import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from distcl.data.shards.inputs import ArraySamples
from distcl.data.shards.writer import append_shards, write_shards
from tests.spawn import distcl


def test_a_watched_folder_grows_while_it_is_watched(tmp_path: Path) -> None:
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    x = (x * 15.9).astype(np.uint8).reshape(-1, 8, 8)
    folder, out = tmp_path / "s", tmp_path / "out"
    np.savez(tmp_path / "first.npz", x=x[:600], y=y[:600])
    np.savez(tmp_path / "more.npz", x=255 - x[600:1200], y=(y[600:1200] + 3) % 10)  # a drift
    write_shards(ArraySamples(tmp_path / "first.npz"), folder, per_shard=200)
    config = {
        "stream.source": "shards",
        "stream.path": folder,
        "stream.experiences": 1,
        "stream.options.live_seconds": 8,
        "stream.test_fraction": 0.1,
        "monitor.batch_size": 32,
        "training.epochs": 1,
        "continual_learning.importance_weighting": "false",
    }
    sets = [f"--set={key}={value}" for key, value in config.items()]
    with ThreadPoolExecutor() as pool:
        command = ("run", "configs/digits.toml", *sets, "--quiet", "--out", str(out))
        running = pool.submit(distcl, *command, ranks=2)
        log = out / "metrics.jsonl"
        while not running.done() and not (log.exists() and '"position": 5' in log.read_text()):
            time.sleep(0.2)
        samples = ArraySamples(tmp_path / "more.npz")
        append_shards(samples, folder, per_shard=150, tell=lambda *_: time.sleep(0.5))
        done = running.result()
    assert done.returncode == 0, done.stderr
    summary = json.loads((out / "summary.json").read_text())
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert max(line.get("position", 0) for line in lines) == 540 + 600  # 60 were held out
    assert summary["drifts"] and 540 <= summary["drifts"][0] < 1140
    assert len(summary["rounds"]) >= 1
