"""Load a configuration: defaults, then a TOML file, then the environment, then ``--set``.

Whatever is wrong becomes one ConfigError sentence that names where the value came from, its
``section.key``, what is allowed, and the nearest valid name. Nothing here imports torch.
"""

from __future__ import annotations

import functools
import os
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import tomlkit
from pydantic import ValidationError
from pydantic_core import ErrorDetails
from tomlkit.items import Table

from distcl.config import Config, Section
from distcl.config.paths import expanded
from distcl.errors import ConfigError
from distcl.registry import nearest

Given = str | Path | Mapping[str, Any] | Config | None
"""What a configuration is loaded from; see :func:`load_config`."""
Overrides = Sequence[str] | Mapping[str, Any]

ENV_PREFIX = "DISTCL_"
RESERVED_ENV = frozenset({"DISTCL_DEBUG", "DISTCL_MNIST"})
"""Variables with the prefix that are no configuration keys."""

SECTIONS: dict[str, type[Section]] = {
    name: field.annotation  # type: ignore[misc]
    for name, field in Config.model_fields.items()
}
"""The model of each section by name, in the order of the file."""

_GIVEN = "configuration"  # origin of what is no text
_STEP = "is now continual_learning.penalty_step"
_NPY = "is gone: stream.path may be a folder of x.npy, y.npy, and perhaps x_test.npy, y_test.npy"
GONE = {
    "continual_learning.ewc_step": _STEP,
    "continual_learning.kfac_step": _STEP,
    "continual_learning.si_step": _STEP,
    "monitor.reset_detector": "is gone: a round always resets the detector",
    "stream.transition": (
        "is gone: 'abrupt' is stream.transition_fraction = 0, write that; above 0 is gradual"
    ),
    "stream.x": _NPY,
    "stream.x_test": _NPY,
    "stream.y": _NPY,
    "stream.y_test": _NPY,
    "tracking.entity": "is gone: W&B reads the variable WANDB_ENTITY",
    "tracking.mode": "is gone: W&B reads the variable WANDB_MODE",
    "training.on_divergence": (
        "is gone: 'stop' is training.max_rollbacks = 0, write that; above 0 a run that diverges "
        "goes back"
    ),
}
"""Keys that there were, and what to write in their place."""

_WORDS = {
    "integer": "a whole number",
    "number": "a number",
    "boolean": "true or false",
    "string": "a text",
    "object": "a table",
}
_HEADER = re.compile(r"\s*\[+\s*([^\[\]]+?)\s*\]")
_KEY = re.compile(r"""\s*([\w.\-"']+)\s*=""")
_POSITION = re.compile(r"(.*) \(at line (\d+), column (\d+)\)", re.DOTALL)
_SHOWN = 60  # characters of a value that a message repeats


def load_config(
    path: Given = None,
    overrides: Overrides = (),
    environ: Mapping[str, str] | None = None,
) -> Config:
    """Load a configuration. Local; needs no other rank.

    ``path``: a TOML file, sections as a file would have them, ``{"optimizer": {"lr": 0.1}}``, or a
    Config; None for the defaults alone. ``overrides``: ``section.key=value`` as after ``--set``,
    where the value is TOML, else taken as a bare string; or values by ``section.key``. ``environ``:
    where to look for ``DISTCL_SECTION__KEY`` (None: ``os.environ``; not looked at under a Config).
    Later ones win, in this order.

    Raises ConfigError with one or two lines that name the culprit.
    """
    return load_with_origins(path, overrides, environ)[0]


def load_with_origins(
    path: Given = None,
    overrides: Overrides = (),
    environ: Mapping[str, str] | None = None,
) -> tuple[Config, dict[str, str]]:
    """Load as :func:`load_config` does; return also the origin of every ``section.key``.

    That is ``default``, ``file:line``, a variable's name or ``--set``. Keys inside a table of
    options have an origin of their own, ``section.options.key``.
    """
    environ = os.environ if environ is None else environ
    raw: dict[str, dict[str, Any]] = {}
    origins: dict[str, str] = {}
    if isinstance(path, Config):
        raw, environ = path.model_dump(exclude_unset=True), {}
    elif isinstance(path, Mapping):
        tree = {
            str(name): {str(key): deepcopy(value) for key, value in keys.items()}
            if isinstance(keys, Mapping)
            else keys
            for name, keys in path.items()
        }
        _take(tree, lambda _: _GIVEN, raw, origins)
    elif path is not None:
        _read_file(expanded(path), raw, origins)
    for name in sorted(environ):
        if name.startswith(ENV_PREFIX) and name not in RESERVED_ENV:
            parts = name.removeprefix(ENV_PREFIX).lower().split("__")
            _put(raw, origins, parts, environ[name], name)
    if isinstance(overrides, Mapping):
        for key, value in overrides.items():
            _set(raw, origins, key.split("."), deepcopy(value), _GIVEN)
        overrides = ()
    for override in overrides:
        key, equals, text = override.partition("=")
        if not (equals and key.strip()):
            raise ConfigError(f"--set {override}: must have the form section.key=value")
        _put(raw, origins, key.strip().split("."), text.strip(), "--set")
    try:
        config = Config.model_validate(raw, strict=True)
    except ValidationError as error:
        file = path if isinstance(path, str | Path) else None
        raise ConfigError(_sentences(error, origins, file)) from None
    return config, dict.fromkeys(_keys(), "default") | origins


def to_toml(config: Config, origins: Mapping[str, str] | None = None) -> str:
    """Write a configuration as TOML; loading the text gives an equal one.

    With ``origins``, each key is followed by a comment that says where its value came from.
    """
    document = tomlkit.document()
    for section in SECTIONS:
        document.add(section, _table(getattr(config, section).model_dump(), section, origins))
    return tomlkit.dumps(document)


def allowed(section: str, key: str) -> str:
    """Say in words what a key accepts: its choices, or its type and range."""
    return _allowed(_schema(section)[key])


def _read_file(path: Path, raw: dict[str, dict[str, Any]], origins: dict[str, str]) -> None:
    text = _text(path)
    try:
        tree = tomllib.loads(text)
    except RecursionError:
        raise ConfigError(f"{path}: not valid TOML: nested too deeply") from None
    except ValueError as error:  # TOMLDecodeError, or a number of more digits than Python reads
        found = _POSITION.fullmatch(str(error))
        where, why = (f"{path}:{found[2]}:{found[3]}", found[1]) if found else (path, error)
        hint = " (is a text without quotes?)" if why == "Invalid value" else ""
        raise ConfigError(f"{where}: not valid TOML: {why}{hint}") from None
    lines = dict(_lines(text))
    _take(tree, lambda key: _at(path, lines, key), raw, origins)


def _take(
    tree: dict[str, Any],
    at: Callable[[str], str],
    raw: dict[str, dict[str, Any]],
    origins: dict[str, str],
) -> None:
    """Check the names of a file's sections and keys; put them into ``raw``. ``at``: their place."""
    there = (
        f"{name}.{key}" for name, keys in tree.items() if isinstance(keys, dict) for key in keys
    )
    if gone := [key for key in there if key in GONE]:
        raise ConfigError("\n".join(f"{at(key)}: {key} {GONE[key]}" for key in gone))
    for section, values in tree.items():
        origin = at(section)
        if section not in SECTIONS:
            parts = [section, *values][:2] if isinstance(values, dict) else [section]
            raise ConfigError(f"{origin}: {_unknown(parts)}")
        if not isinstance(values, dict):
            raise ConfigError(f"{origin}: {section} must be a section, [{section}]")
        for key, value in values.items():
            _check([section, key], at(f"{section}.{key}"))
            inner = value if isinstance(value, dict) else ()
            for name in [key, *(f"{key}.{k}" for k in inner)]:
                dotted = f"{section}.{name}"
                origins[dotted] = at(dotted)
        raw[section] = values


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text (byte {error.start})") from None
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise ConfigError(f"{path}: is a directory, not a TOML file") from None
    except (OSError, ValueError) as error:  # ValueError: a name that holds a null byte
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"{path}: cannot be read: {reason}") from None


def _lines(text: str) -> Iterator[tuple[str, int]]:
    """Yield (dotted key, line number) of the keys and headers that begin a line.

    Good enough to show; what stands inside a multi-line string may be taken for a key.
    """
    prefix = ""
    for number, line in enumerate(text.splitlines(), 1):
        if header := _HEADER.match(line):
            prefix = header[1].replace('"', "")
            yield prefix, number
        elif key := _KEY.match(line):
            yield f"{prefix}.{key[1]}".strip(".").replace('"', ""), number


def _at(path: Path, lines: Mapping[str, int], dotted: str) -> str:
    """Return file:line of a key, of its first part, or of what holds it."""
    line = lines.get(dotted)
    line = line or next((n for key, n in lines.items() if key.startswith(f"{dotted}.")), None)
    line = line or lines.get(dotted.rpartition(".")[0])
    return f"{path}:{line}" if line else str(path)


def _put(
    raw: dict[str, dict[str, Any]],
    origins: dict[str, str],
    parts: Sequence[str],
    text: str,
    origin: str,
) -> None:
    """Set one value from its text, TOML or else a bare string, in ``raw``."""
    _check(parts, origin)
    bare = len(parts) == 2 and _schema(parts[0])[parts[1]].get("type") == "string"
    value = _value(text)
    _set(raw, origins, parts, text if bare and not isinstance(value, str) else value, origin)


def _set(
    raw: dict[str, dict[str, Any]],
    origins: dict[str, str],
    parts: Sequence[str],
    value: Any,
    origin: str,
) -> None:
    """Set one value in ``raw``."""
    _check(parts, origin)
    section, key, *inner = parts
    table: Any = raw.setdefault(section, {})
    for depth, part in enumerate(parts[1:-1], 2):
        table = table.setdefault(part, {})
        if not isinstance(table, dict):
            raise ConfigError(f"{origin}: {'.'.join(parts[:depth])} is not a table")
    table[parts[-1]] = value
    dotted = ".".join(parts)
    if not inner:  # a whole table replaces what was known of its keys
        for old in [name for name in origins if name.startswith(f"{dotted}.")]:
            del origins[old]
    origins[dotted] = origin
    if inner:
        origins[f"{section}.{key}"] = origin


def _value(text: str) -> Any:
    try:
        table = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):
        return text
    return table["value"] if len(table) == 1 else text


@functools.cache
def _schema(section: str) -> dict[str, dict[str, Any]]:
    """Return the JSON schema of each key of a section."""
    properties: dict[str, dict[str, Any]] = SECTIONS[section].model_json_schema()["properties"]
    return properties


def _keys() -> list[str]:
    return [f"{s}.{key}" for s, model in SECTIONS.items() for key in model.model_fields]


def _allowed(schema: Mapping[str, Any]) -> str:
    if choices := _choices(schema):
        return "one of " + ", ".join(choices) if len(choices) > 1 else f"'{choices[0]}'"
    if "anyOf" in schema:
        return " or ".join(_allowed(option) for option in schema["anyOf"])
    if schema["type"] == "array":
        return f"a list, each item {_allowed(schema['items'])}"
    words = _WORDS[schema["type"]]
    low = high = at_low = at_high = ""
    if "minimum" in schema:
        low, at_low = f"[{_number(schema['minimum'])}", "at least"
    elif "exclusiveMinimum" in schema:
        low, at_low = f"({_number(schema['exclusiveMinimum'])}", "more than"
    if "maximum" in schema:
        high, at_high = f"{_number(schema['maximum'])}]", "at most"
    elif "exclusiveMaximum" in schema:
        high, at_high = f"{_number(schema['exclusiveMaximum'])})", "less than"
    if low and high:
        return f"{words} in {low}, {high}"
    if low or high:
        return f"{words}, {at_low or at_high} {low[1:] or high[:-1]}"
    return words


def _choices(schema: Mapping[str, Any]) -> list[str]:
    return list(schema.get("enum", [schema["const"]] if "const" in schema else []))


def _number(bound: float) -> str:
    bits = int(bound).bit_length() - 1
    return f"2^{bits}" if bits > 30 and bound == 2**bits else f"{bound:g}"


def _check(parts: Sequence[str], origin: str) -> None:
    """Raise ConfigError unless ``parts`` name a key, or something inside a table of options."""
    section, key = parts[0], parts[1] if len(parts) > 1 else ""
    if section not in SECTIONS or key not in SECTIONS[section].model_fields:
        raise ConfigError(f"{origin}: {_unknown(parts)}")
    if len(parts) > 2 and _schema(section)[key].get("type") != "object":
        raise ConfigError(f"{origin}: {section}.{key} is one value, with no '{parts[2]}' in it")


def _unknown(parts: Sequence[str]) -> str:
    section, *rest = parts
    if gone := GONE.get(".".join(parts[:2])):
        return f"{'.'.join(parts[:2])} {gone}"
    namesakes = [key for key in _keys() if key.endswith(f".{parts[-1]}")]
    if section not in SECTIONS and rest:
        what = f"unknown section '{section}'"
        near = get_close_matches(section, SECTIONS, 1, 0.5) + namesakes
    elif section not in SECTIONS:
        what = f"unknown section or key '{section}'"
        near = namesakes + get_close_matches(section, SECTIONS, 1, 0.5)
    elif not rest:
        return f"'{section}' is a section; give a key in it, as {section}.KEY"
    else:
        what = f"unknown key '{'.'.join(parts)}'"
        fields = get_close_matches(rest[0], SECTIONS[section].model_fields, 1, 0.5)
        near = (namesakes if len(namesakes) == 1 else []) + [f"{section}.{f}" for f in fields]
    return f"{what}, did you mean '{near[0]}'?" if near else what


def _sentences(error: ValidationError, origins: Mapping[str, str], path: str | Path | None) -> str:
    """Turn pydantic's findings into a sentence on the first, and the names of the others."""
    found: dict[str, ErrorDetails] = {}
    for details in error.errors():
        found.setdefault(".".join(str(part) for part in details["loc"][:2]), details)
    first, *others = found
    where = origins.get(first) or path or _GIVEN
    rest = f"\nalso wrong: {', '.join(others)}" if others else ""
    return f"{where}: {_sentence(first, found[first])}{rest}"


def _sentence(dotted: str, details: ErrorDetails) -> str:
    value, kind = details["input"], details["type"]
    if kind == "value_error":  # a validator's own words
        words = str(details["ctx"]["error"])
        return f"{dotted}: {words}" if dotted else words
    if kind == "finite_number":
        return f"{dotted} is {value}, but must be finite"
    section, key = dotted.split(".")
    choices = _choices(_schema(section)[key])
    hint = nearest(value, choices) if len(choices) > 1 and isinstance(value, str) else ""
    return f"{dotted} is {_show(value)}, but must be {allowed(section, key)}{hint}"


def _show(value: Any) -> str:
    shown = str(value).lower() if isinstance(value, bool) else repr(value)
    return shown if len(shown) <= _SHOWN else f"{shown[:_SHOWN]}…"


def _table(values: Mapping[str, Any], name: str, origins: Mapping[str, str] | None) -> Table:
    table = tomlkit.table()
    tables = {key: value for key, value in values.items() if isinstance(value, Mapping) and value}
    for key, value in values.items():
        if key in tables:  # sub-tables come last: what follows one would belong to it
            continue
        item = tomlkit.inline_table() if value == {} else tomlkit.item(value)
        if origins is not None:
            item.comment(origins.get(f"{name}.{key}") or origins.get(name, "default"))
        table.add(key, item)
    for key, value in tables.items():
        table.add(key, _table(value, f"{name}.{key}", origins))
    return table
