"""What the sections have in common."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from distcl import registry
from distcl.errors import ConfigError


class Section(BaseModel):
    """Base of every section: unknown keys are errors, values never change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def known(kind: str, name: str) -> str:
    """Return ``name`` if a part of that kind has it; raises ValueError naming the nearest."""
    try:
        return registry.check(kind, name)
    except ConfigError as error:
        raise ValueError(str(error)) from error
