"""What the cost model predicts beside what is measured, and what it says of a thousand ranks.

The measured round trains an MLP on random images: priorities of new data, then two epochs. Bytes
are those that a rank writes to others over gloo, by the kernel's count. Ratios are the larger over
the smaller.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.micro.measure import CPU, Work, on_ranks, peak_of, seconds_of
from benchmarks.micro.model import Job, Machine
from benchmarks.micro.rows import Row
from benchmarks.micro.setting import config_of, stream_of, trainer_of
from distcl.distributed.memory import FlopCount
from distcl.distributed.runtime import Runtime
from distcl.priority.population import Dealer
from distcl.sampling.groups import Part
from distcl.sampling.sampler import DistributedWeightedSampler
from distcl.sampling.sequential import LaneSampler
from distcl.types import Ids

BATCH = 256
MODEL: dict[str, Any] = {"name": "mlp", "options": {"hidden": [512] * 4}}
ROUND = "benchmarks.micro.cost:a_round"
CLOSE = "<= 1.25"
FAR = Job(
    samples=10**10,
    ranks=1024,
    parameters=25_600_000,
    forward=8.2e9,
    batch=32_768,
    steps=10**10 // 32_768,
    states=1,
    streamed=True,
)
"""A ResNet-50 on images of 224 pixels (4.1e9 multiplications and additions), SGD with momentum."""
GPU = Machine(forward=1e14, step=1e14, bytes=2e10, draws=1e7)
"""Assumed: 100 TFLOP/s reached and 20 GB/s a rank; drawn samples a second as measured here."""


def measure(quick: bool) -> list[Row]:
    """Predict and measure a round of 2,048 (``quick``: 1,024) samples, and plans of 4 million."""
    samples = 1_024 if quick else 2_048
    one, two = (on_ranks(ranks, ROUND, samples) for ranks in (1, 2))
    alone, shared = (job_of(samples, ranks, found) for ranks, found in ((1, one), (2, two)))
    machine = Machine(one["forward_rate"], one["step_rate"], 1e9, one["draw_rate"])
    rows = [
        _row("operations of a round", alone.flops, one["flops"], "flops"),
        _row("bytes a rank sends in a round", shared.sent, two["sent"], "bytes"),
        _row("seconds of a round", machine.seconds(alone), one["seconds"], "CPU s"),
    ]
    n = 4_000_000
    for streamed, work in ((False, _indexed), (True, _streamed)):
        predicted = Job(n, 1, 0, 0, BATCH, 1, streamed=streamed).plan_memory
        which = "lanes" if streamed else "indexed"
        rows.append(_row(f"memory of a plan, {which}", predicted, work(n), "bytes"))
    return [*rows, *_far()]


def job_of(samples: int, ranks: int, found: dict[str, float]) -> Job:
    """Return the job that :func:`a_round` measured."""
    parameters = int(found["parameters"])
    return Job(samples, ranks, parameters, 2.0 * parameters, BATCH, int(found["steps"]), passes=2)


def _row(what: str, predicted: float, measured: float, unit: str) -> Row:
    ratio = max(predicted / measured, measured / predicted)
    return Row(
        f"cost: {what}", predicted, measured, f"{unit}, predicted and measured", ratio, CLOSE
    )


def _far() -> list[Row]:
    """Return what the model says of 1e10 samples on 1,024 ranks; nothing of it is measured."""
    seconds = GPU.seconds(FAR)
    talk = FAR.sent / GPU.bytes
    draws = FAR.samples / FAR.ranks / GPU.draws
    told = {
        "operations": (FAR.flops, "flops"),
        "a rank sends": (FAR.sent, "bytes"),
        "memory of a rank's plan": (FAR.plan_memory, "bytes"),
        "memory of a plan by index": (
            replace(FAR, streamed=False).plan_memory,
            "bytes, on every rank",
        ),
        "memory of weights": (FAR.weight_memory, "bytes"),
        "a round": (seconds, "s, at 1e14 flop/s and 2e10 B/s a rank"),
        "of it, talk": (talk, "s"),
        "of it, draws": (draws, "s"),
    }
    name = "cost, extrapolated to 1e10 samples, 1,024 ranks"
    return [Row(f"{name}: {what}", value, None, unit, None) for what, (value, unit) in told.items()]


def _indexed(n: int) -> float:
    weights = np.random.default_rng(0).gamma(1.0, size=n)
    sampler = DistributedWeightedSampler(BATCH, draw="systematic")

    def plan() -> None:
        sampler.set_weights(n, weights)
        sampler.global_batch(0)

    return float(peak_of(plan))


def _streamed(n: int) -> float:
    """Return the bytes of a lane sampler of one rank: what it is given, and what it draws."""

    def lanes_of(ids: Ids, lanes: int) -> Ids:
        lane: Ids = ids * lanes // n
        return lane

    held: list[Any] = []

    def plan() -> None:
        slices = Dealer(64, lanes_of).deal(np.arange(n))
        weights = np.random.default_rng(0).gamma(1.0, size=n)
        sampler = LaneSampler(BATCH, window=1024)
        sampler.set_groups([Part(slices.ids, weights, slices, draws=n)])
        sampler.parts(0)
        held.append(sampler)

    all_ids = np.arange(n).nbytes  # every rank has these once, whoever deals
    return float(peak_of(plan) - all_ids)


def a_round(samples: int) -> dict[str, float]:
    """Run a round by priority, and measure what the model wants to know. Collective."""
    runtime = Runtime()
    config = config_of(
        model=MODEL,
        training={"batch_size": BATCH, "epochs": 2},
        continual_learning={"importance_weighting": True},
        priority={"score_batch": 512, "draw": "systematic"},
    )
    stream = stream_of(config, samples)
    with tempfile.TemporaryDirectory() as out:
        trainer = trainer_of(config, runtime, stream, Path(out))
        module = runtime.strategy.unwrap(trainer.parts.model)
        with torch.no_grad():  # theta_star is to differ from the weights
            for parameter in module.parameters():
                parameter.add_(1e-4)
        experience = stream.experiences[0]
        reports: list[dict[str, Any]] = []

        def train() -> None:
            trainer.parts.scorer.cache.clear()
            reports.append(trainer.run_round(experience, "bench"))

        train()  # buckets, buffers
        runtime.barrier()
        before = _written()
        with FlopCount() as count:
            train()
        found = {"sent": float(_written() - before), "flops": float(count.total)}
        found["steps"] = float(reports[-1]["steps"])
        found["parameters"] = float(sum(p.numel() for p in module.parameters()))
        if runtime.world_size == 1:
            found |= _rates(train, module)
    runtime.close()
    return found


def _written() -> int:
    for line in Path("/proc/self/io").read_text().splitlines():
        if line.startswith("wchar:"):
            return int(line.split()[1])
    raise KeyError("wchar")


def _rates(train: Work, module: nn.Module) -> dict[str, float]:
    """Return seconds of a round; beside it, operations a second of plain forwards and steps.

    And samples drawn a second.
    """
    forward = 2.0 * sum(p.numel() for p in module.parameters())
    x, y = torch.randn(512, 1, 28, 28), torch.arange(512) % 10
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-4)

    def infer() -> None:
        with torch.inference_mode():
            module(x)

    def step() -> None:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(module(x[:BATCH]), y[:BATCH])
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    sampler, weights = DistributedWeightedSampler(BATCH, draw="systematic"), np.ones(1_000_000)

    def draw() -> None:
        sampler.set_weights(len(weights), weights)
        sampler.global_batch(0)

    works = train, infer, step, draw
    seconds, inferred, stepped, drawn = seconds_of(*works, repeats=9, clock=CPU)
    return {
        "seconds": seconds,
        "forward_rate": 512 * forward / inferred,
        "step_rate": 3 * BATCH * forward / stepped,
        "draw_rate": len(weights) / drawn,
    }
