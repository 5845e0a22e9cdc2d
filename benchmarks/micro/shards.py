"""How fast shards are read: the archive itself, the webdataset library, and distcl, side by side.

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

from benchmarks.micro.measure import seconds_of
from benchmarks.micro.rows import Row, compared
from distcl.config import DataConfig, StreamConfig
from distcl.data.loader import BatchLoader
from distcl.data.shards.decode import decode
from distcl.data.shards.manifest import read_shards
from distcl.data.shards.open import shards
from distcl.data.shards.sequential import stream_samples
from distcl.data.shards.tar import open_archive
from distcl.data.shards.writer import Members, Samples, write_shards
from distcl.data.stream import create_stream
from distcl.errors import UsageError
from distcl.priority.population import Dealer
from distcl.sampling.groups import Part
from distcl.sampling.sampler import DistributedWeightedSampler
from distcl.sampling.sequential import LaneSampler

BATCH = 256
SHARDS = 10


class Images(Samples):
    """Random images as samples: of members npy or png, and cls."""

    def __init__(self, samples: int, ext: str) -> None:
        super().__init__({"ext": ext, "samples": samples})
        self.sizes = {"train": samples, "test": SHARDS}
        self._ext = ext

    def stamp(self, split: str, begin: int, end: int) -> Any:
        """Return nothing: there are no files."""

    def read(self, split: str, begin: int, end: int) -> Iterator[Members]:
        """Yield the members of samples ``begin`` to ``end``."""
        from PIL import Image

        for row in range(begin, end):
            pixels = np.random.default_rng(row).integers(0, 256, (3, 32, 32)).astype(np.uint8)
            out = io.BytesIO()
            if self._ext == "npy":
                np.save(out, pixels)
            else:
                Image.fromarray(np.moveaxis(pixels, 0, -1)).save(out, "png")
            yield {self._ext: out.getvalue(), "cls": b"%d" % (row % 10)}


def rates(samples: int, works: dict[str, Callable[[], int]], repeats: int) -> dict[str, float]:
    """Return the samples per second of each work; they take turns."""
    seconds = seconds_of(*works.values(), repeats=repeats, warmup=0)
    return {name: samples / value for name, value in zip(works, seconds, strict=True)}


def skewed(n: int) -> np.ndarray:
    """Weights [n], half of whose sum lies on a tenth."""
    weights = np.full(n, 0.5 / 0.9)
    weights[np.random.default_rng(0).choice(n, n // 10, replace=False)] = 5.0
    return weights


def library(folder: Path, ext: str, decoded: bool, workers: int) -> int:
    """One pass of the webdataset pipeline: as it comes, or decoded by our decoder, in batches."""
    import webdataset

    urls = [str(folder / s.name) for s in read_shards(folder).split("train")]
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
        plan.set_groups([Part(slices.ids, weights, slices, draws=len(ids))])
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
    """One pass over the bytes of all samples, as they are drawn."""
    source, _ = shards(StreamConfig(path=str(folder)), DataConfig())
    plan = DistributedWeightedSampler(BATCH)
    plan.set_weights(len(source), weights)
    return lambda: sum(sum(1 for _ in source.extents(np.array(ids))) for ids in plan)


def measure(quick: bool) -> list[Row]:
    """Return rates beside the library's. Raises UsageError if it is not installed."""
    for module in ("webdataset", "PIL"):
        if importlib.util.find_spec(module) is None:
            raise UsageError(f"bench shards needs {module}; type: pip install 'distcl[data]'")
    torch.set_num_threads(1)
    samples, repeats = (2_000, 3) if quick else (3_000, 3)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as temporary:
        for ext in ("npy", "png"):
            folder = Path(temporary) / ext
            write_shards(Images(samples, ext), folder, per_shard=samples // SHARDS, workers=2)
            if ext == "npy":
                rows += _raw(folder, samples, repeats)
            for workers in (0,) if quick else (0, 1, 2, 4):
                rows += _decoded(folder, ext, samples, workers, repeats)
    return rows


def _raw(folder: Path, samples: int, repeats: int) -> list[Row]:
    tars = [folder / s.name for s in read_shards(folder).split("train")]

    def streamed() -> int:
        return sum(
            sum(1 for _ in stream_samples(lambda p=path: open_archive(p), path.name))  # type: ignore[misc]
            for path in tars
        )

    found = rates(
        samples,
        {
            "archive": lambda: sum(len(path.read_bytes()) for path in tars),
            "library": lambda: library(folder, "npy", False, 0),
            "streaming": streamed,
            "uniform": indexed_raw(folder, None),
            "weighted": indexed_raw(folder, skewed(samples)),
        },
        repeats,
    )
    unit, theirs, limit = "samples/s, raw, of the library", found["library"], found["archive"]
    return [
        compared("shards streaming", found["streaming"], theirs, unit, ">= 0.95", limit=limit),
        compared("shards indexed", found["uniform"], theirs, unit, ">= 5", limit=limit),
        compared(
            "shards indexed, weighted",
            found["weighted"],
            found["uniform"],
            "samples/s, raw, of uniform",
            ">= 0.8",
        ),
    ]


def _decoded(folder: Path, ext: str, samples: int, workers: int, repeats: int) -> list[Row]:
    weights = skewed(samples)
    works: dict[str, Callable[[], int]] = {
        "library": lambda: library(folder, ext, True, workers),
    }
    for access in ("stream", "indexed"):
        works[access] = ours(folder, access, None, workers)
        works[f"{access} weighted"] = ours(folder, access, weights, workers)
    found = rates(samples, works, repeats)
    of, unit = f"{ext}, {workers} workers", "samples/s, of the library"
    useful = float(weights.mean() / weights.max())
    return [
        compared(f"shards streaming, {of}", found["stream"], found["library"], unit, ">= 0.95"),
        compared(
            f"shards streaming, weighted, {of}",
            found["stream weighted"],
            found["library"],
            "samples/s, of the library's useful rate",
            ">= 2",
            useful,
        ),
        compared(f"shards indexed, {of}", found["indexed"], found["library"], unit),
        compared(
            f"shards indexed, weighted, {of}",
            found["indexed weighted"],
            found["indexed"],
            "samples/s, of uniform",
            ">= 0.8",
        ),
    ]
