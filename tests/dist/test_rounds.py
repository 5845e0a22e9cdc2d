"""Whole rounds on real ranks: the same draws and weights at any world size, and the lag."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from distcl.config import Config
from distcl.data.stream import create_stream
from distcl.training.build import assemble
from distcl.distributed.runtime import Runtime
from distcl.training.trainer import ContinuousTrainer
from distcl.updaters import Updater
from tests.small import execute, small
from tests.spawn import run_ranks

EXACT = ("run.precision=fp64", "continual_learning.mix_historic_data=true")


def _weights(out: Path) -> dict[str, np.ndarray]:
    state = load_file(str(out / "checkpoints" / "final.safetensors"))
    return {name: value.numpy() for name, value in state.items()}


@pytest.mark.parametrize("mode", ["base", "ewc_online"])
def test_draws_and_weights_are_the_same_at_one_two_and_three_ranks(
    mode: str, tmp_path: Path
) -> None:
    overrides = (*EXACT, f"continual_learning.update_mode={mode}", "priority.target=union")
    results = {}
    for world in (1, 2, 3):
        out = tmp_path / str(world)
        summary = run_ranks(world, execute, "train", overrides, out)[0]
        assert summary["world_size"] == world
        results[world] = (summary, _weights(out))
    reference, weights = results[1]
    assert len(reference["rounds"]) == 2
    assert reference["rounds"][1]["priority"]["cur"]["ess_fraction"] < 0.999
    for world in (2, 3):
        summary, others = results[world]
        assert [r["draws_sha256"] for r in summary["rounds"]] == [
            r["draws_sha256"] for r in reference["rounds"]
        ]
        for name, value in weights.items():
            np.testing.assert_allclose(others[name], value, rtol=0, atol=1e-9)


def _trainer(config: Config, out: Path) -> ContinuousTrainer:
    runtime = Runtime(config.run, config.parallel)
    stream = create_stream(config.stream, config.run.seed)
    return ContinuousTrainer(assemble(config, runtime, stream, out), config)


def _dense(trainer: ContinuousTrainer) -> dict[str, torch.Tensor]:
    module = trainer.parts.runtime.strategy.unwrap(trainer.parts.model)
    return {n: p.detach().clone() for n, p in module.named_parameters()}


def _lag(out: Path, misplaced: bool) -> dict[str, Any]:
    """Run three rounds; say whether theta_star was one round behind, and how flat round 2 was."""
    trainer = _trainer(small(), out)
    updater = trainer.parts.updater
    if misplaced:  # the worst bug this project can have
        updater.cl_preprocessing = lambda: None  # type: ignore[method-assign]
        commit = type(updater).cl_postprocessing

        def late(*args: Any) -> None:
            commit(updater, *args)
            updater.anchor.refresh()

        updater.cl_postprocessing = late  # type: ignore[method-assign]
    starts: list[dict[str, torch.Tensor]] = []
    lagged: list[bool] = []
    compute = trainer.parts.loader.weigh

    def watched(*args: Any) -> Any:
        starts.append(_dense(trainer))
        before = starts[-2] if len(starts) > 1 else starts[-1]
        lagged.append(
            all(
                torch.equal(value, before[name].reshape(-1))
                for name, value in updater.theta_star.items()
            )
        )
        return compute(*args)

    trainer.parts.loader.weigh = watched  # type: ignore[method-assign]
    experiences = trainer.parts.stream.experiences
    trainer.pretrain(experiences[0])
    for experience in experiences:
        trainer.run_round(experience, "scheduled")
    flat = [r["priority"]["cur"]["std"] < 1e-12 for r in trainer.rounds]
    return {"lagged": lagged, "flat": flat}


def test_theta_star_lags_one_round_and_priorities_are_not_flat(tmp_path: Path) -> None:
    right = _lag(tmp_path, misplaced=False)
    assert right["lagged"] == [True, True, True]
    assert right["flat"] == [True, False, False]


def test_refreshing_the_anchor_at_the_commit_is_noticed(tmp_path: Path) -> None:
    wrong = _lag(tmp_path, misplaced=True)
    assert not all(wrong["lagged"][1:])
    assert wrong["flat"][1]


def test_importance_off_is_byte_identical_to_a_config_without_the_keys(tmp_path: Path) -> None:
    off = (
        "continual_learning.importance_weighting=false",
        "continual_learning.importance_alpha=2.5",
        "priority.draw=systematic",
        "priority.target=union",
        "priority.floor=0.3",
        "continual_learning.mix_historic_data=true",
    )
    plain = (off[0], off[-1])
    summaries = [
        run_ranks(2, execute, "train", keys, tmp_path / str(k))[0]
        for k, keys in enumerate((off, plain))
    ]
    files = [(tmp_path / str(k) / "checkpoints" / "final.safetensors").read_bytes() for k in (0, 1)]
    assert files[0] == files[1]
    for summary in summaries:
        for report in summary["rounds"]:
            assert report["priority"] == {}
            assert report["forward_passes_per_sample"] == 0


def test_the_loss_cache_saves_a_pass_and_changes_nothing(tmp_path: Path) -> None:
    overrides = (
        "run.precision=fp64",
        "priority.target=union",
        "continual_learning.mix_historic_data=true",
    )

    def rounds(drop_cache: bool) -> ContinuousTrainer:
        trainer = _trainer(small(*overrides), tmp_path)
        experiences = trainer.parts.stream.experiences
        trainer.pretrain(experiences[0])
        for experience in experiences[1:]:
            if drop_cache:
                trainer.parts.scorer.cache.clear()
            trainer.run_round(experience, "scheduled")
        return trainer

    cached, plain = rounds(False), rounds(True)
    assert [r["forward_passes_per_sample"] for r in plain.rounds] == [2.0, 2.0]
    # round 2 scores 903 samples; the losses of 602 are known from round 1
    passes = [r["forward_passes_per_sample"] for r in cached.rounds]
    assert passes == pytest.approx([2.0, 1 + 301 / 903])
    for a, b in zip(cached.rounds, plain.rounds, strict=True):
        assert a["draws_sha256"] == b["draws_sha256"]
    for name, value in _dense(cached).items():
        torch.testing.assert_close(value, _dense(plain)[name], rtol=0, atol=1e-9)


def test_the_cache_is_not_used_when_the_weights_changed_after_scoring(tmp_path: Path) -> None:
    trainer = _trainer(small("run.precision=fp64"), tmp_path)
    stream, scorer = trainer.parts.stream, trainer.parts.scorer
    ids = stream.experiences[0].train
    scorer.score(stream, ids)
    with torch.no_grad():
        for parameter in trainer.parts.model.parameters():
            parameter.add_(0.01)
    trainer.parts.anchor.refresh()  # these are not the weights that were scored
    before = trainer.parts.forward.forwards
    scores = scorer.score(stream, ids)
    assert trainer.parts.forward.forwards - before == 2 * len(ids)
    assert float(scores.max()) == 0


@pytest.mark.parametrize("min_score", [1e-12, 0.03])
def test_min_score_counts_for_an_updaters_priorities_too(min_score: float, tmp_path: Path) -> None:
    keys = (f"priority.min_score={min_score}", "continual_learning.importance_alpha=0.5")
    trainer = _trainer(small("run.precision=fp64", *keys), tmp_path)
    stream, updater = trainer.parts.stream, trainer.parts.updater
    first, second = stream.experiences[:2]
    trainer.run_round(first, "scheduled")
    ids, found = updater.compute_sample_priorities(stream, second.train)
    scores = trainer.parts.scorer.score(stream, second.train).numpy()
    assert (scores < 0.03).any() and (scores > 0.03).any()
    np.testing.assert_array_equal(ids, second.train)
    np.testing.assert_allclose(found, np.maximum(scores, min_score) ** 0.5, rtol=1e-15)
    weights = trainer.parts.loader.weigh(2, second.train, first.train[:0], False)
    np.testing.assert_allclose(weights.parts["cur"].held, found, rtol=1e-15)


def test_base_updater_takes_no_history_batch_and_none_never_trains(tmp_path: Path) -> None:
    assert not Updater.uses_hist_batch
    trainer = _trainer(small("continual_learning.update_mode=none"), tmp_path)
    before = _dense(trainer)
    report = trainer.run_round(trainer.parts.stream.experiences[1], "scheduled")
    assert report["steps"] == 0
    assert report["priority"] == {}
    assert all(torch.equal(before[n], v) for n, v in _dense(trainer).items())
