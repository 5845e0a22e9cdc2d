"""Where metrics go: the trackers of a run."""

from __future__ import annotations

import importlib.util
import json
import uuid
from collections.abc import Callable
from pathlib import Path

from distcl.config import TrackingConfig
from distcl.errors import ConfigError
from distcl.tracking.tracker import JsonlTracker, Tracker, Trackers, _failed, log

_IDS = "tracking.json"
_PACKAGES = {"wandb": "wandb", "mlflow": "mlflow-skinny"}


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
    for kind in config.kinds:
        package = _PACKAGES.get(kind, "json").partition("-")[0]
        if importlib.util.find_spec(package) is None:
            raise ConfigError(
                f"tracking.kind = '{kind}' needs the package {_PACKAGES[kind]}: "
                f"pip install 'distcl[{kind}]'"
            )
    trackers: list[Tracker] = [JsonlTracker(out / "metrics.jsonl", resume)]
    for kind in config.kinds:
        try:
            if kind == "wandb":
                from distcl.tracking.wandb import WandbTracker

                trackers.append(WandbTracker(config, out, _id(out, kind, resume), tell))
            elif kind == "mlflow":
                from distcl.tracking.mlflow import MlflowTracker

                trackers.append(MlflowTracker(config, out, _id(out, kind, resume), tell))
        except Exception as error:  # whatever a service or its client raises
            tell(f"[tracking] {_failed(kind, error)}")
    return Trackers(trackers, tell)


def _id(out: Path, kind: str, resume: bool) -> str:
    """Return the id of the run at a service: of ``out/tracking.json`` if it goes on, else new."""
    path = out / _IDS
    known: dict[str, str] = {}
    if path.exists():
        known = json.loads(path.read_text(encoding="utf-8"))
    if not resume or kind not in known:
        known[kind] = uuid.uuid4().hex[:12]
        temporary = path.with_name(f".{_IDS}")
        temporary.write_text(json.dumps(known) + "\n", encoding="utf-8")
        temporary.replace(path)
    return known[kind]
