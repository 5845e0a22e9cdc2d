"""``shards.json``: which shards a folder has, with their sizes and digests."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from distcl.config.files import write_atomically
from distcl.errors import DataError

MANIFEST = "shards.json"
INDEX_ONLY = "make it with: distcl shard --index-only"


def _in_folder(name: str) -> str:
    if not re.fullmatch(r"(?!\.\.?$)[^/\0]+", name):
        raise ValueError("it must be the name of a file in this folder")
    return name


_Text = Annotated[str, Field(strict=True)]
_Name = Annotated[_Text, AfterValidator(_in_folder)]
_Number = Annotated[int, Field(strict=True, ge=0, lt=1 << 62)]


@dataclass(frozen=True, slots=True, config={"extra": "forbid"})
class Shard:
    """A line of the manifest. ``first_id`` counts from 0 within each split, train or test.

    ``classes``: one more than the largest label; 0: not known.
    """

    name: _Name
    split: _Text
    samples: _Number
    bytes: _Number
    sha256: _Text
    first_id: _Number
    classes: _Number = 0


@dataclass(frozen=True, slots=True, config={"extra": "forbid"})
class Texts:
    """Samples are token ids, in ``input_ids.npy``, below ``tokens``, of ``tokenizer``.

    ``longest``: how many the longest sample has, if ``packed`` each; padding is ``end``.
    ``classes``: how many labels ``cls`` may have; 0: there are none, the tokens are the targets.
    ``domains``: names by the number in ``domain``; empty: there are none.
    """

    tokens: _Number
    tokenizer: _Text
    end: _Number
    longest: _Number
    packed: Annotated[bool, Field(strict=True)]
    classes: _Number = 0
    domains: list[_Text] = Field(default_factory=list)

    @property
    def label(self) -> str:
        """What the index has of a sample: its label, its domain, or of both one number."""
        if not self.classes:
            return "domain"
        return f"domain*{self.classes}+cls" if self.domains else "cls"


@dataclass(frozen=True, slots=True)
class Manifest:
    """The contents of ``shards.json``. ``label``: the member with labels, cls or json:FIELD.

    ``class_names``: of the labels 0, 1, …; empty: not known. ``texts``: None if they are none.
    """

    label: _Text
    shards: list[Shard]
    class_names: list[_Text] = Field(default_factory=list)
    texts: Texts | None = None

    def split(self, name: str) -> list[Shard]:
        """Return the shards of a split, in the order of their ids."""
        return [shard for shard in self.shards if shard.split == name]


def numbered(
    label: str,
    shards: Sequence[Shard],
    class_names: Sequence[str] = (),
    texts: Texts | None = None,
) -> Manifest:
    """Return a manifest of these shards, their first ids set by their order."""
    placed, following = [], dict.fromkeys((s.split for s in shards), 0)
    for shard in shards:
        placed.append(replace(shard, first_id=following[shard.split]))
        following[shard.split] += shard.samples
    return Manifest(label, placed, list(class_names), texts)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write ``shards.json``, whole or not at all."""
    found = {key: value for key, value in asdict(manifest).items() if value or key == "shards"}
    write_atomically(folder / MANIFEST, json.dumps(found, indent=1) + "\n", sync=True)


def read_shards(folder: Path) -> Manifest:
    """Return the manifest of a folder. Raises DataError naming the file, and what is wrong."""
    path = folder / MANIFEST
    try:
        manifest = TypeAdapter(Manifest).validate_python(json.loads(path.read_bytes()))
        if manifest != numbered(
            manifest.label, manifest.shards, manifest.class_names, manifest.texts
        ):
            raise ValueError("first_id is not the sum of the samples before")
        if manifest.texts and manifest.texts.label != manifest.label:
            raise ValueError(f"label of such texts is '{manifest.texts.label}'")
    except FileNotFoundError:
        has_no = f"has no {MANIFEST}; {INDEX_ONLY} {folder}"
        what = has_no if folder.exists() else "does not exist"
        raise DataError(f"the folder of shards '{folder}' {what}") from None
    except OSError as error:
        raise DataError(f"'{path}' cannot be read: {error.strerror or error}") from error
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "all of it"
        raise DataError(f"'{path}' is damaged ({place}: {first['msg']})") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"'{path}' is damaged ({error})") from error
    return manifest


def known_manifest(folder: Path, label: str) -> Manifest:
    """Return a folder's manifest; one of no shards, with this label, if it has none. Local."""
    try:
        return read_shards(folder)
    except DataError:
        return Manifest(label, [])
