"""Run folders as the report reads them: one run, and several side by side."""

from __future__ import annotations

import re
import tomllib
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from distcl.errors import UsageError
from distcl.reporting.figures import Words, row_names, untrained, words_of
from distcl.reporting.status import read_json, read_metrics
from distcl.tracking.tracker import flat_values
from distcl.training.accuracy_matrix import AccuracyMatrix

_IGNORED = ("run/seed", "run/out", "tracking/", "checkpoint/", "run/poll_steps", "run/timeout")
"""Keys that do not make two runs different experiments."""

_LONGEST = 90  # characters of a variant's name
_DRAWS = ("ids", "counts", "labels", "thumbnails")


@dataclass(frozen=True)
class Run:
    """What a run folder holds; a run that is not over has an empty ``summary``.

    ``draws``: by round, the arrays of its file in ``OUT/draws``, see ``RoundRecorder``.
    """

    folder: Path
    state: str
    reason: str
    config: dict[str, Any]
    summary: dict[str, Any]
    lines: list[dict[str, Any]]
    draws: dict[int, dict[str, npt.NDArray[Any]]]

    @property
    def name(self) -> str:
        """The folder's own name."""
        return self.folder.resolve().name

    @property
    def metric(self) -> str:
        """What the accuracy matrix holds: accuracy, r2, or another score."""
        if self.summary:
            return str(self.summary.get("metric", "accuracy"))
        given = self.config.get("model", {}).get("score") or ""
        leading = str(given if isinstance(given, str) else given[0]).rpartition(":")[2]
        r2 = any(k.startswith("r2/") for line in self.lines for k in line)
        return leading or ("r2" if r2 else "accuracy")

    @property
    def words(self) -> Words:
        """How its score is told."""
        lower = any("higher_is_better" in line for line in self.lines)  # said only if it is not
        higher = self.summary.get("higher_is_better", not lower)
        return words_of(self.metric, higher=bool(higher))

    @property
    def accuracy(self) -> list[list[float | None]]:
        """The accuracy matrix; of a run that is not over, from ``metrics.jsonl``."""
        if self.summary:
            return list(self.summary.get("accuracy") or [])
        rows = [
            [value for key, value in line.items() if self._is_entry(key)] for line in self.lines
        ]
        rows = [row for row in rows if row]
        width = max(map(len, rows), default=0)
        return [row + [None] * (width - len(row)) for row in rows]

    @property
    def rounds(self) -> list[dict[str, Any]]:
        """The reports of its rounds, as in ``summary.json``."""
        return list(self.summary.get("rounds") or [])

    def class_names(self, labels: npt.NDArray[Any]) -> list[str]:
        """Return the names of the classes of ``labels``; numbers where they have none."""
        names = self.summary.get("class_names") or []
        return [names[k] if k < len(names) else str(k) for k in labels.tolist()]

    @property
    def row_names(self) -> list[str]:
        """Names of the accuracy matrix's rows."""
        if self.summary:
            return row_names(self.summary)
        rows = len(self.accuracy)
        marked = [line["round"] for line in self.lines if any(map(self._is_entry, line))]
        before = marked.count(0)
        return ["pretrained"] * before + [f"round {k + 1}" for k in range(rows - before)]

    def _is_entry(self, key: str) -> bool:
        """Whether a key of a line of metrics is the leading score on an experience."""
        return re.fullmatch(rf"{re.escape(self.metric)}/\d+", key) is not None

    def matrix(self) -> AccuracyMatrix:
        """Return the accuracy matrix with its metrics: row i has seen experiences 0 to i."""
        matrix = AccuracyMatrix(self.words.higher)
        for i, row in enumerate(self.accuracy):
            matrix.append(row, min(i + 1, len(row) - len(untrained(self.summary))))
        return matrix

    def series(self, key: str, at: str) -> tuple[list[float], list[float]]:
        """Return (x, values) of a logged value; x is the line's ``at``. Nulls are left out."""
        found = [(line.get(at), line.get(key)) for line in self.lines if key in line]
        known = [(float(x), float(v)) for x, v in found if x is not None and v is not None]
        return [x for x, _ in known], [v for _, v in known]

    def watched(self) -> str:
        """Return the name of the metric that was watched, or ''."""
        keys = (key for line in self.lines for key in line if key.startswith("monitor/"))
        return next(keys, "").removeprefix("monitor/")


def read_run(folder: Path) -> Run:
    """Read a run folder. Raises UsageError naming the file if something in it cannot be used."""
    status, summary = read_json(folder, "status.json"), read_json(folder, "summary.json")
    if status is None and summary is None:
        raise UsageError(
            f"'{folder}' is not a run folder: it has neither status.json nor summary.json"
        )
    status = status or {"state": "done"}
    over = status.get("state") == "done"
    return Run(
        folder=folder,
        state=str(status.get("state")),
        reason=str(status.get("reason") or ""),
        config=_read_config(folder / "config.toml"),
        summary=(summary or {}) if over else {},
        lines=read_metrics(folder),
        draws={
            int(path.stem.removeprefix("round-")): _read_draws(path)
            for path in sorted((folder / "draws").glob("round-*.npz"))
        },
    )


def variants(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Group runs whose configurations differ in nothing but the seed and where results go.

    A group is named by the keys in which it differs from the others; where those are too many to be
    read in a plot, by its first run's folder.
    """
    configs = [
        {
            key: value
            for key, value in flat_values(run.config).items()
            if not key.startswith(_IGNORED)
        }
        for run in runs
    ]
    keys = sorted({key for one in configs for key in one})
    differing = [key for key in keys if len({repr(one.get(key)) for one in configs}) > 1]
    found: dict[str, list[Run]] = {}
    for run, one in zip(runs, configs, strict=True):
        values = (
            f"{key.split('/', 1)[-1].replace('/', '.')} = {one.get(key, '–')}" for key in differing
        )
        found.setdefault(", ".join(values) or "all runs", []).append(run)
    if max(map(len, found), default=0) <= _LONGEST:
        return found
    groups: dict[str, list[Run]] = {}
    for members in found.values():
        name = members[0].name
        groups[name if name not in groups else str(members[0].folder)] = members
    return groups


def _read_config(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UsageError(f"'{path}' cannot be read: {error}") from error


def _read_draws(path: Path) -> dict[str, npt.NDArray[Any]]:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            found = {name: arrays[name] for name in arrays.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UsageError(f"'{path}' cannot be read: {error}") from error
    missing = [name for name in _DRAWS if name not in found]
    if missing:
        raise UsageError(f"'{path}' has no {missing[0]}")
    return found
