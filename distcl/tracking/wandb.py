"""Weights & Biases: the same run from its first step to its last, however often it is requeued."""

from __future__ import annotations

import netrc
import os
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import wandb
from google.protobuf.message import DecodeError
from wandb.proto.wandb_internal_pb2 import Record

from distcl import __version__
from distcl.config import TrackingConfig
from distcl.tracking.tracker import Draw, Ending, Histogram, ServiceTracker, config_of, flat_values

_BASE_URL = "https://api.wandb.ai"
_INIT_SECONDS, _FINISH_SECONDS = 60.0, 60.0
"""How long a server that does not answer may hold up the start of a run, and its end."""


class WandbTracker(ServiceTracker):
    """Logs to one W&B run, by id; call n of ``log`` is W&B's step n, and ``step`` is its x axis.

    What the run holds already is asked of the server, or offline of the files that earlier
    processes left.
    """

    kind = "wandb"

    def __init__(
        self, config: TrackingConfig, out: Path, run_id: str, tell: Callable[[str], None]
    ) -> None:
        mode = _mode(tell)
        for name in ("CACHE", "DATA", "ARTIFACT"):  # everything that it writes is in the run folder
            os.environ.setdefault(f"WANDB_{name}_DIR", str((out / "wandb").absolute()))
        run_id = run_id or uuid.uuid4().hex[:12]
        super().__init__(out, run_id, rows(out, run_id))
        (out / "wandb").mkdir(parents=True, exist_ok=True)
        self._run = wandb.init(
            project=config.project,
            name=config.name or out.resolve().name,
            id=run_id,
            resume="allow",
            dir=out,
            mode=mode,
            config={**config_of(out), "distcl_version": __version__},
            settings=wandb.Settings(
                silent=True,
                console="off",
                init_timeout=float(os.environ.get("WANDB_INIT_TIMEOUT", _INIT_SECONDS)),
                finish_timeout=_FINISH_SECONDS,
            ),
        )
        self._run.define_metric("*", step_metric="step")
        if mode == "online":
            self._held = self._run.starting_step
            tell(f"[tracking] W&B: {self._run.url}")

    def send(self, values: dict[str, Any], step: int, call: int) -> None:
        """Log one row."""
        row = {name: _wandb(value) for name, value in flat_values(values).items()}
        known = {name: value for name, value in row.items() if value is not None}
        self._run.log({**known, "step": step}, step=call)

    def checkpoint(self, path: Path) -> None:
        """Record a checkpoint as the newest version of an artifact: by reference, not its bytes."""
        artifact = wandb.Artifact(f"checkpoints-{self._run.id}", type="model")
        artifact.add_reference(path.absolute().as_uri(), checksum=False)
        self._run.log_artifact(artifact, aliases=["latest", path.stem])

    def summarize(self, summary: dict[str, Any], draw: Draw | None = None) -> None:
        """Record final numbers, and the accuracy matrix as table and heat map."""
        plain = {
            k: v for k, v in flat_values(summary).items() if isinstance(v, int | float | str | bool)
        }
        self._run.summary.update(plain)
        matrix = summary.get("accuracy") or [[]]
        if not matrix[0]:
            return
        columns: list[str | int] = ["evaluation"]
        columns += [f"experience {j + 1}" for j in range(len(matrix[0]))]
        rows = [[i + 1, *row] for i, row in enumerate(matrix)]
        values: dict[str, Any] = {"accuracy_matrix": wandb.Table(columns=columns, data=rows)}
        if draw is not None:
            path = self._out / "wandb" / "accuracy.png"
            draw(path)
            values["accuracy_heat_map"] = wandb.Image(str(path))
        self._run.log(values, step=self._calls)

    def finish(self, ending: Ending = "done") -> None:
        """Write what is pending and close the run, or this process's part of it."""
        if ending == "preempted":
            self._run.mark_preempting()
        self._run.finish(exit_code=int(ending != "done"))
        wandb.teardown()  # returns when the files are whole, which finish() does not wait for


def _mode(tell: Callable[[str], None]) -> Any:
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


def _wandb(value: Any) -> Any:
    if isinstance(value, Histogram):
        held = value.trimmed()
        return wandb.Histogram(np_histogram=(held.counts.tolist(), held.edges.tolist()))
    return value


# Reads the files that an offline W&B run leaves: blocks of 32 KiB that hold protobuf records.


_BLOCK, _FILE_HEADER, _HEADER = 32768, 7, 7
_WHOLE, _LAST = 1, 4


def records(path: Path) -> Iterator[Any]:
    """Yield every whole record; each piece has a header of CRC (4 bytes), length (2), type (1).

    A file whose writer was killed ends with its last whole record.
    """
    data, at, record = path.read_bytes(), _FILE_HEADER, b""
    while at + _HEADER <= len(data):
        left = _BLOCK - at % _BLOCK
        if left < _HEADER:  # the end of a block is padded
            at += left
            continue
        size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        at += _HEADER + size
        if not kind or at > len(data):
            return
        record += data[at - size : at]
        if kind in (_WHOLE, _LAST):
            try:
                yield Record.FromString(record)
            except DecodeError:
                return
            record = b""


def rows(out: Path, run_id: str) -> int:
    """Return how many rows the offline processes of a run wrote into ``out``: the last's step + 1.

    A row's step is its call's number, and each process begins where those before it ended.
    """
    count = 0
    for path in out.glob(f"wandb/offline-run-*/run-{run_id}.wandb"):
        for record in records(path):
            if record.HasField("history"):
                count = max(count, record.history.step.num + 1)
    return count
