"""Options of a part, checked against the annotations of its factory."""

from __future__ import annotations

import functools
import reprlib
from collections.abc import Callable
from typing import Annotated, ParamSpec, TypeVar

from pydantic import ConfigDict, Field, ValidationError, validate_call

from distcl.errors import ConfigError

P = ParamSpec("P")
R = TypeVar("R")

Count = Annotated[int, Field(ge=1)]
"""A whole number of at least 1."""

Share = Annotated[float, Field(gt=0, lt=1)]
"""A number between 0 and 1, both excluded."""


def checked(kind: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Check types and ranges of a factory's arguments, as its annotations state them.

    What does not fit raises ConfigError naming ``<kind>.options.<argument>`` and the limit. Lists
    become tuples where the annotation says so, since TOML knows only lists.
    """

    def wrap(factory: Callable[P, R]) -> Callable[P, R]:
        settings = ConfigDict(arbitrary_types_allowed=True, allow_inf_nan=False)
        call = validate_call(config=settings)(factory)

        @functools.wraps(factory)
        def build(*args: P.args, **kwargs: P.kwargs) -> R:
            try:
                return call(*args, **kwargs)
            except ValidationError as error:
                first = error.errors()[0]
                name = ".".join(str(piece) for piece in first["loc"])
                what = first["msg"][0].lower() + first["msg"][1:]
                got = reprlib.repr(first["input"])
                raise ConfigError(f"{kind}.options.{name}: {what}, not {got}") from None

        return build

    return wrap
