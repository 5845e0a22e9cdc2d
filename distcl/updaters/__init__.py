"""Continual-learning methods, one short file each."""

from __future__ import annotations

from distcl import registry
from distcl.updaters.base import Round, Updater
from distcl.updaters.step import PassSetup, StepResult, UpdaterSetup

__all__ = ["PassSetup", "Round", "StepResult", "Updater", "UpdaterSetup", "create_updater"]


def create_updater(name: str, setup: UpdaterSetup) -> Updater:
    """Return an updater by its registered name or ``package.module:attribute``."""
    updater: Updater = registry.create("updater", name, setup)
    return updater
