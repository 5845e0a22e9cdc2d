"""Texts of unequal lengths: draws, losses and gradients are those of one process."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from distcl.config.load import load_config
from distcl.data.stream import create_stream
from distcl.distributed.runtime import Runtime
from distcl.job import execute
from distcl.models import create_model
from distcl.training.build import assemble
from distcl.training.trainer import ContinuousTrainer
from tests.spawn import run_ranks

JOB = (
    "stream.source=jsonl", "stream.drift=none", "stream.experiences=2",
    "stream.options.domain=where", "model.name=decoder", "model.loss=next_token",
    "model.options.dim=8", "model.options.heads=2", "model.options.depth=1",
    "optimizer.lr=0.5", "training.batch_size=7", "training.epochs=1",
    "training.pretrain_epochs=1", "run.precision=fp64", "run.report=false",
)  # fmt: skip


def write(path: Path, number: int = 60) -> Path:
    """Lines of texts of 2 to 21 letters, in two domains."""
    rng = np.random.default_rng(0)
    with path.open("w") as file:
        for k in range(number):
            text = "".join(chr(97 + c) for c in rng.integers(0, 26, 2 + k % 20))
            file.write(json.dumps({"text": text, "where": "abc"[k * 2 // number]}) + "\n")
    return path


def config(path: Path, *more: str) -> Any:
    return load_config(None, overrides=[*JOB, f"stream.path={path}", *more], environ={})


def steps(path: Path, out: Path, accumulates: tuple[int, ...]) -> list[Any]:
    """Pretrain; return for each ``accumulate`` what each step drew here, and the weights."""
    runtime = Runtime(config(path).run)
    found = []
    for accumulate in accumulates:
        chosen = config(path, "training.normalize=token", f"training.accumulate={accumulate}")
        stream = create_stream(chosen.stream, chosen.run.seed)
        parts = assemble(chosen, runtime, stream, out)
        drawn: list[list[int]] = []
        fwd_bwd = type(parts.updater).fwd_bwd

        def note(updater: Any, batch: Any, past: Any, seen: Any = drawn, call: Any = fwd_bwd) -> Any:
            seen.append(batch.ids.tolist())
            return call(updater, batch, past)

        type(parts.updater).fwd_bwd = note  # type: ignore[method-assign]
        try:
            ContinuousTrainer(parts, chosen).pretrain(stream.experiences[0])
        finally:
            type(parts.updater).fwd_bwd = fwd_bwd  # type: ignore[method-assign]
        module = runtime.strategy.unwrap(parts.model)
        found.append((drawn, {n: p.detach().numpy().copy() for n, p in module.named_parameters()}))
    return found


def dense(path: Path, drawn: list[list[int]]) -> dict[str, Any]:
    """The weights after steps on the sum of all tokens' losses over their number, by hand."""
    chosen = config(path)
    stream = create_stream(chosen.stream, chosen.run.seed)
    model = create_model(chosen.model, stream.spec, chosen.run.seed).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for ids in drawn:
        total, number = torch.zeros((), dtype=torch.float64), 0
        for id_ in ids:  # one by one: no padding
            tokens = stream.read(np.array([id_])).x["input_ids"]
            logits = model(tokens)[0, :-1]
            total = total + F.cross_entropy(logits, tokens[0, 1:], reduction="sum")
            number += tokens.shape[1] - 1
        optimizer.zero_grad()
        (total / number).backward()
        optimizer.step()
    return {name: p.detach().numpy() for name, p in model.named_parameters()}


@pytest.mark.parametrize("world", [1, 2, 3])
def test_gradients_are_the_mean_over_all_tokens_of_the_global_batch(
    world: int, tmp_path: Path
) -> None:
    path = write(tmp_path / "texts.jsonl")
    results = run_ranks(world, steps, path, tmp_path, (1, 2, 3))
    for runs in zip(*results, strict=True):
        drawn = [sum(parts, []) for parts in zip(*(seen for seen, _ in runs), strict=True)]
        expected = dense(path, drawn)
        for (_, weights), (name, value) in product(runs, expected.items()):
            np.testing.assert_allclose(weights[name], value, atol=1e-10, rtol=0, err_msg=name)


Note = dict[str, Any]
"""Of one step of a rank: ids and loss weights of its parts of the batches, current and history."""


def corrected(path: Path, out: Path, mode: str) -> tuple[list[Note], Any, Any]:
    """Run a round with priorities and their correction; what was read, weights before and after."""
    chosen = config(
        path,
        "training.normalize=token",
        "training.accumulate=2",
        f"continual_learning.update_mode={mode}",
        "continual_learning.importance_weighting=true",
        "continual_learning.replay_batch_size=5",
        "priority.correction=0.8",
        "priority.target=union",
        "priority.signal=loss",
    )
    runtime = Runtime(chosen.run)
    stream = create_stream(chosen.stream, chosen.run.seed)
    trainer = ContinuousTrainer(assemble(chosen, runtime, stream, out), chosen)
    trainer.pretrain(stream.experiences[0])
    module = runtime.strategy.unwrap(trainer.parts.model)
    loader, notes = trainer.parts.loader, []
    batches = loader.batches

    def noting(steps: int, done: int) -> Any:
        for batch, history in batches(steps, done):
            parts = [b for b in (batch, history) if b is not None]
            notes.append([(b.ids.tolist(), b.weights.tolist()) for b in parts])
            yield batch, history

    loader.batches = noting  # type: ignore[method-assign]
    weights = [{n: p.detach().numpy().copy() for n, p in module.named_parameters()}]
    trainer.run_round(stream.experiences[1], "scheduled", stream.experiences)
    weights.append({n: p.detach().numpy().copy() for n, p in module.named_parameters()})
    return notes, *weights


@pytest.mark.parametrize("mode", ["er", "base"])
@pytest.mark.parametrize("world", [1, 3])
def test_corrected_losses_are_a_weighted_mean_over_all_tokens(
    mode: str, world: int, tmp_path: Path
) -> None:
    """By hand: Σ c Σ_t ℓ_t / Σ c n over current and history together, with unequal parts."""
    path = write(tmp_path / "texts.jsonl")
    results = run_ranks(world, corrected, path, tmp_path, mode)
    chosen = config(path)
    stream = create_stream(chosen.stream, chosen.run.seed)
    model = create_model(chosen.model, stream.spec, 0).double()
    model.load_state_dict({n: torch.from_numpy(w) for n, w in results[0][1].items()})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    spread, history = [], 0
    for ranks in zip(*(notes for notes, *_ in results), strict=True):
        total, number = torch.zeros((), dtype=torch.float64), 0.0
        history += sum(len(parts) == 2 and len(parts[1][0]) for parts in ranks)
        for ids, weights in (part for parts in ranks for part in parts):
            spread += weights
            for id_, c in zip(ids, weights, strict=True):
                tokens = stream.read(np.array([id_])).x["input_ids"]
                logits = model(tokens)[0, :-1]
                total = total + c * F.cross_entropy(logits, tokens[0, 1:], reduction="sum")
                number += c * (tokens.shape[1] - 1)
        optimizer.zero_grad()
        (total / number).backward()
        optimizer.step()
    assert np.std(spread) > 0.02 and (history > 0) == (mode == "er")
    for (_, _, after), (name, value) in product(results, model.named_parameters()):
        found = value.detach().numpy()
        np.testing.assert_allclose(after[name], found, atol=1e-10, rtol=0, err_msg=name)


def job(path: Path, out: Path) -> Any:
    more = (
        "training.normalize=token",
        "continual_learning.importance_weighting=true",
        "continual_learning.update_mode=er",
        "training.epochs=2",
    )
    return execute("train", config(path, *more), out)


def test_a_job_over_texts_draws_the_same_on_any_number_of_ranks(tmp_path: Path) -> None:
    path = write(tmp_path / "texts.jsonl")
    found = [run_ranks(w, job, path, tmp_path / str(w))[0] for w in (1, 2, 3)]
    draws = [[r["draws_sha256"] for r in summary["rounds"]] for summary in found]
    assert draws[0] == draws[1] == draws[2] and len(draws[0]) == 1
    assert found[0]["rounds"][0]["priority"]
    for other in found[1:]:
        np.testing.assert_allclose(other["accuracy"][-1], found[0]["accuracy"][-1], atol=1e-9)
