"""Where metrics go: the trackers of a run."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Callable
from pathlib import Path

from distcl.config import TrackingConfig
from distcl.config.files import write_atomically
from distcl.errors import ConfigError
from distcl.tracking.tracker import (
    AccelerateTracker,
    JsonlTracker,
    MlflowTracker,
    ServiceTracker,
    Tracker,
    Trackers,
    failure,
    log,
)

_IDS = "tracking.json"
_INSTALL = {
    "wandb": "distcl[wandb]",
    "mlflow": "distcl[mlflow]",
    "tensorboard": "distcl[tensorboard]",
    "aim": "aim<4",
}
"""What to install for a service's package, where it is not that package itself."""


def create_tracker(
    config: TrackingConfig,
    out: Path,
    rank: int,
    resume: bool = False,
    tell: Callable[[str], None] = log.info,
) -> Tracker:
    """Return this rank's tracker: those that are configured on rank 0, none on other ranks.

    ``resume``: go on with what the folder ``out`` holds, in the same runs. ``tell`` takes a line
    for the user. ``out/metrics.jsonl`` is written whenever there is any tracker. Raises ConfigError
    if a package is not installed; a service that cannot be used is left out, with a warning.
    """
    if rank != 0 or config.kinds == ["none"]:
        return Trackers()
    services = [kind for kind in config.kinds if kind != "jsonl"]
    for kind in services:
        if importlib.util.find_spec(kind) is None:
            raise ConfigError(
                f"tracking.kind = '{kind}' needs the package {kind}: "
                f"pip install '{_INSTALL.get(kind, kind)}'"
            )
    path = out / _IDS
    ids: dict[str, str] = {}
    if resume and path.exists():
        ids = json.loads(path.read_text(encoding="utf-8"))
    trackers: list[Tracker] = [JsonlTracker(out / "metrics.jsonl", resume)]
    for kind in services:
        try:
            trackers.append(tracker := _service(kind, config, out, ids.get(kind, ""), tell))
            ids[kind] = tracker.id
        except Exception as error:  # whatever a service or its client raises
            tell(f"[tracking] {failure(kind, error)}")
    if ids:
        write_atomically(path, json.dumps(ids) + "\n")
    return Trackers(trackers, tell)


def _service(
    kind: str, config: TrackingConfig, out: Path, run_id: str, tell: Callable[[str], None]
) -> ServiceTracker:
    if kind == "wandb":
        from distcl.tracking.wandb import WandbTracker

        return WandbTracker(config, out, run_id, tell)
    if kind != "mlflow":
        return AccelerateTracker(kind, config, out, run_id)
    if not os.environ.get("MLFLOW_TRACKING_URI"):
        tell("[tracking] MLflow has no server (MLFLOW_TRACKING_URI), so it writes OUT/mlruns")
    return MlflowTracker(kind, config, out, run_id)
