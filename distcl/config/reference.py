"""Texts made from the configuration models: the commented file of ``init``, and docs/CONFIG.md."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from typing import Any

import tomlkit

from distcl import registry
from distcl.config import Config
from distcl.config.load import ENV_PREFIX, SECTIONS, allowed, to_toml

RECOMMENDED: dict[str, dict[str, Any]] = {
    "training": {"ema": 0.98},
    "continual_learning": {
        "update_mode": "er",
        "importance_weighting": True,
        "importance_alpha": 2.0,
    },
    "priority": {
        "signal": "entropy",
        "source": "online",
        "refresh_steps": 10,
        "target": "history",
        "draw": "credit",
        "gate": 0.6,
        "min_ess": 0.5,
        "min_score": 1e-4,
    },
}
"""What ``distcl init`` sets: replay whose history is drawn by the entropy that training tells,
uniformly where that tells nothing; and the mean of a round's weights."""

COMMON: dict[str, tuple[str, ...]] = {
    "run": ("seed", "precision"),
    "stream": ("source", "path", "drift", "experiences"),
    "model": ("name", "loss"),
    "optimizer": ("name", "lr"),
    "training": ("batch_size", "epochs"),
    "continual_learning": ("update_mode", "importance_weighting", "importance_alpha"),
    "monitor": ("metric",),
    "detector": ("name",),
    "parallel": ("strategy",),
    "data": ("workers",),
    "checkpoint": ("every_minutes",),
    "tracking": ("kind",),
}
"""Keys that ``distcl init`` writes beside those of ``RECOMMENDED``."""

_INIT_HEAD = """\
# With '#' before it, a key is at its default; without, set to what is recommended: replay that is
# drawn by entropy where that tells something, and the mean of the weights. See docs/METHOD.md.
"""
_INIT_TAIL = "# All keys: distcl init --all, or docs/CONFIG.md.\n"

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


_OPTIONS_HEAD = """\
## Options of the sources

Keys of `[stream.options]` and their defaults; `distcl list source NAME` says what they mean.
"""


def template(every: bool = False) -> str:
    """Return a TOML file of common keys, or ``every`` one: set as recommended, or commented out."""
    defaults = tomllib.loads(to_toml(Config()))
    blocks = [_INIT_HEAD]
    for section, model in SECTIONS.items():
        recommended, common = RECOMMENDED.get(section, {}), COMMON.get(section, ())
        lines = [f"[{section}]  # {_title(model.__doc__)}"]
        for key, field in model.model_fields.items():
            if not (every or key in recommended or key in common):
                continue
            line = f"# {key} = {_toml(defaults[section][key])}"
            if key in recommended:
                line = f"{key} = {_toml(recommended[key])}"
            if every:
                accepts = allowed(section, key)
                note = "" if accepts == "a text" else f" ({accepts})"
                lines += ["", f"# {field.description}{note}", line]
            else:
                lines.append(f"{line:<32}  # {field.description}")
        blocks.append("\n".join(lines) + "\n")
    return "\n".join(blocks if every else [*blocks, _INIT_TAIL])


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
    lines = [_OPTIONS_HEAD, "| source | options |", "|---|---|"]
    for part in registry.parts("source"):
        options = registry.options_of("source", part.name)
        given = ", ".join(
            f"`{name} = {default}`" if default else f"`{name}`, which must be given"
            for name, default in options
        )
        lines.append(f"| `{part.name}` | {given or 'none'} |")
    return "\n".join([*blocks, "\n".join(lines) + "\n"])


def _title(doc: str | None) -> str:
    return (doc or "").strip().partition("\n")[0]


def _toml(value: Any) -> str:
    return "{}" if isinstance(value, Mapping) else tomlkit.item(value).as_string()
