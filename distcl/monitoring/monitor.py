"""The stream loop around the rounds: watch a metric, detect drift, start a round."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, replace
from math import floor
from typing import Any

import numpy as np

from distcl.config import MonitorConfig
from distcl.data.ids import joined_ids
from distcl.errors import ConfigError
from distcl.monitoring.detection import DriftDetection
from distcl.monitoring.live import LiveEnd
from distcl.sampling.draws import generator
from distcl.training.scores import NotScored
from distcl.training.stage import pack_experience, unpack_experience
from distcl.training.trainer import ContinuousTrainer
from distcl.types import (
    GROWING,
    WAITING,
    WATCHING,
    Detector,
    Experience,
    Ids,
    exact,
    unpack_ids,
)

log = logging.getLogger("distcl")

_SPLIT = 0x5E1D
_PLACES = ("watched", "measured", "_pretrained_on", "_last_round", "_quiet_until")


@dataclass(frozen=True, slots=True)
class _Due:
    """A drift that waits for its round: the sample that gave it away, and how many must be there.

    ``ready``: samples, from the start of the stream, that have come (with labels, if a round is to
    learn from them) before the drift is dealt with.
    """

    sample: int
    ready: int

    def met(self, have: int, least: int, ended: bool) -> bool:
        """Tell whether enough samples are there; ``ended``: no more will come."""
        return have >= least and (have > self.sample if ended else have >= self.ready)


class Monitor:
    """Watches the stream with the model in use. Every method is collective.

    The first part of the first experience pretrains the model (if asked); what follows is watched,
    sample by sample in stream order. The metric is computed by all ranks together; rank 0 feeds
    the detector, and its verdict is every rank's.

    Labels of a sample come ``label_delay`` samples after it, or never. A metric that needs them is
    computed when they come, with the model of that time; one that does not, at once. A round learns
    from labelled samples only, and waits for ``collect`` of them after the drift. Where labels
    never come, drifts are reported and no round starts.
    """

    def __init__(
        self, trainer: ContinuousTrainer, detector: Detector, config: MonitorConfig, seed: int
    ) -> None:
        self.trainer = trainer
        self.config = config
        self.seed = seed
        self.detection = DriftDetection(trainer, detector, config)
        self.experiences: list[Experience] = []
        self.untrained: list[Experience] = []
        """Experiences of the stream of which no round has had a sample, known at the end."""
        self.stream_end: dict[str, Any] | None = None
        """How good the model is on the newest samples of the stream, known at the end."""
        self.drifts: list[int] = []
        self.watched = 0
        """Samples of the stream that have come."""
        self.measured = 0
        """Samples of the stream whose metric the detector has been fed, or that it skips."""
        self._order = joined_ids([e.train for e in trainer.parts.stream.experiences])
        self._live = LiveEnd(trainer.parts.stream, trainer.parts.runtime, self._say)
        self._pretrained_on = 0  # samples of the stream, all labelled, before watching begins
        self._last_round = 0  # samples of the stream that rounds have learned from, or let pass
        self._quiet_until = 0  # the sample from which on the detector may fire
        self._due: _Due | None = None
        self._begun = False

    def run(self) -> None:
        """Watch the whole stream; a round on every drift, unless labels never come."""
        if self.config.label_delay < 0:
            self._say("labels never come (monitor.label_delay = -1): drifts start no rounds")
        self._watch(rounds=self.config.label_delay >= 0)

    def detect(self) -> None:
        """Watch the whole stream and only note drifts."""
        self._watch(rounds=False)

    def _pretrain(self) -> None:
        if self._begun:
            return
        first = self.trainer.parts.stream.experiences[0]
        known, warmup = 0, self.config.warmup
        if self.trainer.training.pretrain_epochs and not self.trainer.pretrained:
            known = max(2, floor(exact(self.config.pretrain_fraction) * len(first.train)))
            known = min(known, len(first.train))
            if self.trainer.stage is None:
                self._form(self._order[:known])
            self.trainer.pretrain(self.experiences[0])
            self.trainer.evaluate(self.experiences, seen=1)
        elif self.detection.compares:
            known, warmup = warmup, 0
            if not 2 <= known <= len(self._order):
                raise ConfigError(
                    f"monitor.metric = '{self.config.metric}' compares samples with those trained "
                    "on; without pretraining it takes the first monitor.warmup samples for these, "
                    f"which is {known} of {len(self._order)}"
                )
        self.watched = self.measured = self._pretrained_on = self._last_round = known
        self._quiet_until = known + warmup
        self.detection.compare_with(self._order[:known])
        self._begun = True
        self.trainer.loop.keeper.round_ended()

    def _watch(self, rounds: bool) -> None:
        """Go through the stream. ``rounds``: drifts start rounds; else they are only noted."""
        self._pretrain()
        if self.trainer.stage is not None:  # a resumed run goes on with its round
            self._deal_with_drift(rounds)
        self._show()
        limit = self.config.max_rounds or math.inf
        late = self.config.label_delay if self.detection.metric.needs_labels else 0
        while self.watched < len(self._order) and len(self.trainer.rounds) < limit:
            self.watched = min(self.watched + self.config.batch_size, len(self._order))
            fired = self._measure(self._labelled if late else self.watched)
            if fired is not None and self._due is None:
                self.drifts.append(fired + late)  # where it could be known
                self._say(f"[drift] at stream position {fired + late}")
                self.trainer.parts.callbacks.on_drift(fired + late)
                self._due = _Due(fired, fired + self.config.collect + 1)
            if self.watched == len(self._order):
                more = self._live.wait(self._show_waiting)
                self._order = joined_ids([self._order, more])
                if len(more):
                    self._show()
            have, ended = self.measured, self.watched == len(self._order)
            have = self._labelled if rounds else have
            if self._due is not None and self._due.met(have, self._last_round + 2, ended):
                self._due = None
                self._deal_with_drift(rounds)
                self._show()
            else:
                self.trainer.loop.keeper.poll()
        if self._due is not None and rounds:
            self._say("the stream ended before labels followed its last drift: no round for it")
        self._look_back()

    def _show(self) -> None:
        """Begin a new bar, as long as what is known of the stream."""
        title, name = GROWING if self._live.open else WATCHING, self.detection.metric_name
        self.trainer.parts.progress.round_begins(title, len(self._order), name)

    def _show_waiting(self, looks: int) -> None:
        """Show that nothing is to be done, and that the run is alive."""
        if looks == 1:
            self.trainer.parts.progress.round_begins(WAITING, 0, self.detection.metric_name)
        self.trainer.parts.progress.step(self.watched, math.nan, 0.0)

    def _look_back(self) -> None:
        """Measure the model on what the stream was, beyond what it was trained on.

        The accuracy matrix gets a column for each experience of the stream of which no round has
        had a sample. ``stream_end`` is of the newest samples that have come since the last round, a
        window at most; if there are none, of those that the last round held out.
        """
        trainer = self.trainer
        trained = {k for e in self.experiences for k in np.unique(unpack_ids(e.train)[0]).tolist()}
        left = [e for e in trainer.parts.stream.experiences if e.index not in trained]
        known = len(self.experiences)
        self.untrained = [replace(e, index=known + k) for k, e in enumerate(left)]
        if self.untrained and not trainer.matrix.rows():
            trainer.evaluate(self.untrained, seen=0)
        else:
            for one in self.untrained:
                try:
                    found = trainer.measure(one)
                except NotScored as error:
                    self._say(f"[stream] {error}")
                    found = [None] * len(trainer.matrices.of)
                trainer.matrices.fill_last(found)
        begin = max(self._last_round, self.watched - self.config.window)
        newest = self._order[begin : self.watched]
        if len(newest) == 0 and self.experiences:
            newest = self.experiences[-1].test
        newest = trainer.bad.without(newest)
        if len(newest) == 0:
            return
        try:
            value = trainer.lead([Experience(known, newest[:0], newest)])
        except NotScored as error:
            self._say(f"[stream] no score of its last {len(newest)} samples: {error}")
            return
        self.stream_end = {"samples": len(newest), trainer.metric: value}
        what = f"{'R²' if trainer.metric == 'r2' else trainer.metric} {value:.3f}"
        if trainer.metric == "accuracy":
            what = f"error {1 - value:.1%}"
        self._say(f"[stream] {what} on its last {len(newest)} samples")
        if self.untrained:
            self._say(f"[stream] {len(self.untrained)} of its experiences never trained on")

    def _deal_with_drift(self, rounds: bool) -> None:
        """Let a round learn from what is labelled, if ``rounds``; the detector begins anew."""
        if rounds:
            labelled = self._labelled
            begin = max(self._last_round, labelled - self.config.window)
            if self.trainer.stage is None:
                experience = self._form(self._order[begin:labelled])
                self.trainer.matrices.fill_last(self.trainer.measure(experience))
            self.trainer.run_round(
                self.experiences[-1], f"drift at {self.drifts[-1]}", held_out=self.experiences
            )
            self.trainer.evaluate(self.experiences, seen=len(self.experiences))
            self._last_round = labelled
            self.detection.compare_with(self._order[begin:labelled])
        self.detection.detector.reset()
        self._quiet_until = self.measured + self.config.cooldown
        self.trainer.loop.keeper.round_ended()

    @property
    def _labelled(self) -> int:
        """Samples, from the start of the stream, whose labels have come."""
        if self.config.label_delay < 0:
            return self._pretrained_on
        return max(self._pretrained_on, self.watched - self.config.label_delay)

    def _measure(self, until: int) -> int | None:
        """Feed the detector up to stream position ``until``; return where it fired, or None."""
        ids = self._order[self.measured : until]
        if len(ids) == 0:
            return None
        fired, mean = self.detection.feed(ids, self._quiet_until - self.measured)
        sample = None if fired is None else self.measured + fired
        self.measured = until
        values = {
            "round": len(self.trainer.rounds),
            "position": self.watched,
            f"monitor/{self.detection.metric_name}": mean,
        }
        self.trainer.parts.tracker.log(values, self.trainer.loop.steps)
        self.trainer.parts.progress.step(self.watched, mean, 0.0)
        return sample

    def _form(self, ids: Ids) -> Experience:
        """Make an experience of stream samples, a random share of them held out."""
        index = len(self.experiences)
        order = generator(self.seed, index, _SPLIT).permutation(len(ids))
        held = max(1, floor(exact(self.config.holdout_fraction) * len(ids)))
        experience = Experience(
            index=index,
            train=ids[np.sort(order[held:])],
            test=ids[np.sort(order[:held])],
            name=f"stream[{len(ids)}]",
        )
        self.experiences.append(experience)
        return experience

    def _say(self, text: str) -> None:
        if self.trainer.parts.runtime.is_main:
            log.info(text)
            self.trainer.parts.progress.message(text)

    def state_dict(self) -> dict[str, Any]:
        """Return what all ranks share, and rank 0's detector: tensors and plain values."""
        return {
            "experiences": [pack_experience(e) for e in self.experiences],
            "drifts": self.drifts,
            "places": {name: getattr(self, name) for name in _PLACES},
            "due": None if self._due is None else [self._due.sample, self._due.ready],
            "begun": self._begun,
            "detection": self.detection.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        self.experiences[:] = [unpack_experience(e) for e in state["experiences"]]
        self.drifts[:] = state["drifts"]
        for name, value in state["places"].items():
            setattr(self, name, value)
        self._due = None if state["due"] is None else _Due(*state["due"])
        self._begun = state["begun"]
        self.detection.load_state_dict(state["detection"])
