"""Objects of the user's that watch a run from a script or a notebook."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import torch

from distcl.errors import UsageError
from distcl.registry import nearest
from distcl.training.accuracy_matrix import Entry
from distcl.types import Experience


class Callback:
    """What a run calls, on every rank, with the same arguments on each unless it says otherwise.

    An object given as one of ``callbacks`` has some of these methods, and need not be of this
    class. It watches and does not steer: what it does must not differ between ranks where it takes
    part in collectives, and an exception on one rank ends the run on all.
    """

    def on_round_begin(self, number: int, experience: Experience) -> None:
        """Before the first step of a round, or of its rest after a resume; pretraining is 0."""

    def on_step(self, step: int, losses: torch.Tensor) -> None:
        """After a step, counted over the whole run; ``losses`` [b] of this rank's part, detached.

        They are on the device: to look at them makes it wait.
        """

    def on_round_end(self, number: int, report: dict[str, Any], scores: list[Entry]) -> None:
        """After a round's evaluation: its report, as in summary.json, and the matrix's new row."""

    def on_drift(self, position: int) -> None:
        """When the monitor has detected drift, at this sample of the stream."""


_EVENTS = [name for name in vars(Callback) if name.startswith("on_")]


class Callbacks(Callback):
    """Calls the user's objects, in their order. Raises UsageError on what cannot be called."""

    def __init__(self, objects: Sequence[object] = ()) -> None:
        if not isinstance(objects, Sequence):
            raise UsageError(f"callbacks must be a list of objects, not {type(objects).__name__}")
        self._objects = list(objects)
        for one in self._objects:
            if isinstance(one, type):
                raise UsageError(f"callbacks: {one.__name__} is a class; give an object of it")
            names = [name for name in dir(one) if name.startswith("on_")]
            wrong = [name for name in names if name not in _EVENTS]
            if wrong or not names:
                what = (
                    f"'{wrong[0]}'{nearest(wrong[0], _EVENTS)}" if wrong else "none of its methods"
                )
                raise UsageError(
                    f"callbacks: {type(one).__name__} has {what}; there are {', '.join(_EVENTS)}"
                )
            for event in names:
                wanted = [*inspect.signature(getattr(Callback, event)).parameters][1:]
                try:
                    inspect.signature(getattr(one, event)).bind(*wanted)
                except (TypeError, ValueError) as error:
                    raise UsageError(
                        f"callbacks: {type(one).__name__}.{event} is called with "
                        f"({', '.join(wanted)}): {error}"
                    ) from error

    def _call(self, name: str, *values: Any) -> None:
        for one in self._objects:
            if (method := getattr(one, name, None)) is not None:
                method(*values)

    def on_round_begin(self, number: int, experience: Experience) -> None:
        """See the base class."""
        self._call("on_round_begin", number, experience)

    def on_step(self, step: int, losses: torch.Tensor) -> None:
        """See the base class."""
        if self._objects:
            self._call("on_step", step, losses.detach().clone())

    def on_round_end(self, number: int, report: dict[str, Any], scores: list[Entry]) -> None:
        """See the base class."""
        self._call("on_round_end", number, deepcopy(report), list(scores))

    def on_drift(self, position: int) -> None:
        """See the base class."""
        self._call("on_drift", position)
