"""Continual-learning methods, one short file each."""

from __future__ import annotations

from distcl import registry
from distcl.errors import ConfigError
from distcl.updaters.base import Round, StepResult, Updater, UpdaterSetup

__all__ = ["Round", "StepResult", "Updater", "UpdaterSetup", "create_updater"]


def create_updater(name: str, setup: UpdaterSetup) -> Updater:
    """Return an updater by its registered name or ``package.module:attribute``.

    Raises ConfigError if the method cannot run under ``parallel.strategy``, with its reason.
    """
    factory, strategy = registry.resolve("updater", name), setup.runtime.strategy
    reason = getattr(factory, "unsupported", {}).get(strategy)
    if reason is not None:
        raise ConfigError(
            f"continual_learning.update_mode = '{name}' does not work with parallel.strategy = "
            f"'{strategy}': {reason}"
        )
    updater: Updater = registry.create("updater", name, setup)
    return updater
