"""Steps and scoring of small language models beside plain loops of torch and of transformers."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.micro.measure import CPU, Work, on_ranks, seconds_of
from benchmarks.micro.rows import Row, compared, skipped
from benchmarks.micro.setting import config_of, steps_of, trainer_of
from distcl.config import Config
from distcl.data.loader import iterate_chunks
from distcl.data.shards.inputs import SourceSamples
from distcl.data.shards.writer import write_shards
from distcl.data.stream import create_stream
from distcl.distributed.runtime import Runtime
from distcl.training.trainer import ContinuousTrainer

WORK = "benchmarks.micro.lm:compare"
REPLAY = "benchmarks.micro.lm:replay"
LENGTH, BATCH, CHUNK = 128, 16, 64
DECODER = {"name": "decoder", "options": {"dim": 128, "depth": 4, "heads": 4, "length": LENGTH}}
GPT2 = {
    "name": "hf:AutoModelForCausalLM",
    "options": {
        "attn_implementation": "sdpa",  # transformers' own choice
        "config": {
            "model_type": "gpt2",
            "n_embd": 128,
            "n_layer": 4,
            "n_head": 4,
            "n_positions": LENGTH,
            "vocab_size": 257,
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
        },
    },
}
Loss = Callable[[nn.Module, torch.Tensor], torch.Tensor]


def measure(quick: bool) -> list[Row]:
    """Compare a decoder of bytes, 128 a sample, with the plain loop; then a GPT-2 of that size.

    And the decoder's steps with replay out of shards with those out of memory.
    """
    repeats = 3 if quick else 8
    rows = _rows("decoder", "torch", on_ranks(1, WORK, DECODER, repeats))
    found = on_ranks(1, REPLAY, repeats)
    unit = "tokens / CPU s, of those in memory"
    rows.append(compared("replay from shards", found["shards"], found["memory"], unit, ">= 0.9"))
    if find_spec("transformers") is None:
        return [*rows, skipped("GPT-2", "transformers is not installed")]
    return rows + _rows("GPT-2", "transformers", on_ranks(1, WORK, GPT2, repeats))


def _rows(model: str, whose: str, found: dict[str, float]) -> list[Row]:
    plain, inference = found["bare"], found["inference"]
    unit = f"CPU s, of {whose}' own loop" if whose[-1] == "s" else f"CPU s, of {whose}'s own loop"
    step = compared(f"training step, {model}", found["step"], plain, unit, "<= 1.05", limit=plain)
    unit = "CPU s, of one plain inference pass"
    name = f"scoring by loss, {model}"
    return [step, compared(name, found["score"], inference, unit, "<= 1.05", limit=inference)]


def compare(model: dict[str, Any], repeats: int) -> dict[str, float]:
    """Return median seconds of a step and of a scoring pass, and of plain code for both."""
    steps, runtime, config = 5, Runtime(), _config(model)
    stream = create_stream(config.stream, config.run.seed)
    with tempfile.TemporaryDirectory() as out:
        trainer = trainer_of(config, runtime, stream, Path(out))
        module = runtime.strategy.unwrap(trainer.parts.model)
        plain, loss = copy.deepcopy(module), _token_loss
        if model["name"] != "decoder":
            plain, loss = _of_transformers(module), _own_loss
        ids = stream.experiences[0].train
        tokens = stream.read(ids).x
        tokens = tokens["input_ids"] if isinstance(tokens, dict) else tokens
        pair = seconds_of(
            steps_of(trainer, steps), _bare(plain, tokens, loss, steps), repeats=repeats, clock=CPU
        )
        scoring = seconds_of(*_scoring(trainer, ids), repeats=repeats, clock=CPU)
    runtime.close()
    found = dict(zip(("step", "bare"), (seconds / steps for seconds in pair), strict=True))
    return found | dict(zip(("score", "inference"), scoring, strict=True))


def replay(repeats: int) -> dict[str, float]:
    """Return tokens a second, of current and history batches of ``er``, from memory and shards."""
    steps, runtime = 5, Runtime()
    continual = {"update_mode": "er", "replay_batch_size": BATCH, "importance_weighting": True}
    works = []
    with tempfile.TemporaryDirectory() as out:
        config = _config(DECODER, continual_learning=continual)
        write_shards(SourceSamples(config.stream), Path(out) / "shards")
        of_shards = {
            "stream.source": "shards",
            "stream.path": f"{out}/shards",
            "stream.options": {},
        }
        for chosen in (config.replace(**of_shards), config):
            stream = create_stream(chosen.stream, chosen.run.seed, chosen.data)
            works.append(steps_of(trainer_of(chosen, runtime, stream, Path(out)), steps))
        found = seconds_of(*works, repeats=repeats, clock=CPU)
    runtime.close()
    tokens = 2 * BATCH * LENGTH * steps
    return {name: tokens / s for name, s in zip(("shards", "memory"), found, strict=True)}


def _config(model: dict[str, Any], **sections: dict[str, Any]) -> Config:
    stream = {
        "source": "text",
        "drift": "none",
        "experiences": 2,
        "options": {
            "domains": ["python:topics", "python:library"],
            "length": LENGTH,
            "max_bytes": 40_000,
        },
    }
    given = {
        "stream": stream,
        "model": {"loss": "next_token", **model},
        "training": {"batch_size": BATCH, "normalize": "token"},
        "continual_learning": {"importance_weighting": True},
        "priority": {"signal": "loss", "score_batch": CHUNK},
    }
    return config_of(**given | sections)


def _token_loss(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    logits = model(tokens)[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def _own_loss(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = model(input_ids=tokens, labels=tokens).loss
    return found


def _of_transformers(module: nn.Module) -> nn.Module:
    """Return a model of the same configuration, made as transformers makes it."""
    from transformers import AutoModelForCausalLM

    made: nn.Module = AutoModelForCausalLM.from_config(module.config)
    return made


def _bare(model: nn.Module, tokens: torch.Tensor, loss: Loss, steps: int) -> Work:
    """Return the work of a plain loop: index, forward, backward, step."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    def train() -> None:
        order = torch.from_numpy(np.random.default_rng(0).permutation(len(tokens)))
        for step in range(steps):
            rows = order[step * BATCH : (step + 1) * BATCH]
            optimizer.zero_grad(set_to_none=True)
            loss(model, tokens[rows]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()

    return train


def _scoring(trainer: ContinuousTrainer, ids: Any) -> tuple[Work, Work]:
    """Return the works of a scoring pass by the loss, and of plain inference over the same."""
    parts = trainer.parts
    module, stream = parts.forward.module, parts.stream

    def score() -> None:
        parts.scorer.cache.clear()
        parts.scorer.score(stream, ids)

    def inference() -> None:
        module.eval()
        with torch.inference_mode():
            found = [
                parts.forward.criterion(module(batch.x), batch.y)
                for batch in iterate_chunks(stream, ids, CHUNK)
            ]
            torch.cat(found).sum().item()
        module.train()

    return score, inference
