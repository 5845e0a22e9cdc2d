"""MLflow: numbers as metrics of one run, however often it is requeued."""

from __future__ import annotations

import os
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mlflow.entities import Metric, Param, RunTag
from mlflow.tracking import MlflowClient

from distcl import __version__
from distcl.config import TrackingConfig
from distcl.tracking.service import ServiceTracker
from distcl.tracking.tracker import Ending, flat

_PARAM_LENGTH = 500  # characters that a parameter may have, at every server
_TAG, _CALL = "distcl.id", "call"
_STATUS: dict[Ending, str] = {"done": "FINISHED", "preempted": "KILLED", "failed": "FAILED"}


class MlflowTracker(ServiceTracker):
    """Logs the numbers of each call as metrics of one run, found again by the tag ``distcl.id``.

    The server is MLFLOW_TRACKING_URI; without it, files in ``OUT/mlruns``. The metric ``call`` is
    the number of the call, and tells what the run has. MLflow's metrics are numbers: nothing else
    is sent.
    """

    def __init__(
        self,
        config: TrackingConfig,
        out: Path,
        run_id: str,
        tell: Callable[[str], None],
    ) -> None:
        uri = os.environ.get("MLFLOW_TRACKING_URI")
        if not uri:
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # else it refuses files
            uri = (out / "mlruns").absolute().as_uri()
            tell("[tracking] MLflow has no server (MLFLOW_TRACKING_URI), so it writes OUT/mlruns")
        super().__init__(out)
        self._client = MlflowClient(tracking_uri=uri)
        found = self._client.get_experiment_by_name(config.project)
        experiment = (
            found.experiment_id if found else self._client.create_experiment(config.project)
        )
        runs = self._client.search_runs([experiment], f"tags.`{_TAG}` = '{run_id}'")
        if runs:
            self._run = runs[0].info.run_id
            self._held = int(runs[0].data.metrics.get(_CALL, -1)) + 1
            self._client.update_run(self._run, status="RUNNING")
            return
        name = config.name or out.resolve().name
        run = self._client.create_run(experiment, tags={_TAG: run_id}, run_name=name)
        self._run = run.info.run_id
        path = out / "config.toml"
        values = tomllib.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        params = [
            Param(key.replace("/", "."), str(value)[:_PARAM_LENGTH])
            for key, value in flat(values).items()
        ]
        tags = [RunTag("distcl.version", __version__)]
        for first in range(0, len(params), 100):  # the most that one request may hold
            self._client.log_batch(self._run, params=params[first : first + 100], tags=tags)

    def send(self, values: dict[str, Any], step: int, call: int) -> None:
        """Log the numbers among the values."""
        self._send({**flat(values), _CALL: call}, step)

    def checkpoint(self, path: Path) -> None:
        """Tell where the newest checkpoint is, by the tag ``distcl.checkpoint``."""
        self._client.set_tag(self._run, "distcl.checkpoint", path.absolute().as_uri())

    def summarize(self, summary: dict[str, Any]) -> None:
        """Record the final numbers, and the summary as a file."""
        self._send({f"final/{name}": value for name, value in flat(summary).items()}, 0)
        self._client.log_dict(self._run, summary, "summary.json")

    def finish(self, ending: Ending = "done") -> None:
        """Close the run, or this process's part of it."""
        self._client.set_terminated(self._run, _STATUS[ending])

    def _send(self, values: dict[str, Any], step: int) -> None:
        now = int(time.time() * 1000)
        metrics = [
            Metric(name, float(value), now, step)
            for name, value in values.items()
            if isinstance(value, int | float) and not isinstance(value, bool)
        ]
        if metrics:
            self._client.log_batch(self._run, metrics=metrics)
