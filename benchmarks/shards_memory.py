"""How much memory a sample in shards costs: peak RSS of each rank at two sizes of the same data.

    python benchmarks/shards_memory.py [--ranks 1 2] [--samples 1000000 4000000] [--json FILE]

Small samples in 100 shards, drawn by weight for some steps. ``draws``: source, weights and a
sampler's pass, which is what grows with the data by design; ``train``: a whole ``distcl train``
round with scoring. Slopes are bytes a sample between the two sizes, on the rank that grows most.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import shutil
import socket
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

SHARDS = 100
STEPS = 50
BATCH = 64


def make(folder: Path, samples: int) -> None:
    """Write 100 shards, which are one file by many names."""
    from distcl.data.shards.inputs import ArraySamples
    from distcl.data.shards.manifest import read_shards, write_manifest
    from distcl.data.shards.writer import write_shards

    each = samples // SHARDS
    npz = folder / "one.npz"
    x, y = np.zeros((each, 4), np.float32), np.arange(each) % 3
    np.savez(npz, x=x, y=y, x_test=x[:100], y_test=y[:100])
    write_shards(ArraySamples(npz), folder / "shards", per_shard=each)
    manifest = read_shards(folder / "shards")
    first = manifest.split("train")[0]
    listed = [first]
    for s in range(1, SHARDS):
        name = f"train-{s:06d}"
        for end in (".tar", ".index.npy"):
            os.link(folder / "shards" / f"train-000000{end}", folder / "shards" / f"{name}{end}")
        listed.append(replace(first, name=f"{name}.tar", first_id=s * each))
    shards = [*listed, *manifest.split("test")]
    write_manifest(folder / "shards", replace(manifest, shards=shards))


def draws(folder: Path, access: str) -> None:
    """Weights, one pass's draws, and reading some of its batches."""
    from distcl.config import DataConfig
    from distcl.data.ids import IdRuns, joined_ids
    from distcl.data.shards.indexed import ShardSource
    from distcl.data.shards.manifest import read_shards
    from distcl.data.shards.sequential import StreamedSource
    from distcl.distributed.runtime import Runtime
    from distcl.priority.population import Dealer
    from distcl.sampling.groups import Part
    from distcl.sampling.sampler import DistributedWeightedSampler
    from distcl.sampling.sequential import LaneSampler
    from distcl.types import Ids

    runtime, data = Runtime(), DataConfig(access=access)
    manifest = read_shards(folder)
    shards = manifest.split("train")
    rng = np.random.default_rng(runtime.rank)
    if access == "indexed":
        source = ShardSource(folder, shards, data)
        plan: Any = DistributedWeightedSampler(
            BATCH, rank=runtime.rank, world_size=runtime.world_size
        )
        plan.set_weights(len(source), np.random.default_rng(0).random(len(source)))
    else:
        source = StreamedSource(folder, shards, data, manifest.label, "", "streamed")

        def lanes_of(ids: Ids, lanes: int) -> Ids:
            shard, number = source.shards_of(ids)
            return shard * lanes // number

        every = joined_ids([IdRuns([0], [len(source)])])
        slices = Dealer.over(runtime, 8, lanes_of).deal(every)
        plan = LaneSampler(BATCH, window=1024)
        plan.set_groups([Part(slices.ids, rng.random(len(slices.ids)), slices, draws=len(source))])
    for step, ids in zip(range(STEPS), plan, strict=False):
        del step
        source.read(np.array(ids, dtype=np.int64))
    runtime.close()


def train(folder: Path, access: str) -> None:
    """One weighted round of a small model, by ``distcl train``."""
    from distcl.config.load import load_config
    from distcl.job import execute

    keys = [
        "stream.source=shards",
        f"stream.path={folder}",
        "stream.experiences=1",
        "stream.drift=none",
        f"data.access={access}",
        "model.options.hidden=[4]",
        f"training.batch_size={BATCH}",
        f"training.steps_per_round={STEPS}",
        "training.pretrain_epochs=0",
        "training.eval_batch_size=512",
        "continual_learning.importance_weighting=true",
        "checkpoint.every_round=false",
        "run.report=false",
    ]
    out = folder.parent / f"out-{access}"
    execute("train", load_config(None, keys, environ={}), out)


def child(
    what: str, folder: Path, access: str, rank: int, world: int, port: int, queue: Any
) -> None:
    """Do it as one rank, and tell the peak RSS in bytes."""
    import torch

    torch.set_num_threads(1)
    if world > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    {"draws": draws, "train": train}[what](folder, access)
    queue.put(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def peak(what: str, folder: Path, access: str, world: int) -> int:
    """Return the peak RSS of the rank that has the highest."""
    context = multiprocessing.get_context("spawn")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    queue = context.Queue()
    ranks = [
        context.Process(target=child, args=(what, folder, access, r, world, port, queue))
        for r in range(world)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    return max(queue.get(timeout=5) for _ in ranks)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, nargs=2, default=[1_000_000, 4_000_000])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--what", nargs="+", default=["draws", "train"])
    parser.add_argument("--access", nargs="+", default=["indexed", "stream"])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    root = Path(tempfile.mkdtemp())
    found: dict[str, float] = {}
    try:
        for samples in options.samples:
            (root / str(samples)).mkdir()
            make(root / str(samples), samples)
        few, many = options.samples
        for what in options.what:
            for access in options.access:
                for world in options.ranks:
                    low, high = (
                        peak(what, root / str(n) / "shards", access, world) for n in (few, many)
                    )
                    name = f"{what}, {access}, {world} rank{'s' * (world > 1)}"
                    found[name] = (high - low) / (many - few)
                    print(
                        f"{name:<28} {low / 2**20:8.0f} MiB {high / 2**20:8.0f} MiB "
                        f"{found[name]:8.1f} bytes a sample",
                        flush=True,
                    )
    finally:
        shutil.rmtree(root)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
