"""er, mer, der, lwf and si on real ranks against dense references, in float64."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterator
from functools import cache
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from distcl.config import StreamConfig
from distcl.data.replay_buffer import ReplayBuffer
from distcl.data.stream import create_stream
from distcl.errors import DistclError
from distcl.training.build import assemble
from distcl.job import run_rounds
from distcl.models import create_model
from distcl.distributed.runtime import Runtime
from distcl.training.trainer import ContinuousTrainer
from distcl.types import Experience, Ids
from distcl.updaters import Round, create_updater
from tests.small import execute, small
from tests.spawn import run_ranks

CASES = {
    "er": (),
    "mer": ("mer_every=3", "mer_rate=0.4"),
    "mer of rate 1": ("mer_every=2", "mer_rate=1.0"),
    "der": ("der_alpha=0.7", "der_beta=0.4"),
    "lwf": ("lwf_alpha=1.5", "lwf_temperature=2.5"),
    "lwf top": ("lwf_alpha=1.5", "lwf_temperature=2.5", "lwf_top_k=3"),
    "lwf mixed": ("lwf_alpha=0.5", "mix_historic_data=true"),
    "si": ("si_c=0.8", "si_xi=0.02", "penalty_step=explicit"),
    "si damped": ("si_c=30.0", "si_xi=0.01"),
}
SIZES = [(7, 5), (2, 4), (1, 1), (6, 2), (3, 3)]  # of current and history batches, a step each
QUIET = ("run.precision=fp64", 'tracking.kind="none"')
CAPACITY, SEED = 25, 5
Steps = list[tuple[Ids, Ids]]


def _config(case: str) -> Any:
    keys = (*CASES[case], f"update_mode={case.split()[0]}")
    return small(*QUIET, *(f"continual_learning.{key}" for key in keys))


def _plan(experiences: list[Experience], mixed: bool) -> Iterator[tuple[Round, Steps]]:
    """Three rounds of 40 samples, most of them never drawn; history batches from round 2 on."""
    history = ReplayBuffer(create_stream(StreamConfig(), 0), CAPACITY, SEED)
    rng = np.random.default_rng(0)
    for experience in experiences:
        ids = experience.train[:40]
        pool = np.concatenate([ids, history.ids()]) if mixed else ids
        past = history.ids() if len(history) else np.empty(0, dtype=np.int64)
        steps = [
            (rng.choice(pool, cur), rng.choice(past, hist) if len(past) else past)
            for cur, hist in SIZES
        ]
        kept = history.after(ids)
        yield Round(None, ids, past, lambda _, kept=kept: kept), steps
        history.add(ids)


def _optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)


def _distributed(case: str, restart: bool) -> dict[str, Any]:
    """Drive an updater through the plan; ``restart``: from its state, in the midst of a round."""
    config, runtime = _config(case), _runtime()
    stream = create_stream(config.stream, config.run.seed)
    parts = assemble(config, runtime, stream, Path())
    updater, optimizer = parts.updater, parts.optimizer
    optimizer.param_groups[0]["momentum"] = 0.9

    def read(ids: Ids) -> Any:
        mine = np.array_split(ids, runtime.world_size)[runtime.rank]
        batch = stream.read(mine).to(runtime.device, runtime.dtype)
        return type(batch)(batch.ids, batch.x, batch.y, len(ids))

    for number, (plan, steps) in enumerate(_plan(stream.experiences, "mixed" in case)):
        updater.begin_round(Round(stream, plan.ids, plan.history, plan.after))
        updater.cl_preprocessing()
        for k, (current, past) in enumerate(steps):
            if restart and number == 1 and k == 2:
                file = io.BytesIO()
                torch.save(updater.state_dict(), file)
                file.seek(0)
                updater = create_updater(case.split()[0], updater.setup)
                updater.begin_round(Round(stream, plan.ids, plan.history, plan.after))
                updater.load_state_dict(torch.load(file, weights_only=True))
            if case == "mer":
                held = updater.start
            updater.update_pre_fwd_bwd()
            updater.fwd_bwd(read(current), read(past) if len(past) else None)
            updater.update_post_fwd_bwd()
            optimizer.step()
            updater.update_post_optimizer_call()
            optimizer.zero_grad(set_to_none=True)
        updater.cl_postprocessing(stream, plan.ids)
    result = {n: p.detach().numpy().copy() for n, p in _module(parts).named_parameters()}
    if case == "der":
        result |= {"ids": updater.stored.ids, "logits": updater.stored.logits.numpy()}
    if "si" in case:
        result["held"] = sum(v.numel() for v in updater.importance.values())
    if case == "mer":
        result["held"] = sum(v.numel() for v in held.values())
    return result


def _all_distributed(restart: bool) -> dict[str, dict[str, Any]]:
    return {case: _distributed(case, restart) for case in CASES}


@cache
def _results(world: int, restart: bool = False) -> list[dict[str, dict[str, Any]]]:
    return run_ranks(world, _all_distributed, restart)


_the_runtime: list[Runtime] = []


def _runtime() -> Runtime:
    """Return this process's one runtime."""
    if not _the_runtime:
        _the_runtime.append(Runtime(_config("er").run))
    return _the_runtime[0]


def _module(parts: Any) -> nn.Module:
    return parts.runtime.strategy.unwrap(parts.model)


# -- the same, dense and in a few lines each ---------------------------------------------------


class Dense:
    """The model, its data, and a loop over the plan's steps."""

    def __init__(self, case: str) -> None:
        config = _config(case)
        self.stream = create_stream(config.stream, config.run.seed)
        self.model = create_model(config.model, self.stream.spec, config.run.seed).double()
        self.optimizer = _optimizer(self.model)
        self.plan = _plan(self.stream.experiences, "mixed" in case)

    def logits(self, ids: Ids) -> torch.Tensor:
        return self.model(self.stream.read(ids).x.double())

    def loss(self, ids: Ids) -> torch.Tensor:
        return F.cross_entropy(self.logits(ids), self.stream.read(ids).y)

    def step(self, loss: torch.Tensor) -> None:
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    def weights(self) -> dict[str, Any]:
        return {n: p.detach().numpy() for n, p in self.model.named_parameters()}


def _er(case: str) -> dict[str, Any]:
    dense = Dense(case)
    for _, steps in dense.plan:
        for current, past in steps:
            dense.step(dense.loss(np.concatenate([current, past])))
    return dense.weights()


def _mer(case: str) -> dict[str, Any]:
    every, rate = (2, 1.0) if "rate" in case else (3, 0.4)
    dense = Dense(case)
    weights = list(dense.model.parameters())
    for _, steps in dense.plan:
        for k, (current, past) in enumerate(steps):
            if k % every == 0:
                start = [w.detach().clone() for w in weights]
            dense.step(dense.loss(np.concatenate([current, past])))
            if k % every == every - 1:
                with torch.no_grad():
                    for w, s in zip(weights, start, strict=True):
                        w.copy_(s + rate * (w - s))
    return dense.weights()


def _der(case: str) -> dict[str, Any]:
    dense, stored = Dense(case), {}
    for plan, steps in dense.plan:
        seen = {}
        for current, past in steps:
            loss, z = dense.loss(current), dense.logits(current).detach()
            if len(past):
                target = torch.stack([stored[i] for i in past.tolist()])
                loss = loss + 0.7 * F.mse_loss(dense.logits(past), target) + 0.4 * dense.loss(past)
            seen |= dict(zip(current.tolist(), z, strict=True))
            dense.step(loss)
        late = dict(zip(plan.ids.tolist(), dense.logits(plan.ids).detach(), strict=True))
        stored = {i: (late | seen | stored)[i] for i in plan.kept.tolist()}
    ids = np.array(sorted(stored))
    logits = torch.stack([stored[i] for i in ids.tolist()]).numpy()
    return dense.weights() | {"ids": ids, "logits": logits}


def _lwf(case: str) -> dict[str, Any]:
    dense = Dense(case)
    alpha, t = (0.5, 2.0) if "mixed" in case else (1.5, 2.5)
    for number, (_, steps) in enumerate(dense.plan):
        teacher = copy.deepcopy(dense.model)
        for current, _ in steps:
            loss = dense.loss(current)
            if number > 0:
                p = (teacher(dense.stream.read(current).x.double()) / t).softmax(1).detach()
                q = (dense.logits(current) / t).softmax(1)
                if "top" in case:
                    best = p.argsort(1, descending=True)[:, :3]
                    p, q = (v.gather(1, best) for v in (p, q))
                    p, q = (torch.cat([v, 1 - v.sum(1, keepdim=True)], 1) for v in (p, q))
                loss = loss + alpha * t**2 * (p * (p.log() - q.log())).sum(1).mean()
            dense.step(loss)
    return dense.weights()


def _si(case: str) -> dict[str, Any]:
    dense = Dense(case)
    c, xi, lr = (30.0, 0.01, 0.2) if "damped" in case else (0.8, 0.02, 0.2)
    weights = list(dense.model.parameters())
    big = [torch.zeros_like(w) for w in weights]
    for _, steps in dense.plan:
        star = [w.detach().clone() for w in weights]
        small_omega = [torch.zeros_like(w) for w in weights]
        for current, _ in steps:
            dense.optimizer.zero_grad()
            dense.loss(current).backward()
            grads = [w.grad.clone() for w in weights]
            before = [w.detach().clone() for w in weights]
            for w, s, omega in zip(weights, star, big, strict=True):
                k = 2 * c * omega
                w.grad += (k / (1 + lr * k) if "damped" in case else k) * (w.detach() - s)
            dense.optimizer.step()
            for o, g, w, b in zip(small_omega, grads, weights, before, strict=True):
                o -= g * (w.detach() - b)
        for omega, o, w, s in zip(big, small_omega, weights, star, strict=True):
            omega += (o / ((w.detach() - s) ** 2 + xi)).clamp(min=0)
    return dense.weights()


REFERENCE: dict[str, Callable[[str], dict[str, Any]]] = {
    "er": _er,
    "mer": _mer,
    "der": _der,
    "lwf": _lwf,
    "si": _si,
}


@cache
def _reference(case: str) -> dict[str, Any]:
    return REFERENCE[case.split()[0]](case)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("world", "restart"), [(1, False), (2, True), (3, False)])
def test_a_method_equals_its_dense_reference_at_any_number_of_ranks(
    case: str, world: int, restart: bool
) -> None:
    expected = _reference(case)
    for result in _results(world, restart):
        for name, value in expected.items():
            np.testing.assert_allclose(result[case][name], value, rtol=0, atol=1e-10)


@pytest.mark.parametrize("case", CASES)
def test_a_method_does_something(case: str) -> None:
    """The references differ from plain training, and from each other."""
    dense = Dense(case)
    for _, steps in dense.plan:
        for current, _ in steps:
            dense.step(dense.loss(current))
    plain = dense.weights()
    assert max(np.abs(_reference(case)[n] - v).max() for n, v in plain.items()) > 1e-3


@pytest.mark.parametrize("case", ["si", "mer"])
def test_what_a_method_holds_is_cut_over_ranks(case: str) -> None:
    total = sum(v.size for v in _reference(case).values())
    held = [result[case]["held"] for result in _results(3)]
    assert sum(held) == total
    assert max(held) <= -(-total // 3)


@pytest.mark.parametrize("world", [1, 3])
def test_meta_experience_replay_of_rate_1_is_experience_replay_bit_for_bit(world: int) -> None:
    for result in _results(world):
        for name, value in result["er"].items():
            np.testing.assert_array_equal(result["mer of rate 1"][name], value)


# -- whole jobs --------------------------------------------------------------------------------

JOBS = {
    "er": (
        "training.batch_size=40",
        "priority.target=union",
        "continual_learning.replay_batch_size=31",
    ),
    "er copies": ("continual_learning.history_store=copy",),
    "er ids": (),
    "mer": ("continual_learning.mer_every=4", "training.batch_size=40"),
    "der": ("continual_learning.importance_weighting=false",),
    "lwf": ("continual_learning.mix_historic_data=true",),
    "si": ("optimizer.momentum=0.5", "continual_learning.si_c=2.0"),
    "si pretraining": ("stream.experiences=1",),
}


def _jobs() -> dict[str, dict[str, Any]]:
    results = {}
    runtime = _runtime()
    with tempfile.TemporaryDirectory() as out:
        for name, keys in JOBS.items():
            config = small(
                *QUIET,
                "continual_learning.buffer_size=97",
                f"continual_learning.update_mode={name.split()[0]}",
                *keys,
            )
            stream = create_stream(config.stream, config.run.seed)
            trainer = ContinuousTrainer(assemble(config, runtime, stream, Path(out)), config)
            run_rounds(trainer)
            result = {n: p.detach().numpy() for n, p in _module(trainer.parts).named_parameters()}
            result["digests"] = [r["draws_sha256"] for r in trainer.rounds]
            result["history"] = trainer.history.ids()
            if name == "der":
                result["stored"] = trainer.parts.updater.stored.ids
            if "si" in name:
                important = sum(float(v.sum()) for v in trainer.parts.updater.importance.values())
                result["important"] = important
            results[name] = result
    return results


@cache
def _job_results(world: int) -> list[dict[str, dict[str, Any]]]:
    return run_ranks(world, _jobs)


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("name", JOBS)
def test_a_whole_job_is_the_same_on_several_ranks(name: str, world: int) -> None:
    (alone,) = _job_results(1)
    for result in _job_results(world):
        assert result[name]["digests"] == alone[name]["digests"]
        np.testing.assert_array_equal(result[name]["history"], alone[name]["history"])
        for key, value in alone[name].items():
            if key.endswith(("weight", "bias")):
                np.testing.assert_allclose(result[name][key], value, rtol=0, atol=1e-9)


def test_stored_logits_are_of_exactly_the_samples_that_history_holds() -> None:
    (alone,) = _job_results(1)
    assert len(alone["der"]["history"]) == 97
    assert alone["der"]["stored"].tolist() == sorted(alone["der"]["history"].tolist())


def test_synaptic_intelligence_learns_from_pretraining() -> None:
    (alone,) = _job_results(1)
    assert alone["si pretraining"]["digests"] == []  # no round
    assert 0 < alone["si pretraining"]["important"] < np.inf


def _refusal(out: Path) -> str:
    try:
        execute("train", ("continual_learning.replay_batch_size=1",), out)
    except DistclError as error:
        return str(error)
    return ""


def test_a_replay_batch_smaller_than_the_number_of_ranks_is_refused(tmp_path: Path) -> None:
    for message in run_ranks(2, _refusal, tmp_path):
        assert "continual_learning.replay_batch_size = 1 is smaller than the number of" in message


def test_copies_train_the_same_weights_as_ids() -> None:
    (alone,) = _job_results(1)
    for name, value in alone["er ids"].items():
        np.testing.assert_array_equal(alone["er copies"][name], value)
