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
from distcl.data.shards.inputs import SourceSamples
from distcl.data.shards.writer import write_shards
from distcl.data.stream import create_stream
from distcl.distributed.runtime import Runtime
from distcl.models import create_model
from distcl.training.build import assemble
from distcl.training.trainer import ContinuousTrainer
from tests.spawn import run_ranks

JOB = (
    "stream.source=jsonl", "stream.drift=none", "stream.experiences=2",
    "stream.options.domain=where", "model.name=decoder", "model.loss=next_token",
    "model.options.dim=8", "model.options.heads=2", "model.options.depth=1",
    "optimizer.lr=0.5", "training.batch_size=7", "training.epochs=1",
    "training.pretrain_epochs=1", "run.precision=fp64", "run.report=false", "tracking.kind=none",
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


WORLDS, MODES = (1, 2, 3), ("er", "base")
IN_SHARDS = ("stream.source=shards", "stream.options={}")
WAYS = {
    "memory": (),
    "indexed": IN_SHARDS,
    "streamed": (*IN_SHARDS, "data.access=stream", "data.lanes=4", "data.shuffle_buffer=9"),
}
Found = dict[int, list[dict[str, Any]]]
"""What each rank found, by the number of ranks."""


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of texts, with shards of them beside it."""
    folder = tmp_path_factory.mktemp("texts")
    made = write(folder / "texts.jsonl")
    write_shards(SourceSamples(config(made).stream), folder / "shards", 7)
    return made


@pytest.fixture(scope="module")
def found(path: Path) -> Found:
    return {world: run_ranks(world, everything, path, path.parent / str(world)) for world in WORLDS}


def everything(path: Path, out: Path) -> dict[str, Any]:
    """All that is to be compared, in one process a rank."""
    runtime = Runtime(config(path).run)
    both = {mode: corrected(runtime, path, out / mode, mode) for mode in MODES}
    return {"steps": steps(runtime, path, out / "steps")} | both | rounds(runtime, path, out)


def rounds(runtime: Runtime, path: Path, out: Path) -> dict[str, Any]:
    """Of texts in memory and in shards: draws, priorities, scores and weights of a round."""
    more = (
        "training.normalize=token",
        "continual_learning.importance_weighting=true",
        "continual_learning.update_mode=er",
        "training.epochs=2",
    )
    found = {}
    for name, way in WAYS.items():
        chosen = config(path.parent / "shards" if way else path, *more, *way)
        stream = create_stream(chosen.stream, chosen.run.seed, chosen.data)
        trainer = ContinuousTrainer(assemble(chosen, runtime, stream, out / name), chosen)
        trainer.pretrain(stream.experiences[0])
        trainer.run_round(stream.experiences[1], "scheduled", stream.experiences)
        module = runtime.strategy.unwrap(trainer.parts.model)
        weights = {n: p.detach().numpy().copy() for n, p in module.named_parameters()}
        draws = [r["draws_sha256"] for r in trainer.rounds]
        found[name] = draws, trainer.rounds[0]["priority"], np.array(trainer.matrix.rows(), float), weights
    return found


def steps(runtime: Runtime, path: Path, out: Path) -> list[Any]:
    """Pretrain; return for each ``accumulate`` what each step drew here, and the weights."""
    found = []
    for accumulate in (1, 2, 3):
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


@pytest.mark.parametrize("world", WORLDS)
def test_gradients_are_the_mean_over_all_tokens_of_the_global_batch(
    world: int, path: Path, found: Found
) -> None:
    for runs in zip(*(rank["steps"] for rank in found[world]), strict=True):
        drawn = [sum(parts, []) for parts in zip(*(seen for seen, _ in runs), strict=True)]
        expected = dense(path, drawn)
        for (_, weights), (name, value) in product(runs, expected.items()):
            np.testing.assert_allclose(weights[name], value, atol=1e-10, rtol=0, err_msg=name)


Note = dict[str, Any]
"""Of one step of a rank: ids and loss weights of its parts of the batches, current and history."""


def corrected(runtime: Runtime, path: Path, out: Path, mode: str) -> tuple[list[Note], Any, Any]:
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


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("world", [1, 3])
def test_corrected_losses_are_a_weighted_mean_over_all_tokens(
    mode: str, world: int, path: Path, found: Found
) -> None:
    """By hand: Σ c Σ_t ℓ_t / Σ c n over current and history together, with unequal parts."""
    results = [rank[mode] for rank in found[world]]
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
        np.testing.assert_allclose(after[name], value.detach().numpy(), atol=1e-10, rtol=0, err_msg=name)


def test_a_job_over_texts_draws_the_same_on_any_number_of_ranks_and_from_shards(
    found: Found,
) -> None:
    first = found[1][0]
    assert first["memory"][1]
    for world, way in product(WORLDS, WAYS):
        like, other = first[way if way == "streamed" else "memory"], found[world][0][way]
        assert other[0] == like[0] and len(like[0]) == 1
        np.testing.assert_allclose(other[2], like[2], atol=1e-9)
        for name, value in like[3].items():
            np.testing.assert_allclose(other[3][name], value, atol=1e-9, err_msg=name)
