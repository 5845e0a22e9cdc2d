"""Reads the files that an offline W&B run leaves: blocks of 32 KiB that hold protobuf records."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError
from wandb.proto.wandb_internal_pb2 import Record

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
