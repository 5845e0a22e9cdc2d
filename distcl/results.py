"""What a run has left, opened from a script or a notebook."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from distcl.api import Part, with_parts
from distcl.config import Config
from distcl.config.paths import expanded
from distcl.errors import UsageError

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import nn

    from distcl.checkpoint.predictions import What
    from distcl.reporting.run_reader import Run

log = logging.getLogger("distcl")


class Matrix(NamedTuple):
    """The accuracy matrix: values [R, E], NaN where nothing was measured, and names of both."""

    values: npt.NDArray[np.float64]
    rows: list[str]
    columns: list[str]


def open_run(
    path: str | Path,
    *,
    model: Part | None = None,
    stream: Sequence[Any] | Part | None = None,
    loss: Part | None = None,
    optimizer: Part | None = None,
    score: Part | Sequence[Part] | None = None,
    updater: Part | None = None,
    signal: Part | None = None,
) -> OpenedRun:
    """Open a run folder, of a run that is over or not; or a checkpoint, for its weights. Local.

    Of a run that was given objects, ``load_model`` and ``predict`` need them again, by the same
    keywords as :func:`distcl.train`; ``load_model`` the model alone.

    Raises CheckpointError if it is neither.
    """
    from distcl.checkpoint.export import checkpoints

    folder = expanded(path)
    checkpoints(folder)
    given = {"model": model, "source": stream, "loss": loss, "optimizer": optimizer}
    return OpenedRun(folder, given | {"score": score, "updater": updater, "signal": signal})


class OpenedRun:
    """A run folder as :func:`open_run` gives it; ``path``: the folder. Files are read when asked.

    Local, but for ``predict``. Raises errors of ``distcl.errors`` naming what cannot be read.
    """

    def __init__(self, path: Path, given: Mapping[str, Any]) -> None:
        self.path = path
        self._given = given
        self._read: Run | None = None

    def __repr__(self) -> str:
        try:
            state = self._run.state
        except UsageError:
            state = "checkpoint"
        return f"{type(self).__name__}({str(self.path)!r}, {state})"

    @property
    def _run(self) -> Run:
        from distcl.reporting.run_reader import read_run

        if self._read is None or self._read.state != "done":  # it may have gone on
            self._read = read_run(self.path)
        return self._read

    def _parts(self) -> AbstractContextManager[Config]:
        return with_parts(self.config, self._given)

    @property
    def summary(self) -> dict[str, Any]:
        """What summary.json holds; {} of a run that is not over."""
        return self._run.summary

    @cached_property
    def config(self) -> Config:
        """The configuration."""
        from distcl.checkpoint.export import configuration

        return configuration(self.path)

    @property
    def matrix(self) -> Matrix:
        """The accuracy matrix (of the leading score), also of a run that is not over."""
        run = self._run
        rows, names = run.accuracy, run.row_names
        width = len(rows[0]) if rows else 0
        values = np.array(rows, dtype=np.float64).reshape(len(rows), width)
        told = [str(one["name"]) for one in run.summary.get("experiences", [])]
        columns = told if len(told) == width else [f"experience {k + 1}" for k in range(width)]
        return Matrix(values, names, columns)

    def metrics(self) -> Any:
        """Return the lines of metrics.jsonl: a pandas DataFrame, a list of dicts without pandas."""
        try:
            pandas: Any = import_module("pandas")
        except ImportError:
            return list(self._run.lines)
        return pandas.DataFrame(self._run.lines)

    def plot(self, name: str = "accuracy") -> Figure:
        """Return a plot of the report as a matplotlib figure: accuracy, forgetting, loss.

        Raises UsageError naming those there are, more or fewer by what the run did.
        """
        from distcl.reporting.run_section import plots_of

        found = {plot.name: plot.figure for plot in plots_of(self._run)}
        if name not in found:
            known = ", ".join(found) or "none yet"
            raise UsageError(f"'{self.path}' has no plot '{name}'; it has {known}")
        return found[name]

    def report(self, out: str | Path | None = None) -> Path:
        """Write the report, as ``distcl report`` does, and return its file."""
        from distcl.reporting.page import write_report

        file = self.path / "report.html" if out is None else expanded(out)
        write_report([self.path], file)
        return file

    def load_model(self) -> nn.Module:
        """Return the model with the final weights, or the newest checkpoint's: on the CPU, in eval.

        Its inputs are what the stream gives, its outputs logits.
        """
        from distcl.checkpoint.export import trained_model

        with self._parts() as config:
            return trained_model(self.path, config, log.warning)

    def predict(
        self, data: Any = None, what: What = "logits", out: str | Path | None = None
    ) -> dict[str, npt.NDArray[Any]]:
        """Return what the weights say of samples, the same on every rank. Collective.

        ``data``: a map-style dataset of (x, y), or x alone as a tensor or array [N, ...]; None for
        the held-out samples of every experience. ``what``: logits, probs, labels, or
        embedding, the input of the linear layer that runs last; ``out``: an .npz or .parquet file
        that it is written to as well. The result has ``outputs`` [N, ...], ``ids`` [N],
        ``experience`` [N] (from 1) and, where it is a tensor and given, ``y`` [N, ...].

        Raises DataError where samples do not fit the model, ConfigError where ``what`` has no
        meaning, UsageError if ``out`` is there.
        """
        import torch
        from torch.utils.data import Subset, TensorDataset

        from distcl.checkpoint.predictions import predictions_of

        file = None if out is None else expanded(out)
        with self._parts() as config:
            if data is None:
                return predictions_of(self.path, what, None, config, file)[0]
            bare = isinstance(data, torch.Tensor | np.ndarray)
            if bare:
                x = torch.as_tensor(data)
                data = TensorDataset(x, torch.zeros(len(x), dtype=torch.int64))
            pair = [(Subset(data, [0]) if hasattr(data, "__getitem__") else data, data)]
            with with_parts(Config(), {"source": pair}) as other:
                drop = ("y",) if bare else ()
                return predictions_of(self.path, what, other.stream, config, file, drop)[0]
