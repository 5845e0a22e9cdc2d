"""Continual-learning methods, one short file each."""

from __future__ import annotations

from distcl import registry
from distcl.updaters.base import Round, StepResult, Updater, UpdaterSetup

__all__ = ["Round", "StepResult", "Updater", "UpdaterSetup", "create_updater"]


def create_updater(name: str, setup: UpdaterSetup) -> Updater:
    """Return an updater by its registered name or ``package.module:attribute``."""
    updater: Updater = registry.create("updater", name, setup)
    return updater
