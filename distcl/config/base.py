"""What the sections have in common."""

from __future__ import annotations

from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from distcl import registry
from distcl.errors import ConfigError


class Section(BaseModel):
    """Base of every section: unknown keys are errors, values never change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Table(Section):
    """Base of what a key holds that is a table itself."""

    @classmethod
    def of(cls, table: dict[str, Any]) -> Self:
        """Check a table as it stands in a file. Raises ValueError naming what does not fit."""
        try:
            return cls.model_validate(table, strict=True)
        except ValidationError as error:
            first = error.errors()[0]
            name = ".".join(str(part) for part in first["loc"])
            if first["type"] == "extra_forbidden":
                near = registry.nearest(name, cls.model_fields)
                near = near or f"; it takes {', '.join(cls.model_fields)}"
                raise ValueError(f"there is no '{name}' in it{near}") from error
            if first["type"] == "missing":
                what = cls.model_fields[name].description
                raise ValueError(f"it needs '{name}', {what}") from error
            what = first["msg"][0].lower() + first["msg"][1:]
            raise ValueError(f"'{name}': {what}, not {first['input']!r}") from error


def known(kind: str, name: str) -> str:
    """Return ``name`` if a part of that kind has it; raises ValueError naming the nearest."""
    try:
        return registry.check(kind, name)
    except ConfigError as error:
        raise ValueError(str(error)) from error
