"""How fast shards are read: the tar itself, the webdataset library, and distcl, side by side.

    python benchmarks/shards.py [--samples 20000] [--json FILE]

All in one run over the same shards of CIFAR-shaped images (uint8 [3, 32, 32]), the page cache warm.
Rates are samples per second of wall time, each the best of ``--repeats`` passes:

- ``raw``: the members' bytes; ``npy``: decoded arrays in batches; ``png``: decoded images.
- ``weighted``: half of the mass lies on a tenth of the samples. The library has no weights: its
  *useful* rate is that of rejection sampling, by which it keeps one sample in five.
"""

from __future__ import annotations

import argparse
import io
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset
from PIL import Image

from distcl.config import DataConfig, StreamConfig
from distcl.data.decode import decode
from distcl.data.index import read_manifest
from distcl.data.loader import BatchLoader
from distcl.data.opening import shards
from distcl.data.streaming import open_url, stream_samples
from distcl.data.streams import create_stream
from distcl.data.writing import Members, write_shards
from distcl.priority.lanes import LaneGroup, LaneSampler
from distcl.priority.sampler import DistributedWeightedSampler
from distcl.priority.slices import Dealer

BATCH = 256
SHARDS = 10


class Images:
    """Random images as samples: of members npy or png, and cls."""

    label = "cls"

    def __init__(self, samples: int, ext: str) -> None:
        self.sizes = {"train": samples, "test": SHARDS}
        self._ext = ext

    def describe(self) -> dict[str, Any]:
        """Return what tells these samples from others."""
        return {"ext": self._ext, **self.sizes}

    def read(self, split: str, begin: int, end: int) -> Iterator[Members]:
        """Yield the members of samples ``begin`` to ``end``."""
        for row in range(begin, end):
            pixels = np.random.default_rng(row).integers(0, 256, (3, 32, 32)).astype(np.uint8)
            out = io.BytesIO()
            if self._ext == "npy":
                np.save(out, pixels)
            else:
                Image.fromarray(np.moveaxis(pixels, 0, -1)).save(out, "png")
            yield {self._ext: out.getvalue(), "cls": b"%d" % (row % 10)}


def rate(run: Callable[[], int], repeats: int) -> float:
    best = 0.0
    for _ in range(repeats):
        begun = time.perf_counter()
        count = run()
        best = max(best, count / (time.perf_counter() - begun))
    return best


def skewed(n: int) -> np.ndarray:
    """Weights [n], half of whose sum lies on a tenth."""
    weights = np.full(n, 0.5 / 0.9)
    weights[np.random.default_rng(0).choice(n, n // 10, replace=False)] = 5.0
    return weights


def library(folder: Path, ext: str, decoded: bool, workers: int) -> int:
    """One pass of the webdataset pipeline: as it comes, or decoded by our decoder, in batches."""
    urls = [str(folder / s.name) for s in read_manifest(folder).split("train")]
    pipeline = webdataset.WebDataset(urls, shardshuffle=False, empty_check=False)
    if decoded:
        pipeline = pipeline.map(lambda s: (decode(ext, s[ext]), int(s["cls"])))
        pipeline = pipeline.batched(
            BATCH, collation_fn=lambda b: (np.stack([x for x, _ in b]), [y for _, y in b])
        )
    loader = webdataset.WebLoader(pipeline, batch_size=None, num_workers=workers)
    return sum(len(item[1]) if decoded else 1 for item in loader)


def ours(folder: Path, access: str, weights: np.ndarray | None, workers: int) -> Callable[[], int]:
    """One pass of training batches."""
    config = StreamConfig(source="shards", path=str(folder), drift="none", experiences=1)
    stream = create_stream(config, 0, DataConfig(access=access))
    ids, epoch = stream.experiences[0].train, 0
    plan: LaneSampler | DistributedWeightedSampler
    if access == "stream":
        plan = LaneSampler(BATCH, window=1024)
        slices = Dealer(8, stream.lanes_of).deal(ids)
        plan.set_groups([LaneGroup(slices, weights, len(ids))])
    else:
        plan = DistributedWeightedSampler(BATCH)
        plan.set_weights(ids, weights)
    loader = BatchLoader(stream, plan, workers=workers)

    def one_pass() -> int:
        nonlocal epoch
        plan.set_epoch(epoch := epoch + 1)
        return sum(len(batch) for batch in loader)

    return one_pass


def indexed_raw(folder: Path, weights: np.ndarray | None) -> Callable[[], int]:
    source, _ = shards(StreamConfig(path=str(folder)), DataConfig())
    plan = DistributedWeightedSampler(BATCH)
    plan.set_weights(len(source), weights)
    return lambda: sum(sum(1 for _ in source.extents(np.array(ids))) for ids in plan)


def measure(samples: int, repeats: int) -> dict[str, Any]:
    results: dict[str, Any] = {"samples": samples}
    rates: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as temporary:
        for ext in ("npy", "png"):
            folder = Path(temporary) / ext
            write_shards(Images(samples, ext), folder, per_shard=samples // SHARDS, workers=2)
            tars = [folder / s.name for s in read_manifest(folder).split("train")]
            weights = skewed(samples)
            if ext == "npy":
                size = sum(t.stat().st_size for t in tars)
                results["tar_bytes_per_second"] = rate(
                    lambda t=tars: sum(len(p.read_bytes()) for p in t), repeats
                )
                results["tar_samples_per_second"] = results["tar_bytes_per_second"] / size * samples
                rates["library raw"] = rate(lambda f=folder: library(f, "npy", False, 0), repeats)
                rates["streaming raw"] = rate(
                    lambda t=tars: sum(
                        sum(1 for _ in stream_samples(lambda p=p: open_url(str(p)), p.name))
                        for p in t
                    ),
                    repeats,
                )
                rates["indexed raw uniform"] = rate(indexed_raw(folder, None), repeats)
                rates["indexed raw weighted"] = rate(indexed_raw(folder, weights), repeats)
            for workers in (0, 1, 2, 4):
                name = f"{ext} workers={workers}"
                rates[f"library {name}"] = rate(
                    lambda f=folder, e=ext, w=workers: library(f, e, True, w), repeats
                )
                for access in ("indexed", "stream"):
                    for kind, given in (("uniform", None), ("weighted", weights)):
                        run = ours(folder, access, given, workers)
                        rates[f"{access} {name} {kind}"] = rate(run, repeats)
    results["rates"] = rates
    useful = 0.2  # mean weight / largest
    results["ratios"] = {
        "streaming / library, raw": rates["streaming raw"] / rates["library raw"],
        "indexed raw / library raw": rates["indexed raw uniform"] / rates["library raw"],
        "indexed weighted / uniform, raw": rates["indexed raw weighted"]
        / rates["indexed raw uniform"],
    } | {
        f"{what}, {ext}": value
        for ext in ("npy", "png")
        for what, value in {
            "streaming / library": rates[f"stream {ext} workers=0 uniform"]
            / rates[f"library {ext} workers=0"],
            "streaming weighted / library useful": rates[f"stream {ext} workers=0 weighted"]
            / (useful * rates[f"library {ext} workers=0"]),
            "indexed weighted / uniform": rates[f"indexed {ext} workers=0 weighted"]
            / rates[f"indexed {ext} workers=0 uniform"],
        }.items()
    }
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=20_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = measure(options.samples, options.repeats)
    for name, value in results["rates"].items():
        print(f"{name:<32} {value:>12,.0f} samples/s")
    print(f"{'tar':<32} {results['tar_samples_per_second']:>12,.0f} samples/s")
    for name, value in results["ratios"].items():
        print(f"{name:<44} {value:.2f}")
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
