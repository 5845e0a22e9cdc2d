"""Drift detectors: river's ADWIN, KSWIN and Page-Hinkley, and a vote among several.

Each watches one number per sample (a loss, an error), on rank 0 only; nothing here communicates.
A detector starts anew after each detection, as river's do. Its state is JSON and of bounded size
(ADWIN's grows with the logarithm of the samples seen), and a restored detector goes on exactly like
one that was never interrupted. river is imported when a detector is made, since that takes most of
a second.

river has no way to save a detector but pickle. Its state is therefore taken as pickle takes it,
attribute by attribute under whatever name, but into plain values, and only of a known kind.
"""

from __future__ import annotations

import base64
import importlib.metadata
import math
import zlib
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from random import Random
from statistics import fmean
from types import MethodType
from typing import Annotated, Any, Literal

from pydantic import Field

from distcl import registry
from distcl.errors import CheckpointError, ConfigError, DivergenceError
from distcl.registry import Count, Share, checked
from distcl.types import Detector

Direction = Literal["up", "both"]
"""Which changes count: rises of the metric (the model got worse), or rises and falls."""


Rises = Callable[[Any, float], Callable[[], bool]]
"""Called with a detector of river's before a value that it takes; the result, called if the value
made it fire, tells whether the metric rose."""


class RiverDetector:
    """One of river's detectors, with a direction and a state that can be saved.

    kind: the class in river; options: the direction, and what a ``kind`` is made with beside
    ``more``; saved with the state. rises: None if the kind knows directions itself.
    """

    def __init__(
        self,
        name: str,
        kind: type,
        options: Mapping[str, Any],
        rises: Rises | None = None,
        **more: str,
    ) -> None:
        self.name = name
        self._options = dict(options)
        self._rises = rises if options["direction"] == "up" else None
        given = {key: value for key, value in options.items() if key != "direction"} | more
        self._make = partial(kind, **given)
        self._river: Any = self._make()

    def update(self, value: float) -> bool:
        """Take the next value; True on drift. Raises DivergenceError if it is not finite."""
        if not math.isfinite(value):
            raise DivergenceError(f"the metric fed to detector '{self.name}' is {value}")
        rose = self._rises(self._river, float(value)) if self._rises else lambda: True
        self._river.update(float(value))
        if not self._river.drift_detected:
            return False
        verdict = rose()
        self.reset()
        return verdict

    def reset(self) -> None:
        """Forget everything seen."""
        self._river = self._make()

    def state_dict(self) -> dict[str, Any]:
        """Return the state, JSON-serializable, to be loaded under the same version of river."""
        return {
            "detector": self.name,
            "options": dict(self._options),
            "river": importlib.metadata.version("river"),
            "state": {name: _plain(value) for name, value in self._attributes(self._river)},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned.

        Raises CheckpointError if it is damaged, or comes from another detector, other options or
        another version of river.
        """
        mine = self.state_dict()
        fresh = self._make()
        try:
            for key in ("detector", "options", "river"):
                if state[key] != mine[key]:
                    raise CheckpointError(
                        f"the saved state of detector '{self.name}' has {key} = {state[key]!r}, "
                        f"this run has {mine[key]!r}"
                    )
            for name, value in self._attributes(fresh):
                setattr(fresh, name, _restored(value, state["state"][name]))
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise CheckpointError(
                f"the saved state of detector '{self.name}' is damaged: {error!r}"
            ) from error
        self._river = fresh

    def _attributes(self, river: Any) -> list[tuple[str, Any]]:
        """Return what a detector holds besides its options and methods."""
        held = vars(river).items()
        return [(k, v) for k, v in held if k not in self._options and not isinstance(v, MethodType)]


def _plain(value: Any) -> Any:
    """Return a value of river's as JSON; raises TypeError if it is of no known kind."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else str(value)  # JSON has no infinity
    if isinstance(value, deque):
        return [float(one) for one in value]
    if isinstance(value, Random):
        version, words, gauss = value.getstate()
        return [version, list(words), gauss]
    if hasattr(value, "__dict__"):
        return {name: _plain(one) for name, one in vars(value).items()}
    state: bytes = value.__getstate__()  # of ADWIN's window: a plain binary record, not a pickle
    return {"bytes": base64.b64encode(state).decode(), "crc32": zlib.crc32(state)}


def _restored(fresh: Any, saved: Any) -> Any:
    """Return the value that :func:`_plain` gave, of the kind of ``fresh``, which may be changed.

    Raises KeyError, TypeError or ValueError if it is damaged.
    """
    if fresh is None or isinstance(fresh, bool | str):
        if type(saved) is not type(fresh) or (isinstance(fresh, str) and saved != fresh):
            raise ValueError(f"it holds {saved!r}")
        return saved
    if isinstance(fresh, int | float):
        return fresh if saved == str(fresh) == "inf" else _finite(saved)
    if isinstance(fresh, deque):
        return deque(map(_finite, saved), fresh.maxlen)
    if isinstance(fresh, Random):
        version, words, gauss = saved
        fresh.setstate((version, tuple(words), gauss))
    elif hasattr(fresh, "__dict__"):
        for name, value in vars(fresh).items():
            setattr(fresh, name, _restored(value, saved[name]))
    else:
        state = base64.b64decode(saved["bytes"], validate=True)
        if zlib.crc32(state) != saved["crc32"]:  # river would panic
            raise ValueError("its checksum is wrong")
        fresh.__setstate__(state)
    return fresh


def _finite(value: Any) -> int | float:
    if type(value) not in (int, float) or not math.isfinite(value):
        raise ValueError(f"it holds {value!r}")
    number: int | float = value
    return number


def _adwin_rises(river: Any, value: float) -> Callable[[], bool]:
    before = (river.total + value) / (river.width + 1)
    # The older part of the window is cut by then: what is left is the time after the change.
    return lambda: bool(river.estimation > before)


def _kswin_rises(river: Any, value: float) -> Callable[[], bool]:
    before = [*river.window, value][-river.window_size :]
    # river has reduced the window to the newest values by then, those that differ.
    return lambda: fmean(river.window) > fmean(before)


@checked("detector")
def adwin(
    *,
    delta: Share = 0.002,
    clock: Count = 32,
    max_buckets: Count = 5,
    min_window_length: Count = 5,
    grace_period: Count = 10,
    direction: Direction = "up",
) -> Detector:
    """Adaptive windowing (Bifet and Gavalda, SDM 2007): a window that is cut where its mean moved.

    delta: confidence, in (0, 1), smaller fires less; clock: values between two checks; max_buckets:
    buckets of each size in the compressed window; min_window_length: shortest part compared;
    grace_period: values before the first check. Unbounded metrics work; the bound on false alarms
    holds for values in [0, 1]. Raises ConfigError on an option out of range.
    """
    options = dict(locals())
    from river.drift import ADWIN

    return RiverDetector("adwin", ADWIN, options, _adwin_rises)


@checked("detector")
def kswin(
    *,
    alpha: Share = 0.005,
    window_size: Count = 100,
    stat_size: Count = 30,
    seed: Annotated[int, Field(ge=0)] = 0,
    direction: Direction = "up",
) -> Detector:
    """Kolmogorov-Smirnov windowing (Raab, Heusinger and Schleif, Neurocomputing 2020).

    The newest ``stat_size`` of ``window_size`` values against as many drawn from the rest (seed: of
    those draws), tested at level ``alpha``, in (0, 1), after every value. For continuous metrics:
    on a steady exponential loss the defaults fire about 7 times in 10,000 values, alpha = 0.0001
    once; ties make the test blunt on errors of 0 or 1. ``direction = "up"`` takes a drift only if
    the newest values have the larger mean, so a change of shape alone needs ``"both"``. Raises
    ConfigError on an option out of range.
    """
    options = dict(locals())
    if window_size < 2 * stat_size:
        raise ConfigError(
            f"detector.options.window_size: must be at least twice stat_size ({stat_size}), "
            f"not {window_size}"
        )
    from river.drift import KSWIN

    return RiverDetector("kswin", KSWIN, options, _kswin_rises)


@checked("detector")
def page_hinkley(
    *,
    min_instances: Count = 30,
    delta: Annotated[float, Field(ge=0)] = 0.005,
    threshold: Annotated[float, Field(gt=0)] = 50.0,
    alpha: Annotated[float, Field(gt=0, le=1)] = 0.9999,
    direction: Direction = "up",
) -> Detector:
    """Page-Hinkley test (Page, Biometrika 1954): the summed excess over the running mean.

    min_instances: values before it may fire; delta: excess that is tolerated, at least 0;
    threshold: sum at which it fires, above 0, in units of the metric; alpha: forgetting factor, in
    (0, 1]. Raises ConfigError on an option out of range.
    """
    options = dict(locals())
    from river.drift import PageHinkley

    return RiverDetector("page_hinkley", PageHinkley, options, mode=direction)


class Ensemble:
    """A vote among detectors that see the same values.

    Detectors notice the same drift at slightly different times, so a member's vote stands for the
    ``window`` values from the one at which it fired. A drift that the vote finds resets all
    members, so that it is found once. needed: votes that make a drift.
    """

    def __init__(self, members: Sequence[Detector], needed: int, window: int) -> None:
        self._members = list(members)
        self._needed = needed
        self._window = window
        self._votes = [0] * len(self._members)  # values for which each member's vote still stands

    def update(self, value: float) -> bool:
        """Take the next value; True when enough members have fired within the window."""
        for index, member in enumerate(self._members):
            fired = member.update(value)
            self._votes[index] = self._window if fired else max(0, self._votes[index] - 1)
        if sum(vote > 0 for vote in self._votes) < self._needed:
            return False
        self.reset()
        return True

    def reset(self) -> None:
        """Reset every member and forget all votes."""
        for member in self._members:
            member.reset()
        self._votes = [0] * len(self._members)

    def state_dict(self) -> dict[str, Any]:
        """Return votes and members' states, JSON-serializable."""
        members = [member.state_dict() for member in self._members]
        return {"votes": list(self._votes), "members": members}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned, all of it or, with a CheckpointError, nothing."""
        votes, members = state.get("votes"), state.get("members")
        count = len(self._members)
        if not (isinstance(votes, list) and isinstance(members, list)) or not (
            len(votes) == len(members) == count and all(isinstance(vote, int) for vote in votes)
        ):
            raise CheckpointError(
                f"the saved state is not that of an ensemble of {count} detectors"
            )
        before = [member.state_dict() for member in self._members]
        try:
            for member, saved in zip(self._members, members, strict=True):
                member.load_state_dict(saved)
        except CheckpointError:
            for member, saved in zip(self._members, before, strict=True):
                member.load_state_dict(saved)
            raise
        self._votes = list(votes)


@checked("detector")
def ensemble(
    *,
    members: Annotated[tuple[str | dict[str, Any], ...], Field(min_length=1)] = (
        "adwin",
        "kswin",
        "page_hinkley",
    ),
    vote: Literal["any", "majority", "unanimous"] = "majority",
    window: Count = 200,
) -> Detector:
    """Several detectors that vote: any of them, more than half, or all.

    members: names of detectors, or tables of a name and that detector's options, as in
    ``members = [{name = "adwin", delta = 0.01}, "page_hinkley"]``; window: values for which a
    member's vote stands. Raises ConfigError naming the member at fault.
    """
    made: list[Detector] = []
    for index, member in enumerate(members):
        options = {"name": member} if isinstance(member, str) else dict(member)
        name = options.pop("name", None)
        where = f"detector.options.members[{index}]"
        if not isinstance(name, str):
            raise ConfigError(f'{where}: has no name; write {{name = "adwin", …}}')
        try:
            made.append(registry.create("detector", name, options=options))
        except ConfigError as error:
            raise ConfigError(f"{where} ('{name}'): {error}") from error
    needed = {"any": 1, "majority": len(made) // 2 + 1, "unanimous": len(made)}[vote]
    return Ensemble(made, needed, window)
