"""Shards of CIFAR's size from end to end: write, train by either access, kill, resume, compare.

    python benchmarks/shards_cifar.py [--train 50000] [--folder FOLDER] [--json FILE]

Random images in CIFAR-10's binary format become shards by ``distcl shard cifar10``. Then ``distcl
train configs/cifar10.toml``, with a tiny model and one epoch a round, runs by both accesses at 1
and 2 ranks; once undisturbed, and once killed in the middle (SIGKILL to all its processes) and
resumed with ``--resume auto``. It fails unless the draws' digests and the accuracies of both are
equal, and the digests at 1 rank and at 2.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

CONFIG = Path(__file__).parents[1] / "configs" / "cifar10.toml"
KEYS = (
    "stream.experiences=2",
    "stream.samples_per_experience=0",
    "model.name=mlp",
    "model.options={hidden = [16]}",
    "training.batch_size=250",
    "training.epochs=1",
    "training.pretrain_epochs=1",
    "training.eval_batch_size=500",
    "priority.score_batch=500",
    "continual_learning.update_mode=base",
    "continual_learning.importance_weighting=true",
    "checkpoint.every_steps=40",
    "run.poll_steps=10",
)


def write_images(folder: Path, train: int) -> None:
    """Write random images and labels as CIFAR-10's binary files: five for training, one to test."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    sizes = {f"data_batch_{k}.bin": train // 5 for k in range(1, 6)} | {"test_batch.bin": 10_000}
    for name, size in sizes.items():
        records = rng.integers(0, 256, (size, 3073), dtype=np.uint8)
        records[:, 0] = np.arange(size) % 10
        records.tofile(folder / name)


def command(ranks: int, *args: str) -> list[str]:
    if ranks == 1:
        return [sys.executable, "-m", "distcl", *args]
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
    return [sys.executable, *launch, "--master-port", port, "-m", "distcl", *args]


def start(ranks: int, *args: str) -> subprocess.Popen[bytes]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command(ranks, *args), env=environment, start_new_session=True)


def finish(process: subprocess.Popen[bytes]) -> None:
    if process.wait() != 0:
        raise SystemExit(f"{' '.join(map(str, process.args))} ended with {process.returncode}")


def kill(process: subprocess.Popen[bytes]) -> None:
    """Kill a job with all that it has started, at once."""
    tree, listed = {process.pid}, subprocess.check_output(["ps", "-eo", "pid=,ppid="], text=True)
    pairs = [tuple(map(int, line.split())) for line in listed.splitlines()]
    for pid, parent in sorted(pairs):
        if parent in tree:
            tree.add(pid)
    for pid in sorted(tree):
        os.kill(pid, signal.SIGKILL)
    process.wait()


def essence(out: Path) -> tuple[Any, Any]:
    """Return what must be equal: digests, accuracies."""
    summary = json.loads((out / "summary.json").read_text())
    digests = [r["draws_sha256"] for r in (summary["pretrain"], *summary["rounds"])]
    return digests, summary["accuracy"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train", type=int, default=50_000)
    parser.add_argument("--folder", type=Path, help="where to work; kept afterwards")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    root = options.folder or Path(tempfile.mkdtemp())
    results: dict[str, Any] = {}
    write_images(root / "binary", options.train)
    begun = time.perf_counter()
    path = f"stream.path={root / 'binary'}"
    shard = ["shard", "cifar10", str(root / "shards"), "--workers", "2", "--per-shard", "2500"]
    finish(start(1, *shard, "--set", path, "--quiet"))
    results["shard_seconds"] = time.perf_counter() - begun
    print(f"shards: {results['shard_seconds']:.1f} s", flush=True)
    sets = [f"--set={key}" for key in (*KEYS, f"stream.path={root / 'shards'}")]
    digests: dict[str, set[str]] = {}
    for access in ("indexed", "stream"):
        for ranks in (1, 2):
            name = f"{access}, {ranks} rank{'s' * (ranks > 1)}"
            train = ["train", str(CONFIG), *sets, f"--set=data.access={access}", "--quiet"]
            whole, parts = root / f"{access}-{ranks}-whole", root / f"{access}-{ranks}-parts"
            begun = time.perf_counter()
            finish(start(ranks, *train, "--out", str(whole)))
            seconds = time.perf_counter() - begun
            process = start(ranks, *train, "--out", str(parts))
            steps = options.train // 250
            late = [f"step-{step:08d}" for step in range(steps + 40, 2 * steps, 40)]  # in round 1
            while not any((parts / "checkpoints" / step).exists() for step in late):
                if process.poll() is not None:
                    raise SystemExit(f"{name}: it ended before it could be killed")
                time.sleep(0.05)
            kill(process)
            finish(start(ranks, *train, "--out", str(parts), "--resume", "auto"))
            if essence(whole) != essence(parts):
                raise SystemExit(f"{name}: the resumed run differs from the undisturbed one")
            digests.setdefault(access, set()).add(json.dumps(essence(whole)[0]))
            results[name] = seconds
            print(f"{name}: {seconds:.1f} s; killed and resumed: the same", flush=True)
        if len(digests[access]) > 1:
            raise SystemExit(f"{access}: the draws depend on the number of ranks")
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    if options.folder is None:
        shutil.rmtree(root)


if __name__ == "__main__":
    main()
