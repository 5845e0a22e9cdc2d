"""A cost model: operations, bytes, seconds of a round, from samples, ranks and parameters."""

from __future__ import annotations

from dataclasses import dataclass

SCORE_BYTES = 8  # a sample's score and loss, float32, gathered
INDEXED_BYTES = 13
"""Of a sampler's plan, a sample: weight 8, drawn position 4, and 1 while it shuffles.

A position takes 8 if there are more than 2**32.
"""
LANE_BYTES = 12
"""Of a lane sampler, a sample of the rank's own: weight and draw; ids are the experience's."""


@dataclass(frozen=True, slots=True)
class Job:
    """A round: priorities for all of ``samples``, then ``steps`` batches of ``batch``.

    ``forward``: operations of one sample's forward; backward takes twice as many. ``passes``: 1 if
    the samples' losses under theta_star are in the cache, 2 if the weights are swapped for them.
    ``streamed``: data that are read from front to back in lanes, of which a rank has its own.
    ``states``: numbers that the optimizer keeps for a weight.
    """

    samples: int
    ranks: int
    parameters: int
    forward: float
    batch: int
    steps: int
    passes: int = 1
    streamed: bool = False
    states: int = 0

    @property
    def flops(self) -> float:
        """Operations of all ranks: forwards that score, forward and backward of the steps."""
        return self.forward * (self.passes * self.samples + 3 * self.batch * self.steps)

    @property
    def sent(self) -> float:
        """Bytes that a rank sends, by ring algorithms, float32.

        Gradients twice around for each step (DDP); the weights once around to swap theta_star in,
        and once to swap it out; scores once around, but those of lanes, which stay where they are.
        """
        others = (self.ranks - 1) / self.ranks
        weights = 4.0 * self.parameters
        swaps = 2 * (self.passes - 1)
        scores = 0 if self.streamed else SCORE_BYTES * self.samples
        return others * (weights * (2 * self.steps + swaps) + scores)

    @property
    def weight_memory(self) -> float:
        """Bytes a rank holds under DDP: weights, gradients, optimizer, and 1/W of theta_star."""
        return 4.0 * self.parameters * (2 + self.states + 1 / self.ranks)

    @property
    def plan_memory(self) -> float:
        """Bytes that a rank's plan of an epoch takes: of all samples, or of its lanes'."""
        if self.streamed:
            return LANE_BYTES * self.samples / self.ranks
        return (INDEXED_BYTES + 4 * (self.samples > 1 << 32)) * float(self.samples)


@dataclass(frozen=True, slots=True)
class Machine:
    """What a rank does in a second: operations in a forward, in a step, bytes, drawn samples."""

    forward: float
    step: float
    bytes: float
    draws: float

    def seconds(self, job: Job) -> float:
        """Return the seconds of a round if nothing overlaps: compute, talk, draws."""
        scoring = job.forward * job.passes * job.samples / job.ranks / self.forward
        training = 3 * job.forward * job.batch * job.steps / job.ranks / self.step
        drawn = job.samples / (job.ranks if job.streamed else 1)
        return scoring + training + job.sent / self.bytes + drawn / self.draws
