"""Every updater over streamed shards, whose lanes cut batches unevenly: as in one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distcl import registry
from distcl.config import StreamConfig
from distcl.data.shards.inputs import open_samples
from distcl.data.shards.writer import write_shards
from distcl.data.stream import create_stream
from distcl.distributed.runtime import Runtime
from distcl.training.build import assemble
from distcl.training.trainer import ContinuousTrainer
from tests.small import small
from tests.spawn import run_ranks

UPDATERS = [part.name for part in registry.parts("updater")]
KEYS = (
    "run.precision=fp64",
    "stream.source=shards",
    "stream.samples_per_experience=150",
    "data.access=stream",
    "data.shuffle_buffer=40",
    "data.lanes=5",
    "priority.signal=loss",
    "priority.correction=1",
    "training.batch_size=20",
    "training.epochs=1",
    "training.pretrain_epochs=1",
    "continual_learning.replay_batch_size=7",  # not the other's size; some parts are empty
    "continual_learning.kfac_every=2",
    "continual_learning.fisher_samples=40",
)


def _runs(folder: Path, out: Path, accumulate: int) -> dict[str, Any]:
    """Pretrain and train two rounds with each updater; return weights and draws of each."""
    keys = (*KEYS, f"stream.path={folder}", f"training.accumulate={accumulate}")
    runtime = Runtime(small(*keys).run)
    found = {}
    for name in UPDATERS:
        config = small(*keys, f"continual_learning.update_mode={name}")
        stream = create_stream(config.stream, config.run.seed, config.data)
        trainer = ContinuousTrainer(assemble(config, runtime, stream, out), config)
        trainer.pretrain(stream.experiences[0])
        for experience in stream.experiences[1:]:
            trainer.run_round(experience, "scheduled")
        module = runtime.strategy.unwrap(trainer.parts.model)
        weights = {n: p.detach().numpy() for n, p in module.named_parameters()}
        digests = [r["draws_sha256"] for r in trainer.rounds]
        staleness = [r.get("guard", {}).get("staleness") for r in trainer.rounds]
        found[name] = (weights, digests, staleness)
    runtime.close()
    return found


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Of one process; of three, each in two parts."""
    folder = tmp_path_factory.mktemp("data")
    config = StreamConfig(source="digits")
    write_shards(open_samples("digits", stream=config), folder / "shards", per_shard=170)
    cuts = ((1, 1), (3, 2))
    return [run_ranks(w, _runs, folder / "shards", folder, parts)[-1] for w, parts in cuts]


@pytest.mark.parametrize("name", UPDATERS)
def test_lanes_train_as_one_process_does(name: str, runs: list[dict[str, Any]]) -> None:
    (one, digests, staleness), (many, drawn, stale) = (run[name] for run in runs)
    assert drawn == digests
    assert stale == pytest.approx(staleness, abs=1e-5)  # equal losses differ in a last bit
    for key, value in one.items():
        np.testing.assert_allclose(many[key], value, rtol=0, atol=1e-9, err_msg=key)
