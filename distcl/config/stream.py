"""The section of the stream: where samples come from, what makes an experience, how they drift."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from pydantic import Field, ValidationError, field_validator, model_validator

from distcl.config.base import Section, known
from distcl.config.paths import PathText
from distcl.registry import nearest

EXPERIENCES = re.compile(
    r"order(:[1-9][0-9]*)?|key:.+|time:(year|month|week|day|hour)(:.+)?|groups", re.DOTALL
)
"""What ``stream.experiences`` may be, if it is a text."""
OF_SOURCE = ("source", "path", "options", "sha256", "test_fraction")
"""Keys that say where samples come from."""


def _source(
    where: str, keys: Collection[str], given: dict[str, Any], here: Mapping[str, Any] | None = None
) -> StreamConfig:
    """Return a stream of one experience without drift. Raises ValueError naming a wrong key."""
    for key in given:
        if key not in keys:
            raise ValueError(f"{where}.{key}: unknown key{nearest(key, keys)}")
    try:
        plain = {"drift": "none", "experiences": 1}
        return StreamConfig.model_validate(plain | dict(here or {}) | given)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join((where, *map(str, first["loc"])))
        raise ValueError(f"{name}: {first['msg'].removeprefix('Value error, ')}") from None


class StreamConfig(Section):
    """Where samples come from, and how they drift."""

    source: str = Field(
        "digits",
        description="digits, arrays, table, folder, torch, mnist, cifar10, cifar100, hf, text, "
        "jsonl, hf_text, shards, or your own",
    )
    path: PathText = Field(
        "",
        description="arrays, mnist: an .npz; arrays: a folder of x.npy and y.npy; table: a .csv, "
        ".tsv or .parquet, or a folder of them; folder: one of class folders; mnist, cifar10, "
        "cifar100: the folder of the files; hf, hf_text: a folder, a file, or a name on the hub; "
        "text: a folder of files or folders; jsonl: a file; shards: their folder",
    )
    options: dict[str, Any] = Field({}, description="keyword arguments of the source's factory")
    general: dict[str, Any] = Field(
        {},
        description="source, path, options, … (keys as here) of general data: samples that "
        "no experience has and no drift changes, replayed from the first round on",
    )
    sha256: dict[str, str] = Field(
        {}, description="SHA-256 that files must have, by name, relative to path; hexadecimal"
    )
    test_fraction: float = Field(
        0.2, gt=0, lt=1, description="share held out per class where there is no test split"
    )
    drift: str | list[str] = Field("rotate", description="drift schedule, or several, in order")
    drift_options: dict[str, dict[str, Any]] = Field(
        {}, description="keyword arguments of a drift schedule, by its name"
    )
    experiences: int | str | list[str | dict[str, Any]] = Field(
        5,
        description="how many experiences the stream has; or what makes one: order:N (N equal "
        "stretches of the samples, in their order), key:COLUMN (a value of a column), "
        "time:year|month|week|day|hour, with another column than the source's own of dates "
        "time:month:COLUMN, groups (those that the source itself has); or a list of sources, each "
        "a path, or a table of source, path, options, … (keys as here); drift is then none, unless "
        "it is given",
    )
    recurring: int = Field(
        0, ge=0, description="K: experience e has concept e mod K, so concepts come again; 0: never"
    )
    samples_per_experience: int = Field(
        0, ge=0, description="training samples of an experience; 0: all that the source has"
    )
    severity: float = Field(
        1.0, ge=0, description="strength of the drift, relative to the schedule's own default"
    )
    transition_fraction: float = Field(
        0.0,
        ge=0,
        le=1,
        description="share of an experience whose samples may still come from the concept before; "
        "0: an abrupt drift",
    )

    @field_validator("source")
    @classmethod
    def _source(cls, value: str) -> str:
        return known("source", value)

    @field_validator("drift")
    @classmethod
    def _drift(cls, value: str | list[str]) -> str | list[str]:
        for name in [value] if isinstance(value, str) else value:
            known("drift", name)
        return value

    @field_validator("sha256")
    @classmethod
    def _sha256(cls, value: dict[str, str]) -> dict[str, str]:
        for name, digest in value.items():
            if not re.fullmatch("[0-9a-fA-F]{64}", digest):
                raise ValueError(f"'{digest}' of '{name}' is not 64 hexadecimal digits")
        return value

    @field_validator("experiences")
    @classmethod
    def _experiences(cls, value: Any) -> Any:
        if isinstance(value, int) and value < 1:
            raise ValueError(f"it is {value}, but must be at least 1")
        if isinstance(value, str) and not EXPERIENCES.fullmatch(value):
            raise ValueError(
                f"'{value}' is no number, and none of order:N, key:COLUMN, "
                "time:year|month|week|day|hour[:COLUMN], groups"
            )
        if value == []:
            raise ValueError("a list of sources has one or more")
        return value

    @model_validator(mode="before")
    @classmethod
    def _own_drift(cls, given: Any) -> Any:
        """What says by itself which samples make an experience drifts by itself."""
        if isinstance(given, dict) and not isinstance(given.get("experiences", 5), int):
            return {"drift": "none", **given}
        return given

    @model_validator(mode="after")
    def _recurring(self) -> StreamConfig:
        if self.recurring and not self.stated:
            raise ValueError("stream.recurring needs stream.experiences to be a number")
        return self

    @model_validator(mode="after")
    def _drift_options(self) -> StreamConfig:
        for name in self.drift_options:
            if name not in self.drifts:
                raise ValueError(
                    f"stream.drift_options.{name}: '{name}' is not in stream.drift = {self.drift!r}"
                )
        return self

    @model_validator(mode="after")
    def _sources(self) -> StreamConfig:
        """Check the keys of general data, and of each source that is listed."""
        if self.general:
            _source("stream.general", (*OF_SOURCE, "experiences"), self.general)
            if "source" not in self.general:
                raise ValueError("stream.general needs a source")
        _ = self.listed
        return self

    @property
    def general_data(self) -> StreamConfig | None:
        """What ``general`` says, as a stream of one experience without drift; None: nothing."""
        return _source("stream.general", self.general, self.general) if self.general else None

    @property
    def stated(self) -> int:
        """The number of experiences; 0 where the data say it."""
        return self.experiences if isinstance(self.experiences, int) else 0

    @property
    def concepts(self) -> int:
        """The number of concepts; 0 where the data say it."""
        return min(self.recurring or self.stated, self.stated)

    @property
    def grouping(self) -> tuple[str, str, str]:
        """What makes an experience: kind, number or unit, and column; "" for what is not said.

        Of kinds order, key, time and groups; "" where experiences are a number, or sources.
        """
        if not isinstance(self.experiences, str):
            return "", "", ""
        kind, _, rest = self.experiences.partition(":")
        unit, _, column = ("", "", rest) if kind == "key" else rest.partition(":")
        return kind, unit, column

    @property
    def listed(self) -> list[StreamConfig]:
        """The sources that ``experiences`` lists, one an experience; what they leave out is here's.

        Of another ``source`` only the options of its own.
        """
        given = self.experiences if isinstance(self.experiences, list) else []
        mine = {key: getattr(self, key) for key in OF_SOURCE}
        found = []
        for other in given:
            theirs = {"path": other} if isinstance(other, str) else other
            here = mine | ({"options": {}} if "source" in theirs else {})
            found.append(_source("stream.experiences", OF_SOURCE, theirs, here))
        return found

    @property
    def drifts(self) -> list[str]:
        """The drift schedules as a list, in the order they are applied."""
        return [self.drift] if isinstance(self.drift, str) else list(self.drift)
