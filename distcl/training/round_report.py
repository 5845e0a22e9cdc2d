"""What is told of a round: in ``summary.json``, in ``OUT/draws/``, and to the trackers."""

from __future__ import annotations

import io
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from distcl.config.files import write_atomically
from distcl.distributed.runtime import Runtime
from distcl.parallel.inference import ShardedForward
from distcl.priority.guard import Judgement, doubts
from distcl.sampling.draw_log import EDGES
from distcl.sampling.round_loader import RoundLoader
from distcl.tracking.tracker import Histogram, Tracker, flat_values
from distcl.training.accuracy_matrix import Entry
from distcl.training.stage import Stage
from distcl.types import Experience, Source, info_of
from distcl.updaters import Updater

TOP = 24
"""Samples drawn most that a round's file holds."""

_LARGEST = 64  # pixels of a thumbnail's longer side
_CHANNELS = (1, 3)
_UNTOLD = ("trigger", "steps", "draws_sha256", "train_seconds", "priority_seconds")
"""Of a round's report: no numbers to plot, or other ones each time that the run is repeated."""

log = logging.getLogger("distcl")


@dataclass(frozen=True, slots=True)
class RoundRecorder:
    """Makes the reports of rounds, the same on every rank, and records what they drew.

    ``round-NNNN.npz`` in ``folder`` has the arrays ``ids``, ``counts`` int64 [n ≤ TOP] of the
    samples drawn most, ``labels`` int64 [n] of classes (else [0]), ``thumbnails`` uint8
    [n, h, w, channels] of images (else [0]), and of each weighted part, ``cur`` and ``hist``,
    ``{part}_counts`` int64 [64] and ``{part}_edges``: a histogram of the draw weights that the
    round began with, or of its candidates, in means.
    """

    runtime: Runtime
    folder: Path
    tracker: Tracker
    loader: RoundLoader
    forward: ShardedForward
    updater: Updater

    def counts(self) -> list[int]:
        """Return the samples that went through the model so far: forward only, and trained on."""
        return [self.forward.forwards, self.updater.trained]

    def of_pretraining(self, stage: Stage) -> dict[str, Any]:
        """Return the report of pretraining. Collective."""
        return {"steps": stage.steps, "train_seconds": stage.seconds, **self._common(stage)}

    def of_round(self, stage: Stage, accepted: bool) -> tuple[dict[str, Any], str]:
        """Return the report of a round, and what the log should say of it, or ''. Collective."""
        drawn = self.loader.round
        scored = stage.report["scored"] + drawn.forwards
        candidates = sum(int(r["n"]) for r in drawn.weights.report.values())
        guard, words = self._guard(stage)
        report = {
            "round": stage.number,
            "trigger": stage.trigger,
            "steps": stage.steps,
            "train_seconds": stage.seconds - drawn.priority_seconds,
            "priority_seconds": stage.report["priority_seconds"] + drawn.priority_seconds,
            "forward_passes_per_sample": scored / candidates if candidates else 0.0,
            **self._common(stage),
            "accepted": accepted,
            "priority": drawn.weights.report,
            **guard,
        }
        return report, words

    def _common(self, stage: Stage) -> dict[str, Any]:
        """Return what is told of rounds and pretraining.

        Of ``compute``, a forward of a sample is one unit, forward and backward three; evaluation
        does not count, but what ``training.accept`` looks at does.
        """
        of_step = stage.report.get("flops", 0)  # of the first; None where they cannot be counted
        before = stage.report["before"]
        scored, trained = (now - then for now, then in zip(self.counts(), before, strict=True))
        return {
            "compute": {"scored": scored, "trained": trained, "units": scored + 3 * trained},
            "flops": None if of_step is None else stage.steps * of_step,
            "draws_sha256": self.loader.round.log.digest(),
            "final_loss": stage.loss,
        }

    def _guard(self, stage: Stage) -> tuple[dict[str, Any], str]:
        """Return what the guard has to report of a round by priority, and a warning or ''."""
        judged = Judgement(**stage.report["judged"])
        if not (stage.report["weighted"] or judged.uniform):
            return {}, ""
        drawn = self.loader.round
        staleness = drawn.staleness
        found = doubts(drawn.weights.report, judged.aim, staleness)
        told: dict[str, Any] = {"uniform": judged.uniform, "aim": judged.aim}
        told["staleness"] = staleness
        words = ""
        if judged.uniform:
            told["words"] = f"uniform draws: {'; '.join(judged.doubts)}"
        elif found:
            told["words"] = f"sampling by priority is likely to hurt: {'; '.join(found)}"
            words = f"[guard] round {stage.number}: {told['words']}"
        return {"guard": told}, words

    def write(self, report: dict[str, Any], source: Source, step: int) -> None:
        """Add ``draws`` to a round's report, write its file and log its figures. Collective.

        Afterwards the report is the same on every rank, as it was before.
        """
        drawn = self.loader.round
        histograms = {name: Histogram(h, EDGES) for name, h in drawn.histograms().items()}
        report["draws"], ids, counts = drawn.log.told(drawn.candidates, TOP)
        if self.runtime.is_main:
            try:
                self._save(int(report["round"]), {"ids": ids, "counts": counts}, histograms, source)
            except OSError as error:  # a full disk: the report will show less
                log.warning(f"[report] draws of round {report['round']} are not kept: {error}")
        values = {name: value for name, value in report.items() if name not in _UNTOLD}
        told = {f"priority/{name}/weights": histogram for name, histogram in histograms.items()}
        self.tracker.log(flat_values(values) | told, step)

    def _save(
        self,
        number: int,
        arrays: dict[str, npt.NDArray[Any]],
        histograms: dict[str, Histogram],
        source: Source,
    ) -> None:
        arrays |= _seen(source, arrays["ids"])
        for name, histogram in histograms.items():
            arrays |= {f"{name}_counts": histogram.counts, f"{name}_edges": histogram.edges}
        file = io.BytesIO()
        np.savez_compressed(file, allow_pickle=False, **arrays)
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(self.folder / f"round-{number:04d}.npz", file.getvalue())


def row_values(
    rows: Mapping[str, Sequence[Entry]],
    experiences: Sequence[Experience],
    higher_is_better: bool,
    classes: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Return a row of each score as trackers take it; the leading one says which way is better.

    ``classes``: see :func:`distcl.training.class_scores`; the accuracy of each, where they are few.
    """
    values: dict[str, Any] = {
        f"{name}/{e.index + 1}": value
        for name, row in rows.items()
        for e, value in zip(experiences, row, strict=True)
        if value is not None
    }
    if classes is not None and classes["by_experience"] is not None:
        told = zip(classes["names"], classes["accuracy"], strict=True)
        values |= {f"class_accuracy/{name}": v for name, v in told if v is not None}
    if not higher_is_better:
        values["higher_is_better"] = False  # so that a run that is not over can be read
    return values


def _seen(source: Source, ids: npt.NDArray[np.int64]) -> dict[str, npt.NDArray[Any]]:
    """Return labels and thumbnails of samples, empty where they have none."""
    nothing = np.empty(0, dtype=np.uint8)
    if not len(ids) or info_of(source).sequential:
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
