"""Sources candidates and online in whole rounds: the same draws everywhere, scores by id."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from distcl import Runtime, registry
from distcl.data.stream import create_stream
from distcl.training.build import assemble
from distcl.priority.round_weights import RoundWeights
from distcl.training.trainer import ContinuousTrainer
from distcl.types import Batch, Ids
from tests.small import small
from tests.spawn import run_ranks

QUICK = (
    "run.precision=fp64",
    "stream.samples_per_experience=151",
    "training.batch_size=20",
    "training.epochs=1",
    "training.pretrain_epochs=1",
)
ONLINE = (
    *QUICK,
    "priority.source=online",
    "priority.signal=entropy",
    "priority.target=history",
    "priority.draw=systematic",
    "priority.refresh_steps=2",
    "priority.min_ess=0.5",
    "priority.min_score=1e-4",
    "continual_learning.importance_alpha=2.0",
)
ER = "continual_learning.update_mode=er"
MIXED = "continual_learning.mix_historic_data=true"
JOBS = {
    "online, history batches": (*ONLINE, ER),
    "online, union, a pool, mixed batches": (
        *ONLINE,
        MIXED,
        "priority.target=union",
        "priority.pool=40",
        "priority.signal=grad_norm",
        "priority.correction=0.5",
    ),
    "candidates, mixed batches": (*QUICK, MIXED, "priority.source=candidates"),
    "candidates of both kinds": (
        *QUICK,
        ER,
        "continual_learning.replay_batch_size=11",
        "priority.source=candidates",
        "priority.candidates=3",
        "priority.target=union",
        "priority.signal=disagreement",
    ),
    "score, corrected": (
        *QUICK,
        "continual_learning.update_mode=der",
        "priority.target=union",
        "priority.signal=fisher",
        "priority.correction=1.0",
    ),
}


def _trainer(runtime: Runtime, out: Path, *keys: str) -> ContinuousTrainer:
    config = small(*keys)
    torch.manual_seed(0)
    stream = create_stream(config.stream, config.run.seed)
    return ContinuousTrainer(assemble(config, runtime, stream, out), config)


def _train(trainer: ContinuousTrainer) -> ContinuousTrainer:
    first, *rest = trainer.parts.stream.experiences
    trainer.pretrain(first)
    for experience in rest:
        trainer.run_round(experience, "scheduled")
    return trainer


def _weights(trainer: ContinuousTrainer) -> np.ndarray:
    parameters = trainer.parts.runtime.strategy.unwrap(trainer.parts.model).parameters()
    return torch.cat([p.detach().reshape(-1) for p in parameters]).numpy()


PARTS = ("cur", "hist")


def _all_jobs(out: Path) -> dict[str, Any]:
    runtime = Runtime(small(*QUICK).run)
    results = {}
    for name, keys in JOBS.items():
        trainer = _train(_trainer(runtime, out, *keys))
        runtime.barrier()  # rank 0 has written its files
        results[name] = (trainer.rounds, _weights(trainer), _histograms(out))
        runtime.barrier()  # all have read them
    return results


def _histograms(out: Path) -> dict[str, list[int]]:
    """The histograms of weights that the second round wrote."""
    with np.load(out / "draws" / "round-0002.npz") as found:
        return {n: found[f"{n}_counts"].tolist() for n in PARTS if f"{n}_counts" in found.files}


def test_draws_and_weights_are_the_same_at_one_two_and_three_ranks(tmp_path: Path) -> None:
    reference = run_ranks(1, _all_jobs, tmp_path)[0]
    for world in (2, 3):
        for results in run_ranks(world, _all_jobs, tmp_path):
            for name, (rounds, weights, histograms) in results.items():
                expected, expected_weights, expected_histograms = reference[name]
                assert histograms == expected_histograms
                digests = [r["draws_sha256"] for r in rounds]
                assert digests == [r["draws_sha256"] for r in expected], (name, world)
                np.testing.assert_allclose(weights, expected_weights, rtol=0, atol=1e-9)
                assert rounds[1]["priority"].keys() == expected[1]["priority"].keys()
    for name, (rounds, _, histograms) in reference.items():
        assert histograms.keys() == rounds[1]["priority"].keys()
        if name.startswith("candidates"):
            numbers = {part: stats["n"] for part, stats in rounds[1]["priority"].items()}
            assert {part: sum(counts) for part, counts in histograms.items()} == numbers
        assert len({r["draws_sha256"] for r in rounds}) == 2
        for stats in rounds[1]["priority"].values():
            assert stats["ess_fraction"] <= 1
        passes = [r["forward_passes_per_sample"] for r in rounds]
        if name.startswith("online"):
            assert passes == [0, 0]
    # candidates: the anchor is one more forward, and in round 2 disagreement has two of them
    assert [r["forward_passes_per_sample"] for r in reference["candidates, mixed batches"][0]] == [
        2,
        2,
    ]
    both = reference["candidates of both kinds"][0]
    assert [r["forward_passes_per_sample"] for r in both] == [2, 3]
    assert both[0]["priority"]["cur"]["n"] == 3 * 151
    assert both[0]["priority"]["hist"]["n"] == 3 * 11 * 8


def test_reading_ahead_in_workers_changes_nothing(tmp_path: Path) -> None:
    runtime = Runtime(small(*QUICK).run)
    keys = (*ONLINE, "training.epochs=3", "priority.refresh_steps=4", ER)
    plain = _train(_trainer(runtime, tmp_path, *keys))
    ahead = _train(_trainer(runtime, tmp_path, *keys, "data.workers=2"))
    digests = [[r["draws_sha256"] for r in t.rounds] for t in (plain, ahead)]
    assert digests[0] == digests[1]
    assert (_weights(plain) == _weights(ahead)).all()


class Watched:
    """Follows a ledger: the score that each id must have, computed from the model by itself."""

    def __init__(self, trainer: ContinuousTrainer) -> None:
        self.trainer = trainer
        self.last: dict[int, float] = {}
        ledger = trainer.parts.updater.setup.ledger
        assert ledger is not None
        self.ledger = ledger
        self._observe = ledger.observe
        ledger.observe = self.observe  # type: ignore[method-assign]

    def observe(self, batch: Batch, outputs: Any, losses: torch.Tensor) -> None:
        parts = self.trainer.parts
        read = parts.stream.read(batch.ids.numpy()).to(parts.runtime.device, parts.runtime.dtype)
        with torch.no_grad():
            p = parts.runtime.strategy.unwrap(parts.model)(read.x).softmax(1)
        entropies = -(p * p.log()).sum(1)
        self.last.update(zip(batch.ids.tolist(), entropies.tolist(), strict=True))
        self._observe(batch, outputs, losses)

    def check(self, ids: Ids) -> None:
        seen = np.array([i for i in ids.tolist() if i in self.last])
        assert len(seen)
        expected = [self.last[i] for i in seen.tolist()]
        np.testing.assert_allclose(self.ledger.table.read(seen), expected, rtol=0, atol=1e-12)


def test_scores_follow_ids_through_mixing_shares_and_eviction(tmp_path: Path) -> None:
    keys = (
        *ONLINE,
        MIXED,
        "continual_learning.current_ratio=0.6",
        "continual_learning.buffer_size=100",
    )
    trainer = _trainer(Runtime(small(*QUICK).run), tmp_path, *keys)
    watched = Watched(trainer)
    first, *rest = trainer.parts.stream.experiences
    trainer.pretrain(first)
    for experience in rest:
        history = trainer.history.ids()
        assert len(history) == 100
        trainer.run_round(experience, "scheduled")
        plan = trainer.parts.loader.round.samplers[0]
        assert plan.options.window
        current, stored = plan.groups(len(plan) - 1)
        assert current.values is None
        assert stored.ids.tolist() == history.tolist()
        batches = np.stack([plan.global_batch(s) for s in range(len(plan) - 2, len(plan))])
        assert np.isin(batches, np.concatenate([history, experience.train])).all()
        # 0.6 · 151 current samples against 0.4 · 100 of the history
        assert (np.isin(batches, history).sum(1) == 6).all()
        watched.check(np.concatenate([history, experience.train]))
    held = trainer.history.ids()
    gone = np.setdiff1d(np.concatenate([history, experience.train]), held)
    trainer.parts.loader.rebuild(3, first.train[:1], held, RoundWeights(), history_batch=False)
    assert not np.isin(gone, watched.ledger.table.ids).any()
    watched.check(held)


@pytest.mark.parametrize("mode", [p.name for p in registry.parts("updater")])
def test_online_takes_the_scores_of_every_updaters_forward(mode: str, tmp_path: Path) -> None:
    trainer = _trainer(
        Runtime(small(*QUICK).run),
        tmp_path,
        *ONLINE,
        "continual_learning.jvp_rho_theta=0.5",
        "priority.target=current",
        f"continual_learning.update_mode={mode}",
    )
    if not trainer.parts.updater.trains:
        return
    watched = Watched(trainer)
    _train(trainer)
    watched.check(trainer.parts.stream.experiences[2].train)
    if trainer.parts.updater.uses_hist_batch:
        watched.check(trainer.parts.stream.experiences[0].train)


def test_history_is_uniform_while_a_round_replays_it_too_often(tmp_path: Path) -> None:
    runtime = Runtime(small(*QUICK).run)
    for limit, uniform in ((0.9, True), (1.2, False), (0.0, False)):
        trainer = _trainer(runtime, tmp_path, *ONLINE, ER, f"priority.max_replay={limit}")
        first, second, _ = trainer.parts.stream.experiences
        trainer.pretrain(first)
        # 8 steps of 20 replay 160 of 151 stored samples: 1.06 each
        weights = trainer.parts.loader.weigh(1, second.train, first.train, True)
        assert ("hist" not in weights.parts) == uniform
        lines = "\n".join(weights.lines())
        assert ("1.06 replays" in lines and "priority.max_replay = 0.9" in lines) == uniform
        assert ("[priority/hist] n=151" in lines) != uniform


def test_loss_weights_reach_the_gradient(tmp_path: Path) -> None:
    trainer = _trainer(Runtime(small(*QUICK).run), tmp_path, *QUICK)
    updater = trainer.parts.updater
    batch = trainer.parts.stream.read(trainer.parts.stream.experiences[0].train[:6])
    batch = batch.to(torch.device("cpu"), torch.float64)
    weights = torch.tensor([0.5, 2.0, 1.0, 0.0, 3.0, 0.1], dtype=torch.float64)
    module = trainer.parts.runtime.strategy.unwrap(trainer.parts.model)
    losses = torch.nn.functional.cross_entropy(module(batch.x), batch.y, reduction="none")
    dense = torch.autograd.grad((weights * losses).sum() / 6, list(module.parameters()))
    weighted = Batch(batch.ids, batch.x, batch.y, 6, weights)
    result = updater.fwd_bwd(weighted, None)
    for parameter, expected in zip(module.parameters(), dense, strict=True):
        torch.testing.assert_close(parameter.grad, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(result.losses, losses.detach())  # as they are
