"""Texts made from the configuration models: the commented file of ``init``, and docs/CONFIG.md."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from typing import Any

import tomlkit

from distcl.config import Config
from distcl.config.load import ENV_PREFIX, SECTIONS, allowed, to_toml

RECOMMENDED: dict[str, dict[str, Any]] = {
    "continual_learning": {
        "update_mode": "er",
        "importance_weighting": True,
        "importance_alpha": 2.0,
    },
    "priority": {
        "signal": "entropy",
        "source": "online",
        "refresh_steps": 10,
        "pool": 2000,
        "max_replay": 1.0,
        "target": "history",
        "draw": "systematic",
        "min_ess": 0.5,
        "min_score": 1e-4,
    },
}
"""What ``distcl init`` sets: replay whose history is drawn by the entropy that training tells."""

_INIT_HEAD = """\
# A distcl configuration. Every key stands here: with '#' before it, at its default; without, set to
# what is recommended: replay whose history is drawn by the entropy that training saw. When it helps
# is in docs/METHOD.md. The defaults stay off: without those lines, draws are uniform.
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
    """Return a TOML file in which every key is described: set as recommended, or commented out."""
    defaults = tomllib.loads(to_toml(Config()))
    blocks = [_INIT_HEAD]
    for section, model in SECTIONS.items():
        lines = [f"[{section}]  # {_title(model.__doc__)}"]
        for key, field in model.model_fields.items():
            accepts = allowed(section, key)
            note = "" if accepts == "a text" else f" ({accepts})"
            lines += ["", f"# {field.description}{note}"]
            chosen = RECOMMENDED.get(section, {}).get(key)
            line = f"# {key} = {_toml(defaults[section][key])}"
            lines.append(line if chosen is None else f"{key} = {_toml(chosen)}")
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
