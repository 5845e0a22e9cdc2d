"""What a round leaves in ``OUT/draws/`` for the report, and tells the trackers, when it is over."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from distcl.priority.feed import Feed
from distcl.priority.tally import EDGES
from distcl.runtime import Runtime
from distcl.tracking import Tracker
from distcl.tracking_values import Histogram, flat
from distcl.types import Source

log = logging.getLogger("distcl")

FOLDER = "draws"
TOP = 24
"""Samples drawn most that a round's file holds."""

_LARGEST = 64  # pixels of a thumbnail's longer side
_CHANNELS = (1, 3)
_UNTOLD = ("trigger", "steps", "draws_sha256", "train_seconds", "priority_seconds")
"""Of a round's report: no numbers to plot, or other ones each time that the run is repeated."""


class RoundRecorder:
    """Writes ``OUT/draws/round-NNNN.npz`` and logs a round's figures.

    Arrays: ``ids``, ``counts`` int64 [n ≤ TOP] of the samples drawn most, ``labels`` int64 [n] of
    classes (else [0]), ``thumbnails`` uint8 [n, h, w, channels] of images (else [0]), and of each
    weighted part, ``cur`` and ``hist``, ``{part}_counts`` int64 [64] and ``{part}_edges``: a
    histogram of the draw weights that the round began with, or of its candidates, in means.
    """

    def __init__(self, runtime: Runtime, out: Path, tracker: Tracker) -> None:
        self._runtime = runtime
        self._folder = out / FOLDER
        self._tracker = tracker

    def write(
        self,
        report: dict[str, Any],
        feed: Feed,
        source: Source,
        step: int,
    ) -> None:
        """Add ``draws`` to a round's report, write its file and log its figures. Collective.

        Afterwards the report is the same on every rank, as it was before.
        """
        histograms = {name: Histogram(h, EDGES) for name, h in feed.histograms().items()}
        report["draws"], ids, counts = feed.account.told(feed.candidates, TOP)
        if self._runtime.is_main:
            try:
                self._save(int(report["round"]), ids, counts, histograms, source)
            except OSError as error:  # a full disk: the report will show less
                log.warning(f"[report] draws of round {report['round']} are not kept: {error}")
        values = {name: value for name, value in report.items() if name not in _UNTOLD}
        told = {f"priority/{name}/weights": histogram for name, histogram in histograms.items()}
        self._tracker.log(flat(values) | told, step)

    def _save(
        self,
        number: int,
        ids: npt.NDArray[np.int64],
        counts: npt.NDArray[np.int64],
        histograms: dict[str, Histogram],
        source: Source,
    ) -> None:
        arrays: dict[str, npt.NDArray[Any]] = {"ids": ids, "counts": counts}
        arrays |= _seen(source, ids)
        for name, histogram in histograms.items():
            arrays[f"{name}_counts"] = histogram.counts
            arrays[f"{name}_edges"] = histogram.edges
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"round-{number:04d}.npz"
        temporary = path.with_name(f".{path.name}")
        with temporary.open("wb") as stream:
            np.savez_compressed(stream, allow_pickle=False, **arrays)
        temporary.replace(path)


def _seen(source: Source, ids: npt.NDArray[np.int64]) -> dict[str, npt.NDArray[Any]]:
    """Return labels and thumbnails of samples, empty where they have none."""
    nothing = np.empty(0, dtype=np.uint8)
    if not len(ids) or getattr(source, "sequential", False):
        return {"labels": nothing, "thumbnails": nothing}
    batch = source.read(ids)
    labels = nothing
    if isinstance(batch.y, torch.Tensor) and batch.y.dtype == torch.int64 and batch.y.ndim == 1:
        labels = batch.y.numpy()
    x = batch.x
    if not isinstance(x, torch.Tensor) or x.ndim != 4 or x.shape[1] not in _CHANNELS:
        return {"labels": labels, "thumbnails": nothing}
    return {"labels": labels, "thumbnails": thumbnails(x)}


def thumbnails(x: torch.Tensor) -> npt.NDArray[np.uint8]:
    """Return images [n, 1 or 3, h, w] as uint8 [n, h', w', 1 or 3], each scaled to its own range.

    Larger ones are thinned out to at most 64 pixels a side.
    """
    every = -(-max(x.shape[2:]) // _LARGEST)
    small = x[:, :, ::every, ::every].float()
    low = small.amin(dim=(1, 2, 3), keepdim=True)
    span = (small.amax(dim=(1, 2, 3), keepdim=True) - low).clamp_min(1e-12)
    scaled = ((small - low) / span * 255).round().to(torch.uint8)
    pixels: npt.NDArray[np.uint8] = scaled.permute(0, 2, 3, 1).contiguous().numpy()
    return pixels
