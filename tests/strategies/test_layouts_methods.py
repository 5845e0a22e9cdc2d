"""Every registered updater, signal and source of priorities under every strategy: as under ddp."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from distcl import registry
from distcl.data.stream import create_stream
from distcl.losses import cross_entropy
from distcl.priority.scoring import Scorer
from distcl.priority.signals import create_signal
from distcl.training.build import assemble
from distcl.training.trainer import ContinuousTrainer
from tests.layouts import available, each, fresh_runtime, gathered, layout_params, tensors
from tests.small import small
from tests.spawn import run_ranks

NAMES = ["ddp", "fsdp2 in units", "zero1", "zero2", "zero3 mixed"]
UPDATERS = [part.name for part in registry.parts("updater")]
SIGNALS = [part.name for part in registry.parts("signal")]
TINY = (
    "stream.samples_per_experience=90",
    "training.epochs=1",
    "training.pretrain_epochs=1",
    "training.batch_size=31",
    "continual_learning.replay_batch_size=13",
    "continual_learning.fisher_samples=21",
    "continual_learning.mer_every=2",
)
sharding = layout_params(NAMES[1:])


VIT = (
    "model.name=vit_tiny",
    "model.options={patch = 4, dim = 12, depth = 2, heads = 2}",
    "continual_learning.update_mode=ewc_online",
)
WAYS = {f"updater {name}": (f"continual_learning.update_mode={name}",) for name in UPDATERS} | {
    "candidates": ("priority.source=candidates",),
    "online": ("priority.source=online", "priority.signal=entropy"),
    "checkpointed blocks": VIT,
}


def _method(layout: str, folder: Path, way: str) -> Any:
    """Pretrain and run two rounds; in two parts a step, and with blocks recomputed, but for ddp."""
    own = layout != "ddp"
    config = small(*TINY, *WAYS[way], f"training.accumulate={2 if own else 1}")
    runtime = fresh_runtime(
        layout,
        training=config.training,
        folder=folder,
        activation_checkpointing=own and way == "checkpointed blocks",
    )
    stream = create_stream(config.stream, config.run.seed)
    parts = assemble(config, runtime, stream, folder)
    trainer = ContinuousTrainer(parts, config)
    first, *rest = stream.experiences
    trainer.pretrain(first)
    for experience in rest:
        trainer.run_round(experience, "scheduled")
    names = list(tensors(runtime.strategy.unwrap(parts.model)))
    return gathered(parts.forward.partition, names)


def _signals(layout: str, folder: Path) -> dict[str, np.ndarray]:
    config = small(*TINY)
    runtime = fresh_runtime(layout, folder=folder)
    stream = create_stream(config.stream, config.run.seed)
    parts = assemble(config, runtime, stream, folder)
    trainer = ContinuousTrainer(parts, config)
    trainer.pretrain(stream.experiences[0])
    trainer.run_round(stream.experiences[1], "scheduled")
    scores = {}
    for name in SIGNALS:
        signal = create_signal(
            name, criterion=cross_entropy, loss="cross_entropy", classes=stream.spec.classes
        )
        scorer = Scorer(parts.forward, parts.anchor, signal, batch_size=40)
        scores[name] = scorer.score(stream, stream.experiences[2].train).cpu().numpy()
    return scores


def _everything(folder: Path, layouts: list[str]) -> dict[str, Any]:
    torch.set_num_threads(1)
    found = {way: each(layouts, _method, folder, way) for way in WAYS}
    return {"ways": found, "signals": each(layouts, _signals, folder)}


@pytest.fixture(scope="module")
def results(tmp_path_factory: Any) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("methods")
    return run_ranks(2, _everything, folder, available(NAMES), timeout=170)[0]


@sharding
@pytest.mark.parametrize("way", list(WAYS))
def test_a_method_trains_as_under_ddp(layout: str, way: str, results: dict[str, Any]) -> None:
    found, reference = (results["ways"][way][name] for name in (layout, "ddp"))
    for name, value in reference.items():
        np.testing.assert_allclose(found[name], value, rtol=0, atol=2e-5)


@sharding
@pytest.mark.parametrize("signal", SIGNALS)
def test_a_signal_scores_as_under_ddp(layout: str, signal: str, results: dict[str, Any]) -> None:
    found, reference = (results["signals"][name][signal] for name in (layout, "ddp"))
    np.testing.assert_allclose(found, reference, rtol=1e-4, atol=2e-5)
