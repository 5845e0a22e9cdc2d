"""``shards.json``: which shards a folder has, with their sizes and digests."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from distcl.config.files import write_atomically
from distcl.errors import DataError

MANIFEST = "shards.json"
_NAME = re.compile(r"(?!\.\.?$)[^/\0]+")  # a file in a folder, nothing beyond it
_HOW = "make it with: distcl shard --index-only"


@dataclass(frozen=True, slots=True)
class Shard:
    """A line of the manifest. ``first_id`` counts from 0 within each split, train or test.

    ``classes``: one more than the largest label; 0: not known.
    """

    name: str
    split: str
    samples: int
    bytes: int
    sha256: str
    first_id: int
    classes: int = 0


@dataclass(frozen=True, slots=True)
class Manifest:
    """The contents of ``shards.json``. ``label``: the member with labels, cls or json:FIELD.

    ``class_names``: of the labels 0, 1, …; empty: not known.
    """

    label: str
    shards: list[Shard]
    class_names: list[str] = field(default_factory=list)

    def split(self, name: str) -> list[Shard]:
        """Return the shards of a split, in the order of their ids."""
        return [shard for shard in self.shards if shard.split == name]


def numbered(label: str, shards: list[Shard], class_names: Sequence[str] = ()) -> Manifest:
    """Return a manifest of these shards, their first ids set by their order."""
    placed, following = [], dict.fromkeys((s.split for s in shards), 0)
    for shard in shards:
        placed.append(Shard(**(asdict(shard) | {"first_id": following[shard.split]})))
        following[shard.split] += shard.samples
    return Manifest(label, placed, list(class_names))


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write ``shards.json``, whole or not at all."""
    found = asdict(manifest)
    if not manifest.class_names:
        del found["class_names"]
    write_atomically(folder / MANIFEST, json.dumps(found, indent=1) + "\n", sync=True)


def read_shards(folder: Path) -> Manifest:
    """Return the manifest of a folder. Raises DataError naming the file, and what is wrong."""
    path = folder / MANIFEST
    try:
        found = json.loads(path.read_bytes())
        shards, names = [_shard(line) for line in found["shards"]], found.get("class_names", [])
        if not isinstance(names, list) or not all(type(name) is str for name in names):
            raise ValueError("class_names must be a list of texts")
        manifest = Manifest(str(found["label"]), shards, names)
    except FileNotFoundError:
        what = "does not exist" if not folder.exists() else f"has no {MANIFEST}; {_HOW} {folder}"
        raise DataError(f"the folder of shards '{folder}' {what}") from None
    except OSError as error:
        raise DataError(f"'{path}' cannot be read: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"'{path}' is damaged ({type(error).__name__}: {error})") from error
    if manifest != numbered(manifest.label, manifest.shards, manifest.class_names):
        raise DataError(f"'{path}' is damaged: first_id is not the sum of the samples before")
    return manifest


def known_names(folder: Path) -> list[str]:
    """Return the names of the classes that a folder's manifest has, if it has one. Local."""
    try:
        return read_shards(folder).class_names
    except DataError:
        return []


def _shard(line: dict[str, Any]) -> Shard:
    shard = Shard(**line)
    numbers = (shard.samples, shard.bytes, shard.first_id, shard.classes)
    texts = (shard.name, shard.split, shard.sha256)
    if not all(type(n) is int and 0 <= n < 1 << 62 for n in numbers):
        raise ValueError(f"bad entry {line}")
    if not all(type(t) is str for t in texts) or not _NAME.fullmatch(shard.name):
        raise ValueError(f"bad entry {line}")
    return shard
