"""Weights & Biases: the same run from its first step to its last, however often it is requeued."""

from __future__ import annotations

import netrc
import os
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import wandb

from distcl import __version__
from distcl.config import TrackingConfig
from distcl.tracking_values import Histogram, flat

_BASE_URL = "https://api.wandb.ai"


class WandbTracker:
    """Logs to one W&B run, by id; call n of ``log`` is W&B's step n, and ``step`` is its x axis.

    Online, W&B itself drops a call whose number it has. Offline, the first ``logged`` calls are
    left out, since the files of the run's earlier processes hold them.
    """

    def __init__(
        self,
        config: TrackingConfig,
        out: Path,
        run_id: str,
        logged: int,
        tell: Callable[[str], None],
    ) -> None:
        mode = self._mode(config, tell)
        for name in ("CACHE", "DATA", "ARTIFACT"):  # everything that it writes is in the run folder
            os.environ.setdefault(f"WANDB_{name}_DIR", str((out / "wandb").absolute()))
        self._out = out
        self._calls = 0
        self._logged = logged if mode == "offline" else 0
        (out / "wandb").mkdir(parents=True, exist_ok=True)
        self._run = wandb.init(
            project=config.project,
            entity=config.entity or None,
            name=config.name or out.resolve().name,
            id=run_id,
            resume="allow",
            dir=out,
            mode=mode,
            config={**_config(out), "distcl_version": __version__},
            settings=wandb.Settings(silent=True, console="off", init_timeout=60),
        )
        self._run.define_metric("*", step_metric="step")
        if mode == "online":
            tell(f"[tracking] W&B: {self._run.url}")

    def log(self, values: dict[str, Any], step: int) -> None:
        """Log one row, unless the run has it."""
        if self._calls >= self._logged:
            row = {name: _wandb(value) for name, value in flat(values).items()}
            known = {name: value for name, value in row.items() if value is not None}
            self._run.log({**known, "step": step}, step=self._calls)
        self._calls += 1

    def summarize(self, summary: dict[str, Any]) -> None:
        """Record final numbers, the accuracy matrix as table and heat map, and checkpoints."""
        plain = {k: v for k, v in flat(summary).items() if isinstance(v, int | float | str | bool)}
        self._run.summary.update(plain)
        matrix = summary.get("accuracy") or []
        if matrix and matrix[0]:
            self._log_matrix(matrix, str(summary.get("metric", "accuracy")))
        folder = self._out / "checkpoints"
        if folder.is_dir():
            artifact = wandb.Artifact(f"checkpoints-{self._run.id}", type="model")
            artifact.add_reference(folder.absolute().as_uri(), checksum=False)
            self._run.log_artifact(artifact)

    def finish(self) -> None:
        """Write what is pending and close the run."""
        self._run.finish()

    def state_dict(self) -> dict[str, Any]:
        """Return how many calls of ``log`` there were."""
        return {"calls": self._calls, "id": self._run.id}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Count on from there."""
        self._calls = state.get("calls", self._calls)

    def _log_matrix(self, matrix: list[list[float | None]], metric: str) -> None:
        from distcl import plots

        columns: list[str | int] = ["evaluation"]
        columns += [f"experience {j + 1}" for j in range(len(matrix[0]))]
        rows = [[i + 1, *row] for i, row in enumerate(matrix)]
        path = self._out / "wandb" / "accuracy.png"
        plots.save_png(plots.matrix(matrix, [str(row[0]) for row in rows], metric), path)
        values = {
            "accuracy_matrix": wandb.Table(columns=columns, data=rows),
            "accuracy_heat_map": wandb.Image(str(path)),
        }
        self._run.log(values, step=self._calls)
        self._calls += 1

    @staticmethod
    def _mode(config: TrackingConfig, tell: Callable[[str], None]) -> Any:
        if config.mode != "auto":
            return config.mode
        if os.environ.get("WANDB_MODE"):
            return os.environ["WANDB_MODE"]
        if os.environ.get("WANDB_API_KEY") or _in_netrc():
            return "online"
        tell(
            "[tracking] W&B has no key (WANDB_API_KEY, or wandb login), so the run is offline; "
            "upload it later with: wandb sync"
        )
        return "offline"


def _in_netrc() -> bool:
    """Tell whether ``wandb login`` left a key."""
    host = urlparse(os.environ.get("WANDB_BASE_URL") or _BASE_URL).hostname or ""
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _config(out: Path) -> dict[str, Any]:
    path = out / "config.toml"
    return tomllib.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _wandb(value: Any) -> Any:
    if isinstance(value, Histogram):
        held = value.trimmed()
        return wandb.Histogram(np_histogram=(held.counts.tolist(), held.edges.tolist()))
    return value
