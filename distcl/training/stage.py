"""A round in progress: what must be known to go on with one that was interrupted."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from distcl.data.ids import ids_tensor, tensor_ids
from distcl.types import Experience


@dataclass
class Stage:
    """A round in progress; number 0 is pretraining. ``report`` is what is known of it so far."""

    number: int
    trigger: str
    experience: Experience
    steps: int = 0
    done: int = 0
    loss: float = float("nan")
    seconds: float = 0.0
    report: dict[str, Any] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """What the round is called."""
        return f"round {self.number}" if self.number else "pretraining"

    def state_dict(self) -> dict[str, Any]:
        """Return everything as tensors and plain values."""
        return vars(self) | {"experience": pack_experience(self.experience)}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Stage:
        """Return the stage that ``state_dict`` was called on."""
        return cls(**{**state, "experience": unpack_experience(state["experience"])})


def pack_experience(e: Experience) -> dict[str, Any]:
    """Return an experience as tensors and plain values."""
    train, test = ids_tensor(e.train), ids_tensor(e.test)
    return {"index": e.index, "train": train, "test": test, "name": e.name}


def unpack_experience(state: dict[str, Any]) -> Experience:
    """Return the experience that was packed."""
    train, test = tensor_ids(state["train"]), tensor_ids(state["test"])
    return Experience(state["index"], train, test, state["name"])
