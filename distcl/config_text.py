"""Texts made from the configuration models: the commented file of ``init``, and docs/CONFIG.md."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from typing import Any

import tomlkit

from distcl.config import Config
from distcl.config_load import ENV_PREFIX, SECTIONS, allowed, to_toml

_INIT_HEAD = """\
# A distcl configuration. Every key stands here with its default; take away the '#' to set one.
"""

_REFERENCE_HEAD = f"""\
# Configuration reference

Written by `distcl config --reference` from the models in `distcl/config/`; do not edit.

A configuration is a TOML file; a key that is left out has its default. Values come from, later
ones winning: the default, the file, an environment variable `{ENV_PREFIX}SECTION__KEY`, and
`--set section.key=value`. The text of a variable or of `--set` is read as TOML, and taken as a bare
string where it is no TOML: `--set run.precision=bf16`, `--set 'model.options.hidden=[64, 64]'`,
`{ENV_PREFIX}MODEL__OPTIONS__HIDDEN='[64, 64]'` (in a variable, keys are lower case). Unknown keys
are errors. `distcl config CONFIG --origins` shows what is in force and where it came from.

An `options` table holds keyword arguments for the factory of the part that `name` (or `signal`)
names; an argument that the factory does not take is an error.
"""


def template() -> str:
    """Return a TOML file in which every key stands commented out, described, at its default."""
    defaults = tomllib.loads(to_toml(Config()))
    blocks = [_INIT_HEAD]
    for section, model in SECTIONS.items():
        lines = [f"[{section}]  # {_title(model.__doc__)}"]
        for key, field in model.model_fields.items():
            accepts = allowed(section, key)
            note = "" if accepts == "a text" else f" ({accepts})"
            lines += ["", f"# {field.description}{note}"]
            lines.append(f"# {key} = {_toml(defaults[section][key])}")
        blocks.append("\n".join(lines) + "\n")
    return "\n".join(blocks)


def reference() -> str:
    """Return docs/CONFIG.md: a table of keys for each section."""
    defaults = tomllib.loads(to_toml(Config()))
    blocks = [_REFERENCE_HEAD]
    for section, model in SECTIONS.items():
        lines = [f"## `[{section}]`", "", _title(model.__doc__), ""]
        lines += ["| key | default | accepts | meaning |", "|---|---|---|---|"]
        for key, field in model.model_fields.items():
            meaning = (field.description or "").replace("<", "\\<").replace("|", "\\|")
            default = _toml(defaults[section][key])
            lines.append(f"| `{key}` | `{default}` | {allowed(section, key)} | {meaning} |")
        blocks.append("\n".join(lines) + "\n")
    return "\n".join(blocks)


def _title(doc: str | None) -> str:
    return (doc or "").strip().partition("\n")[0]


def _toml(value: Any) -> str:
    return "{}" if isinstance(value, Mapping) else tomlkit.item(value).as_string()
