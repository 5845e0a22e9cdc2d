"""What a run leaves behind when it is done: ``summary.json`` and the final weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file

from distcl.checkpoint.state import weights
from distcl.config import Config
from distcl.config.files import write_atomically
from distcl.distributed.memory import peak_memory
from distcl.errors import CheckpointError
from distcl.models.transformers import header
from distcl.monitoring.monitor import Monitor
from distcl.reporting.figures import words_in
from distcl.reporting.status import finite
from distcl.training.accuracy_matrix import AccuracyMatrix
from distcl.training.parts import Parts
from distcl.training.trainer import ContinuousTrainer
from distcl.types import Experience


def summarize(
    trainer: ContinuousTrainer,
    monitor: Monitor | None,
    baseline: Sequence[float | None],
    config: Config,
    seconds: float,
    setup_seconds: float,
) -> dict[str, Any]:
    """Return the contents of ``summary.json``. Collective.

    ``monitor``: None of scheduled rounds, before which the model scored ``baseline``. ``seconds``
    are of the whole run, ``setup_seconds`` of its last start, until it could train.
    """
    if monitor is None:
        experiences, untrained = trainer.parts.stream.experiences, list[Experience]()
    else:
        experiences, untrained = monitor.experiences, monitor.untrained
        baseline = [trainer.leading.chance()] * len(experiences)
    _, *further = trainer.matrices.of.items()
    runtime = trainer.parts.runtime
    stages = [*([trainer.pretraining] if trainer.pretraining else []), *trainer.rounds]
    trained = sum(float(stage["train_seconds"]) for stage in stages)
    flops: list[Any] = [stage.get("flops") for stage in stages]  # None in those of before a resume
    summary = {
        "status": "done",
        "folder": config.run.out,
        "world_size": runtime.world_size,
        "strategy": config.parallel.strategy,
        "seconds": seconds,
        "setup_seconds": setup_seconds,
        "samples_per_second": trainer.loop.samples / trained if trained else None,
        "seed": config.run.seed,
        "metric": trainer.metric,
        **_told(trainer.matrix),
        "forward_transfer": trainer.matrix.forward_transfer(baseline),
        "scores": {name: _told(matrix) for name, matrix in further},
        "drifts": [] if monitor is None else monitor.drifts,
        "bad_samples": trainer.bad.count,
        "class_names": list(trainer.parts.stream.spec.class_names),
        "classes": trainer.classes,
        "pretrain": trainer.pretraining,
        "evaluate_seconds": trainer.evaluate_seconds,
        "compute": {
            key: sum(stage["compute"][key] for stage in stages)
            for key in ("scored", "trained", "units")
        },
        "flops": None if None in flops else sum(flops),
        "peak_memory": runtime.gather_objects(peak_memory(runtime.device)),
        "rounds": trainer.rounds,
        "experiences": [
            {"name": e.name, "trained": trained}
            for some, trained in ((experiences, True), (untrained, False))
            for e in some
        ],
        "stream_end": None if monitor is None else monitor.stream_end,
    }
    cleaned: dict[str, Any] = finite(summary)
    return cleaned


def _told(matrix: AccuracyMatrix) -> dict[str, Any]:
    """Return what the summary has of one score's matrix."""
    return {
        "higher_is_better": matrix.higher_is_better,
        "accuracy": matrix.rows(),
        "average_accuracy": matrix.average_accuracy(),
        "average_forgetting": matrix.average_forgetting(),
        "backward_transfer": matrix.backward_transfer(),
        "average_anytime_accuracy": matrix.average_anytime_accuracy(),
        "worst_experience_accuracy": matrix.worst_experience_accuracy(),
    }


def draw_matrix(summary: dict[str, Any], path: Path) -> None:
    """Write a picture of the accuracy matrix. Local."""
    from distcl.reporting import plots

    matrix = summary["accuracy"]
    names = [str(i + 1) for i in range(len(matrix))]
    plots.save_png(plots.matrix(matrix, names, words_in(summary)), path)


def save_final(parts: Parts, path: Path) -> None:
    """Write parameters and buffers to a safetensors file, by rank 0. Collective.

    The file is there as a whole or not at all; raises CheckpointError if it cannot be written.
    """
    state, about = weights(parts), header(parts.forward.module)
    if parts.runtime.is_main:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, lambda part: save_file(state, str(part), about or None))
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"'{path}' cannot be written: {error}") from error
