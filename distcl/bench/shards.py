"""``distcl bench shards``: the tar itself, the webdataset library, and distcl, side by side.

All in one run over the same shards of CIFAR-shaped images (uint8 [3, 32, 32]), the page cache warm.
Rates are samples per second of wall time, each the median of passes that take turns:

- ``raw``: the members' bytes; ``npy``: decoded arrays in batches; ``png``: decoded images.
- ``weighted``: half of the mass lies on a tenth of the samples. The library has no weights: its
  *useful* rate is that of rejection sampling, by which it keeps one sample in five.
"""

from __future__ import annotations

import importlib.util
import io
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from distcl.bench.measure import seconds_of
from distcl.bench.rows import Row, skipped
from distcl.config import DataConfig, StreamConfig
from distcl.data.decode import decode
from distcl.data.index import read_manifest
from distcl.data.loader import BatchLoader
from distcl.data.opening import shards
from distcl.data.streaming import open_url, stream_samples
from distcl.data.streams import create_stream
from distcl.data.writing import Members, write_shards
from distcl.priority.draws import Weights
from distcl.priority.lanes import LaneGroup, LaneSampler
from distcl.priority.sampler import DistributedWeightedSampler
from distcl.priority.slices import Dealer

BATCH = 256
SHARDS = 10
USEFUL = 0.2
"""Share of the samples that rejection sampling keeps: the mean weight over the largest."""


def bench(quick: bool) -> Iterator[Row]:
    """Read 20,000 images (``quick``: 3,000), raw and decoded."""
    missing = [name for name in ("webdataset", "PIL") if importlib.util.find_spec(name) is None]
    if missing:
        yield skipped("shards", f"{missing[0]} is not installed: pip install 'distcl[data]'")
        return
    torch.set_num_threads(1)
    samples = 3_000 if quick else 20_000
    with tempfile.TemporaryDirectory() as temporary:
        for ext in ("npy",) if quick else ("npy", "png"):
            folder = Path(temporary) / ext
            write_shards(Images(samples, ext), folder, per_shard=samples // SHARDS, workers=2)
            if ext == "npy":
                yield from _raw(folder, samples)
            for workers in (0,) if quick else (0, 1, 2, 4):
                yield from _decoded(folder, ext, samples, workers)


def _raw(folder: Path, samples: int) -> Iterator[Row]:
    """Yield rates of members' bytes, beside the tar itself."""
    tars = [folder / s.name for s in read_manifest(folder).split("train")]
    weights = skewed(samples)
    tar, theirs, streamed, uniform, weighted = _rates(
        samples,
        lambda: [len(path.read_bytes()) for path in tars],
        lambda: library(folder, "npy", False, 0),
        lambda: [
            sum(1 for _ in stream_samples(lambda p=p: open_url(str(p)), p.name))  # type: ignore[misc]
            for p in tars
        ],
        indexed_raw(folder, None),
        indexed_raw(folder, weights),
    )
    yield _row("streaming, raw", streamed, theirs, 0.95, tar, "the webdataset library; limit: tar")
    yield _row("indexed, raw", uniform, theirs, 5.0, tar, "the webdataset library; limit: tar")
    yield _row("indexed weighted, raw", weighted, uniform, 0.8, tar, "indexed uniform; limit: tar")


def _decoded(folder: Path, ext: str, samples: int, workers: int) -> Iterator[Row]:
    """Yield rates of decoded batches."""
    weights, what = skewed(samples), f"{ext}, {workers} workers"
    theirs, uniform, weighted, streamed, drawn = _rates(
        samples,
        lambda: library(folder, ext, True, workers),
        ours(folder, "indexed", None, workers),
        ours(folder, "indexed", weights, workers),
        ours(folder, "stream", None, workers),
        ours(folder, "stream", weights, workers),
    )
    own = workers == 0  # with workers, processes outnumber the cores of a small machine
    useful = "the webdataset library's useful rate"
    yield _row(f"streaming, {what}", streamed, theirs, 0.95 if own else None)
    yield _row(
        f"streaming weighted, {what}", drawn, USEFUL * theirs, 2.0 if own else None, None, useful
    )
    yield _row(f"indexed, {what}", uniform, theirs)
    yield _row(
        f"indexed weighted, {what}", weighted, uniform, 0.8 if own else None, None, "uniform"
    )


def _row(
    name: str,
    ours: float,
    theirs: float,
    target: float | None = None,
    limit: float | None = None,
    against: str = "the webdataset library",
) -> Row:
    return Row(
        f"shards {name}", ours, theirs, "samples/s", "more", target, limit, f"against {against}"
    )


def _rates(samples: int, *works: Callable[[], Any]) -> list[float]:
    return [samples / seconds for seconds in seconds_of(*works, repeats=3)]


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
                from PIL import Image

                Image.fromarray(np.moveaxis(pixels, 0, -1)).save(out, "png")
            yield {self._ext: out.getvalue(), "cls": b"%d" % (row % 10)}


def skewed(n: int) -> Weights:
    """Weights [n], half of whose sum lies on a tenth."""
    weights = np.full(n, 0.5 / 0.9)
    weights[np.random.default_rng(0).choice(n, n // 10, replace=False)] = 5.0
    return weights


def library(folder: Path, ext: str, decoded: bool, workers: int) -> int:
    """One pass of the webdataset pipeline: as it comes, or decoded by our decoder, in batches."""
    import webdataset

    urls = [str(folder / s.name) for s in read_manifest(folder).split("train")]
    pipeline = webdataset.WebDataset(urls, shardshuffle=False, empty_check=False)
    if decoded:
        pipeline = pipeline.map(lambda s: (decode(ext, s[ext]), int(s["cls"])))
        pipeline = pipeline.batched(
            BATCH, collation_fn=lambda b: (np.stack([x for x, _ in b]), [y for _, y in b])
        )
    loader = webdataset.WebLoader(pipeline, batch_size=None, num_workers=workers)
    return sum(len(item[1]) if decoded else 1 for item in loader)


def ours(folder: Path, access: str, weights: Weights | None, workers: int) -> Callable[[], int]:
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


def indexed_raw(folder: Path, weights: Weights | None) -> Callable[[], int]:
    """One pass over the members' bytes, by index."""
    source, _ = shards(StreamConfig(path=str(folder)), DataConfig())
    plan = DistributedWeightedSampler(BATCH)
    plan.set_weights(len(source), weights)
    return lambda: sum(sum(1 for _ in source.extents(np.array(ids))) for ids in plan)
