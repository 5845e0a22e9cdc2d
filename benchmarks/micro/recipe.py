"""What the recommended recipe costs: steps with replay drawn by its weights, and uniformly."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from benchmarks.micro.measure import CPU, WALL, Work, on_ranks, seconds_of
from benchmarks.micro.rows import Row, compared
from benchmarks.micro.setting import CNN, config_of, stream_of, trainer_of
from distcl.config.reference import RECOMMENDED
from distcl.distributed.runtime import Runtime
from distcl.priority.round_weights import RoundWeights
from distcl.sampling.round_loader import EMPTY
from distcl.training.stage import Stage
from distcl.training.trainer import ContinuousTrainer
from distcl.types import Experience, Ids

STEPS = "benchmarks.micro.recipe:steps"
MODELS: dict[str, tuple[dict[str, Any], int, int, str]] = {
    "perceptron": ({"name": "mlp", "options": {"hidden": [100, 100]}}, 10_000, 10, "<= 1.03"),
    "small convolutional net": (CNN, 1_500, 4, "<= 1.01"),
}
"""Name -> (``[model]``, samples of each experience, turns, target)."""
ONCE = {"batch_size": 50, "epochs": 1}
"""``[training]`` by which a round replays a stored sample once."""
RECIPE = {name: RECOMMENDED[name] for name in ("continual_learning", "priority")}
"""How ``distcl init`` has history drawn; the mean of weights has a row of its own."""


def measure(quick: bool) -> list[Row]:
    """Train whole rounds with ``er``, half of each batch history. ``quick``: fewer samples."""
    rows = []
    for world in (1,) if quick else (1, 2):
        for name, (model, samples, turns, target) in MODELS.items():
            samples, turns = (samples // 5, 3) if quick else (samples, turns)
            ours, theirs, refreshes = on_ranks(world, STEPS, model, samples, turns)
            unit = f"{'CPU ' if world == 1 else ''}ms a step, of uniform replay"
            title = f"recipe, {name}, {world} rank{'s' * (world > 1)}"
            rows.append(compared(title, 1e3 * ours, 1e3 * theirs, unit, target))
            title, unit = f"{title}: refreshes", "ms a step, of uniform replay"
            rows.append(compared(title, 1e3 * refreshes, 1e3 * theirs, unit))
    return rows


def steps(model: dict[str, Any], samples: int, repeats: int) -> list[float]:
    """Return median seconds of a step by the recipe, and with uniform replay. Collective.

    And those of wall time a step that the recipe's last round refreshed scores and weights.
    """
    runtime, works, trainers = Runtime(), list[Work](), list[ContinuousTrainer]()
    with tempfile.TemporaryDirectory() as out:
        for recipe in (RECIPE, {"continual_learning": {"update_mode": "er"}}):
            sections = {"model": model, "training": ONCE, **recipe}
            config = config_of(**sections)
            trainer = trainer_of(config, runtime, stream_of(config, samples), Path(out))
            trainers.append(trainer)
            works.append(round_of(trainer, recipe is RECIPE))
        clock = CPU if runtime.world_size == 1 else WALL
        found = seconds_of(*works, repeats=repeats, clock=clock)
        found.append(trainers[0].parts.loader.round.priority_seconds)
    runtime.close()
    return [seconds * ONCE["batch_size"] / samples for seconds in found]


def round_of(trainer: ContinuousTrainer, weighted: bool) -> Work:
    """Return the work of a whole round, what it begins with included.

    The first experience is new, the second is history. The history has been learned before, so
    that its samples have scores.
    """
    parts, number = trainer.parts, 0
    first, second = parts.stream.experiences

    def train(experience: Experience, history: Ids) -> None:
        nonlocal number
        number += 1
        weights = RoundWeights()
        if weighted:
            weights = parts.loader.weigh(number, experience.train, history, True)
        parts.loader.rebuild(number, experience.train, history, weights, True)
        steps = len(experience.train) // ONCE["batch_size"]
        trainer.loop.run(Stage(number, "bench", experience, steps))

    train(second, EMPTY)
    return lambda: train(first, second.train)
