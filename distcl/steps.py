"""The steps of one round, and what must be known to go on with a round that was interrupted."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from distcl.types import Experience


class Keeper(Protocol):
    """Who saves the run at poll points; see ``distcl.keeper``."""

    def flags(self) -> list[float]:
        """Return this rank's word for the next poll; summed over ranks. Local."""
        ...

    def act(self, flags: Sequence[float]) -> None:
        """Save, or stop the run, as the sums of all ranks' flags say. Collective."""
        ...


@dataclass
class Stage:
    """A round in progress; number 0 is pretraining. ``report`` is what is known of it so far."""

    number: int
    trigger: str
    experience: Experience
    steps: int
    done: int = 0
    loss: float = float("nan")
    seconds: float = 0.0
    report: dict[str, Any] = field(default_factory=dict)

    def state_dict(self) -> dict[str, Any]:
        """Return everything as tensors and plain values."""
        e = self.experience
        return {
            "number": self.number,
            "trigger": self.trigger,
            "experience": {
                "index": e.index,
                "train": torch.from_numpy(e.train),
                "test": torch.from_numpy(e.test),
                "name": e.name,
            },
            "steps": self.steps,
            "done": self.done,
            "loss": self.loss,
            "seconds": self.seconds,
            "report": self.report,
        }

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Stage:
        """Return the stage that ``state_dict`` was called on."""
        e = state["experience"]
        experience = Experience(e["index"], e["train"].numpy(), e["test"].numpy(), e["name"])
        return cls(**{**state, "experience": experience})


class Stopwatch:
    """Seconds since it was made, on top of those of an interrupted run."""

    def __init__(self, before: float = 0.0) -> None:
        self._begun = time.perf_counter() - before

    @property
    def seconds(self) -> float:
        """Seconds so far."""
        return time.perf_counter() - self._begun
