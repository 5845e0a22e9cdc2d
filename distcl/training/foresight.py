"""Steps that would train on one sample, where the model cannot: found before a pass comes to them.

Train-mode BatchNorm over vectors is such a model. What counts is what goes forward together: a
rank's part of a global batch, or of it one of the ``training.accumulate`` parts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from distcl.config import Config
from distcl.data.ids import part_of
from distcl.errors import ConfigError
from distcl.sampling.composition import Mix
from distcl.training.parts import Parts
from distcl.training.stage import Stage
from distcl.types import Experience, SourceInfo
from distcl.updaters import Updater


def foresee(
    updater: Updater, batches: Iterator[tuple[int, int]], what: str, accumulate: int
) -> None:
    """Raise ConfigError if a step ahead trains on one sample, which the model cannot. Local.

    ``batches``: the sizes of the global training and history batches of each step; ``what`` trains.
    """
    seen: set[tuple[int, int]] = set()
    if not updater.setup.passes.alone:
        return
    world = updater.runtime.world_size
    for step, sizes in enumerate(batches, start=1):
        if sizes in seen:
            continue
        seen.add(sizes)
        for rank in range(world):
            own = [hi - lo for lo, hi in (part_of(size, rank, world) for size in sizes)]
            if 1 not in updater.passes(own[0], own[1]):
                continue
            history = f" and a history batch of {sizes[1]}" if sizes[1] else ""
            cut = f", in {accumulate} parts each (training.accumulate)" if accumulate > 1 else ""
            raise ConfigError(
                f"{what}: step {step} has a batch of {sizes[0]}{history}; on {world} "
                f"rank{'s' * (world > 1)}{cut}, rank {rank} would train on one sample at a time, "
                f"and {updater.setup.passes.alone}; change training.batch_size"
                f"{', continual_learning.replay_batch_size' * bool(sizes[1])}, "
                f"training.accumulate, stream.samples_per_experience or the number of processes, "
                "or take GroupNorm for BatchNorm"
            )


def foresee_stage(parts: Parts, stage: Stage, accumulate: int) -> None:
    """Raise as :func:`foresee` for a round whose draws are set up. Local."""
    what = f"{stage.title}, on experience {stage.experience.index + 1}"
    foresee(parts.updater, parts.loader.batch_sizes(stage.steps), what, accumulate)


def foresee_rounds(
    updater: Updater, config: Config, experiences: Sequence[Experience], info: SourceInfo
) -> None:
    """Raise as :meth:`foresee` for rounds on ``experiences`` one by one, before the first. Local.

    Rounds are left out whose batches are not known yet: then they are looked at as they begin.
    """
    training, continual, own = config.training, config.continual_learning, 0
    mix = Mix(training, continual, union=False)
    online = continual.importance_weighting and config.priority.source == "online"
    skips = config.data.on_bad_sample == "skip" or info.sequential
    general = 0 if info.general is None else len(info.general)
    for k, experience in enumerate(experiences):
        n, plain = len(experience.train), k == 0 and training.pretrain_epochs > 0
        held = 0 if plain else general + own
        unsure = not plain and (online or (held > 0 and training.accept == "improves"))
        if not (skips or unsure or config.model.pretrained):
            steps = mix.steps(n, held, training.pretrain_epochs if plain else None)
            batches = mix.batch_sizes(n, held, updater.uses_hist_batch and held > 0, steps)
            what = "pretraining" if plain else f"the round on experience {k + 1}"
            foresee(updater, batches, what, training.accumulate)
        if continual.history_of == "all":
            own = min(own + n, continual.buffer_size or own + n)
