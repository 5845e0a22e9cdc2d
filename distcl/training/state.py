"""What of a trainer must survive a restart: its parts by name, saved and loaded in this order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from distcl.parallel.saved_slices import SavedSlices, SlicedStateful
from distcl.priority.scoring import Scorer
from distcl.sampling.round_loader import RoundLoader
from distcl.training.optimizer import cloned
from distcl.training.trainer import ContinuousTrainer
from distcl.types import Stateful
from distcl.updaters import Updater


def stateful(trainer: ContinuousTrainer) -> dict[str, Stateful | SlicedStateful]:
    """Return the parts by name. The updater comes last: it builds on the round in progress."""
    parts = trainer.parts
    return {
        "anchor": parts.anchor,
        "optimizer": trainer.optimizer,
        "cache": _Cache(parts.scorer, bool(getattr(parts.stream, "sequential", False))),
        "lanes": _Lanes(trainer, parts.loader),
        "table": trainer.undo,
        "forward": parts.forward,
        "matrix": trainer.matrix,
        "history": trainer.history,
        "bad": trainer.bad,
        "loop": trainer.loop,
        "trainer": trainer,
        "updater": _Updater(parts.updater),
        "tracker": parts.tracker,
    }


@dataclass(frozen=True, slots=True)
class _Cache:
    """The losses by id; of a source that is read in lanes they lie with these."""

    scorer: Scorer
    in_lanes: bool

    def state_dict(self) -> Any:
        return None if self.in_lanes else self.scorer.cache.state_dict()

    def load_state_dict(self, state: Any) -> None:
        if state is not None:
            self.scorer.cache.load_state_dict(state)


@dataclass(frozen=True, slots=True)
class _Lanes:
    """What each rank has of its own of a source that is read in lanes."""

    trainer: ContinuousTrainer
    loader: RoundLoader

    def state_dict(self) -> Any:
        return self.loader.lane_state(self.trainer.stage is not None)

    def load_slices(self, saved: SavedSlices) -> None:
        self.loader.load_lane_states(saved.states)


@dataclass(frozen=True, slots=True)
class _Updater:
    """Slices of statistics, layers that were dealt out, plain values."""

    updater: Updater

    def state_dict(self) -> Any:
        return self.updater.state_dict()

    def load_slices(self, saved: SavedSlices) -> None:
        same = saved.same_layout
        state = saved.own if same else self.updater.merged(saved.states, saved.cut)
        self.updater.load_state_dict(state)
        self.updater.load_state_dict(cloned(self.updater.state_dict()))  # out of the files
