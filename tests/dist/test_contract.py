"""One suite over every registered part: registering a part is what enrols it here.

All parts of a kind run one after another in the same ranks, so that starting processes costs
little.
"""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._pytree import tree_leaves, tree_map

from distcl import registry
from distcl.config import Config
from distcl.data.stream import create_stream
from distcl.errors import ConfigError
from distcl.training.build import assemble
from distcl.distributed.runtime import Runtime
from distcl.training.trainer import ContinuousTrainer
from distcl.types import Experience
from tests.small import small
from tests.spawn import run_ranks

UPDATERS = [part.name for part in registry.parts("updater")]
DETECTORS = [part.name for part in registry.parts("detector")]
DRIFTS = [part.name for part in registry.parts("drift")]
MODELS = [part.name for part in registry.parts("model")]
KEYS = (
    "run.precision=fp64",
    "stream.samples_per_experience=151",
    "training.batch_size=25",
    "continual_learning.replay_batch_size=20",
    "optimizer.lr=0.05",
    "training.epochs=4",
    "continual_learning.kfac_every=2",
    "continual_learning.fisher_samples=64",
    "priority.signal=loss",  # which tells samples apart in the first round too
    "priority.correction=1",
)
CUTS = ((1, 1), (3, 1), (3, 2))
"""In how many ranks, and parts a rank, a batch is cut."""
OFF = "continual_learning.importance_weighting=false"


def _trainer(runtime: Runtime, config: Config, out: str) -> ContinuousTrainer:
    stream = create_stream(config.stream, config.run.seed, config.data)
    return ContinuousTrainer(assemble(config, runtime, stream, Path(out)), config)


def _weights(trainer: ContinuousTrainer) -> dict[str, np.ndarray]:
    module = trainer.parts.runtime.strategy.unwrap(trainer.parts.model)
    return {n: p.detach().numpy().copy() for n, p in module.named_parameters()}


def _loss(trainer: ContinuousTrainer, experience: Experience) -> float:
    """The mean loss on an experience's training samples."""
    stream, forward = trainer.parts.stream, trainer.parts.forward
    return float(forward.per_sample(stream, experience.train, 64, lambda out, y: out.loss).mean())


def _equal(a: Any, b: Any) -> bool:
    left, right = tree_leaves(a), tree_leaves(b)
    return len(left) == len(right) and all(
        torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y
        for x, y in zip(left, right, strict=True)
    )


def _cloned(state: Any) -> Any:
    return tree_map(lambda v: v.clone() if isinstance(v, torch.Tensor) else copy.copy(v), state)


def _updaters(accumulate: int) -> dict[str, dict[str, Any]]:
    """Train two rounds with each updater; say what the contract asks for.

    Losses are weighted, each sample's by its own factor; batches of 25 and 20 have uneven parts,
    and the last one of an epoch fewer samples than there are parts.
    """
    keys = (*KEYS, f"training.accumulate={accumulate}")
    runtime = Runtime(small(*keys).run)
    found: dict[str, dict[str, Any]] = {}
    for name in UPDATERS:
        config = small(*keys, f"continual_learning.update_mode={name}")
        with tempfile.TemporaryDirectory() as out:
            trainer = _trainer(runtime, config, out)
            experiences = trainer.parts.stream.experiences
            before = _loss(trainer, experiences[1])
            trainer.pretrain(experiences[0])
            begun = _weights(trainer)
            trainer.run_round(experiences[1], "scheduled")
            after = _loss(trainer, experiences[1])
            trainer.run_round(experiences[2], "scheduled")
            updater = trainer.parts.updater
            state = _cloned(updater.state_dict())
            trainer.evaluate(experiences, seen=3)  # and scoring: they leave statistics untouched
            trainer.parts.scorer.score(trainer.parts.stream, experiences[0].test)
            untouched = _equal(state, updater.state_dict())
            updater.load_state_dict(_cloned(state))
            sliced = {n: v for key in updater.sliced for n, v in state[key].items()}
            spans = trainer.parts.forward.partition.ranges()
            found[name] = {
                "weights": _weights(trainer),
                "moved": any(not np.array_equal(begun[n], v) for n, v in _weights(trainer).items()),
                "gain": before - after,
                "digests": [r["draws_sha256"] for r in trainer.rounds],
                "untouched": untouched,
                "reloads": _equal(state, updater.state_dict()),
                "within": all(len(v) == spans[n][1] - spans[n][0] for n, v in sliced.items()),
                "trains": updater.trains,
                "anchor": sum(v.numel() for v in trainer.parts.anchor.theta_star.values()),
            }
    runtime.close()
    return found


@pytest.fixture(scope="module")
def updaters() -> list[list[dict[str, dict[str, Any]]]]:
    return [run_ranks(world, _updaters, parts, timeout=170) for world, parts in CUTS]


@pytest.mark.parametrize("name", UPDATERS)
def test_every_updater_keeps_the_contract(name: str, updaters: Any) -> None:
    one = updaters[0][0][name]
    total = sum(v.size for v in one["weights"].values())
    for result in (rank[name] for ranks in updaters for rank in ranks):
        assert result["moved"] == result["trains"]
        assert result["gain"] > 0 or not result["trains"], "it does not learn"
        assert result["untouched"], "an evaluation or scoring pass changed its statistics"
        assert result["reloads"]
        assert result["within"], "a sliced statistic is more than this rank's slice"
        assert result["digests"] == one["digests"]
        for key, value in one["weights"].items():
            np.testing.assert_allclose(result["weights"][key], value, rtol=0, atol=1e-9)
    for ranks in updaters[1:]:
        assert sum(rank[name]["anchor"] for rank in ranks) == total
        assert max(rank[name]["anchor"] for rank in ranks) <= -(-total // 3)


def _off() -> dict[str, list[bool]]:
    """Whether each updater's weights with importance off ignore every key of importance."""
    found = {}
    extra = ("continual_learning.importance_alpha=3.0", "priority.target=union")
    runtime = Runtime(small(*KEYS).run)
    for name in UPDATERS:
        both = []
        for more in ((), extra):
            config = small(*KEYS, OFF, f"continual_learning.update_mode={name}", *more)
            with tempfile.TemporaryDirectory() as out:
                trainer = _trainer(runtime, config, out)
                for experience in trainer.parts.stream.experiences[:2]:
                    trainer.run_round(experience, "scheduled")
                assert all(r["priority"] == {} for r in trainer.rounds)
                both.append(_weights(trainer))
        found[name] = [np.array_equal(both[0][n], both[1][n]) for n in both[0]]
    return found


def test_importance_off_is_byte_identical_for_every_updater() -> None:
    assert all(all(same) for same in _off().values())


@pytest.mark.parametrize("name", DETECTORS)
def test_every_detector_finds_a_change_and_goes_on_from_its_state(name: str) -> None:
    def make() -> Any:
        options = {"members": ["adwin", "page_hinkley"]} if name == "ensemble" else {}
        return registry.create("detector", name, options=options)

    rng = np.random.default_rng(2)
    values = [*rng.normal(0.2, 0.1, 700), *rng.normal(1.2, 0.1, 300)]
    whole, resumed = make(), make()
    fired = [k for k, value in enumerate(values) if whole.update(value)]
    assert fired and all(k >= 700 for k in fired)
    again = []
    for k, value in enumerate(values):
        if k in (350, 705):
            state = resumed.state_dict()
            resumed = make()
            resumed.load_state_dict(state)
        if resumed.update(value):
            again.append(k)
    assert again == fired
    whole.reset()
    assert not any(whole.update(value) for value in values[:200])


@pytest.mark.parametrize("name", DRIFTS)
def test_every_drift_gives_an_id_the_same_sample_in_any_batch(name: str) -> None:
    config = small(f"stream.drift={name}", "stream.samples_per_experience=0").stream
    stream = create_stream(config, seed=3)
    ids = np.concatenate([e.train[:5] for e in stream.experiences])
    together = stream.read(ids)
    for k, one in enumerate(ids):
        alone = stream.read(np.array([one]))
        assert torch.equal(alone.x[0], together.x[k])
        assert alone.y[0] == together.y[k]
    assert len(np.unique(ids)) == len(ids)


@pytest.mark.parametrize("name", MODELS)
def test_every_model_trains(name: str, tmp_path: Path) -> None:
    options = {
        "mlp": "{hidden=[16]}",
        "resnet18": "{width=8}",
        "vit_tiny": "{patch=4, dim=24, depth=1, heads=2}",
    }
    keys = (f"model.name={name}", f"model.options={options.get(name, '{}')}")
    if name == "decoder":
        options_of_texts = '{domains=["python:topics"], length=16, max_bytes=9000}'
        keys += ("stream.source=text", f"stream.options={options_of_texts}", "stream.drift=none")
        keys += ("stream.experiences=1", "stream.samples_per_experience=0", "model.loss=next_token")
    config = small(OFF, *keys, "optimizer.name=adam", "optimizer.lr=0.003", "training.epochs=4")
    trainer = _trainer(Runtime(config.run), config, str(tmp_path))
    experience = trainer.parts.stream.experiences[0]
    before = _loss(trainer, experience)
    trainer.run_round(experience, "scheduled")
    assert _loss(trainer, experience) < before - 0.1
