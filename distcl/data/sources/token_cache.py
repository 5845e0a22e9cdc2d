"""Tokens made once: kept in a folder, and mapped from there, so that all ranks share the pages."""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from distcl.config import DataConfig
from distcl.config.files import write_atomically
from distcl.config.paths import reachable
from distcl.data.sources.npy import Array, open_npy
from distcl.data.sources.tokens import TokenSource
from distcl.errors import ConfigError, DataError
from distcl.types import SourceInfo

_FORMAT = 2
_WORDS = (
    *("name", "classes", "class_names", "group_names", "grouped", "varies", "tokens"),
    "tokenizer",
)

log = logging.getLogger("distcl")


def cached(
    data: DataConfig | None, what: dict[str, Any], make: Callable[[], TokenSource]
) -> TokenSource:
    """Return ``make()``; with ``data.cache`` its tokens are mapped from a file there. Local.

    ``what``: all that the tokens depend on, as JSON; of anything else there is another file. The
    first process that comes writes it, while those of the same files wait; if it fails, each of
    them tries, and fails, for itself. A file that is damaged is made anew, and the log says so.
    Raises ConfigError if it cannot be written, and what ``make`` raises.
    """
    if data is None or not data.cache:
        return make()
    folder = reachable(data.cache, ConfigError)
    text = json.dumps([_FORMAT, what], sort_keys=True)
    stem = folder / hashlib.sha256(text.encode()).hexdigest()[:32]
    with _writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = stem.with_suffix(".lock").open("w")
    with lock:
        with suppress(OSError):  # it goes with its process; some disks know no locks
            fcntl.flock(lock, fcntl.LOCK_EX)
        if stem.with_suffix(".json").exists():
            try:
                return _opened(stem)
            except DataError as error:
                log.warning("[data] tokens in data.cache are damaged, and made anew: %s", error)
        made = make()
        with _writing(folder):
            _write(stem, made)
        return _opened(stem)


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"data.cache: '{error.filename or folder}' cannot be written: {error.strerror or error}"
        ) from None


def _files(stem: Path) -> tuple[Path, Path]:
    return stem.with_suffix(".tokens.npy"), stem.with_suffix(".samples.npy")


def _write(stem: Path, source: TokenSource) -> None:
    """Write the arrays, then what says that they are whole."""
    info = source.info
    facts: dict[str, Any] = {name: getattr(info, name) for name in _WORDS}
    facts |= {"end": source.end, "packed": source.packed, "longest": info.longest, "sums": []}
    labels, groups = info.known_labels(), info.groups
    facts |= {"labels": labels is not None, "groups": groups is not None}
    nothing = np.zeros(len(source), dtype=np.int64)
    tokens, starts, lengths = source.arrays
    rows = np.stack(
        [starts, lengths, *(nothing if some is None else some for some in (labels, groups))]
    )
    for path, array in zip(_files(stem), (tokens, rows), strict=True):
        with_it = np.ascontiguousarray(array)

        def write(part: Path, array: Array = with_it) -> None:
            with part.open("wb") as file:
                np.save(file, array)

        write_atomically(path, write, sync=True)
        facts["sums"].append(zlib.crc32(with_it.data))
    write_atomically(stem.with_suffix(".json"), json.dumps(facts), sync=True)
    log.info("[data] %s: %d tokens are kept in '%s'", info.name, len(tokens), stem.parent)


def _opened(stem: Path) -> TokenSource:
    """Return the source over the files. Raises DataError if they are not what was written."""
    path = stem.with_suffix(".json")
    try:
        facts = json.loads(path.read_bytes())
        for name in ("class_names", "group_names"):
            facts[name] = tuple(facts[name])
        tokens, rows = map(open_npy, _files(stem))
        if [zlib.crc32(tokens.data), zlib.crc32(rows.data)] != facts["sums"]:
            raise DataError(f"'{stem}.*.npy' have other checksums than '{path.name}' says")
        starts, lengths, labels, groups = rows
        info = SourceInfo(
            **{name: facts[name] for name in _WORDS},
            longest=facts["longest"],
            labels=labels if facts["labels"] else None,
            groups=groups if facts["groups"] else None,
        )
        return TokenSource(tokens, starts, lengths, facts["end"], facts["packed"], info)
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"'{path}': {type(error).__name__}: {error}") from None
