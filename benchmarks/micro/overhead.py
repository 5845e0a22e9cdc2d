"""What a step, a method, a round and a start cost beside the plainest code for the same."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from benchmarks.micro import ROOT
from benchmarks.micro.measure import CPU, WALL, Work, on_ranks, seconds_of
from benchmarks.micro.rows import Row, compared
from benchmarks.micro.setting import BATCH, bare_of, config_of, steps_of, stream_of, trainer_of
from distcl.config import ModelConfig, OptimizerConfig
from distcl.distributed.runtime import Runtime
from distcl.models import create_model
from distcl.training.optimizer import create_optimizer
from distcl.training.trainer import ContinuousTrainer
from distcl.types import Batch, DataSpec
from distcl.updaters.base import Updater
from distcl.updaters.fisher import Squares
from distcl.updaters.kfac import KFACOnline
from distcl.updaters.kronecker import FactorSums, Layer

METHODS = "benchmarks.micro.overhead:methods"
ROUNDS = "benchmarks.micro.overhead:rounds"
OPTIMIZERS = "benchmarks.micro.overhead:optimizers"
FISHER = "benchmarks.micro.overhead:fisher"
KFAC_EVERY = 20
SHAPES = (1000, 784), (1000, 1000), (10, 1000)
TINY = {"name": "mlp", "options": {"hidden": [32]}}
"""A model whose step takes no time, so that what is left is what a step costs besides."""
CONFIG = ROOT / "configs" / "digits.toml"


def measure(quick: bool) -> list[Row]:
    """Train a small convolutional net, 20 steps at a time; then rounds of 10 epochs."""
    repeats = 3
    one = on_ranks(1, METHODS, repeats, not quick)
    rows = [_step("1 rank", one, "CPU s"), _tiny(one)]
    if not quick:
        rows.append(_step("2 ranks, DDP", on_ranks(2, METHODS, repeats, False), "s"))
        mean, plain, unit = one["ema, paired"], one["base, beside ema"], "CPU s, of the plain step"
        rows.append(compared("training step with training.ema", mean, plain, unit, "<= 1.01"))
        plain = one["base"]
        rows.append(compared("step of ewc_online", one["ewc_online"], plain, unit, "<= 1.05"))
        unit = "CPU s, of two plain steps on both batches"
        jvp, both = one["jvp_reg, paired"], one["both, paired"]
        rows.append(compared("step of jvp_reg", jvp, 2 * both, unit, "<= 1.05"))
        model = plain + one["kfac arithmetic"]
        unit = "CPU s, of the plain step + its matrix products"
        rows.append(compared("step of kfac_online", one["kfac_online"], model, unit, "<= 1.1"))
    found = on_ranks(1, ROUNDS, 2 if quick else 4)
    unit = "CPU s, of the same, uniform"
    rows.append(
        compared("round of 10 epochs, by priority", found["on"], found["off"], unit, "<= 1.15")
    )
    if quick:
        return rows
    for name in ("sgd", "adam"):
        ours, theirs = (1e3 * seconds for seconds in on_ranks(1, OPTIMIZERS, name))
        unit = "CPU ms, of torch's default"
        rows.append(compared(f"optimizer step, {name}, fused", ours, theirs, unit))
    ours, theirs = (1e3 * seconds for seconds in on_ranks(1, FISHER))
    unit = "CPU ms, of vectorized per-sample gradients"
    rows.append(compared("Fisher of a perceptron, 256 samples", ours, theirs, unit))
    return [*rows, _start_up()]


def _step(where: str, found: dict[str, float], unit: str) -> Row:
    ours, theirs = found["base, paired"], found["bare, paired"]
    unit += ", of a bare PyTorch loop"
    return compared(f"training step, {where}", ours, theirs, unit, "<= 1.03", limit=theirs)


def _tiny(found: dict[str, float]) -> Row:
    ours, theirs = 1e3 * found["tiny"], 1e3 * found["tiny bare"]
    unit = "CPU ms, of a bare PyTorch loop"
    return compared("training step, a model of next to no work", ours, theirs, unit)


def methods(repeats: int, every: bool) -> dict[str, float]:
    """Return median seconds of a step: bare, plain, and (``every``) by methods. Collective.

    On one rank, seconds of the process.
    """
    runtime = Runtime()
    steps, few = KFAC_EVERY, KFAC_EVERY // 4
    works: dict[str, Work] = {}
    with tempfile.TemporaryDirectory() as out:
        for mode in ["base", "ewc_online", "jvp_reg", "kfac_online"] if every else ["base"]:
            config = config_of(
                continual_learning={"update_mode": mode, "kfac_every": KFAC_EVERY},
            )
            stream = stream_of(config, 8_000)
            trainer = trainer_of(config, runtime, stream, Path(out))
            updater = trainer.parts.updater
            works[mode] = steps_of(trainer, few if mode == "jvp_reg" else steps)
            updater.cl_preprocessing()
            works[mode]()
            updater.cl_postprocessing(stream, stream.experiences[0].train)  # it has a penalty now
            updater.cl_preprocessing()
            if mode == "base":
                works["bare"] = bare_of(runtime, stream, trainer.parts.model, steps, BATCH)
            if isinstance(updater, KFACOnline):
                works["kfac arithmetic"] = _kfac_arithmetic(updater, steps)
        if every:
            config = config_of(training={"ema": 0.98})
            works["ema"] = steps_of(trainer_of(config, runtime, stream, Path(out)), steps)
            config = config_of(training={"batch_size": 2 * BATCH})
            works["both"] = steps_of(trainer_of(config, runtime, stream, Path(out)), few)
        if runtime.world_size == 1:
            trainer = trainer_of(config_of(model=TINY), runtime, stream, Path(out))
            works["tiny"] = steps_of(trainer, steps)
            works["tiny bare"] = bare_of(runtime, stream, trainer.parts.model, steps, BATCH)
    clock = CPU if runtime.world_size == 1 else WALL
    found: dict[str, float] = {}
    pairs = {"base": "bare", "jvp_reg": "both"}  # by themselves, and more often
    for name, other in pairs.items() if every else [("base", "bare")]:
        pair, number = (works[name], works[other]), few if name == "jvp_reg" else steps
        seconds = seconds_of(*pair, repeats=3 * repeats, clock=clock)
        found |= {f"{n}, paired": s / number for n, s in zip((name, other), seconds, strict=True)}
    if every:
        pair = works["ema"], works["base"]
        seconds = seconds_of(*pair, repeats=5 * repeats, clock=clock)
        found |= {"ema, paired": seconds[0] / steps, "base, beside ema": seconds[1] / steps}
    for name in pairs["jvp_reg"], "jvp_reg", "ema":
        works.pop(name, None)
    seconds = seconds_of(*works.values(), repeats=repeats, clock=clock)
    runtime.close()
    return found | {name: s / steps for name, s in zip(works, seconds, strict=True)}


def optimizers(name: str) -> list[float]:
    """Return median seconds of a step of 1.8 million weights: by a fused kernel, by default."""
    works: list[Work] = []
    for fused in (True, False):
        weights = [nn.Parameter(torch.randn(n, m)) for n, m in SHAPES]
        for weight in weights:
            weight.grad = torch.randn_like(weight)
        momentum = 0.9 if name == "sgd" else 0.0
        config = OptimizerConfig(name=name, momentum=momentum, fused=fused)
        works.append(create_optimizer(config, weights).step)
    return seconds_of(*works, repeats=50, warmup=5, clock=CPU)


def fisher() -> list[float]:
    """Return median seconds of the sums of squares that a Fisher is made of, both ways."""
    spec = DataSpec((1, 28, 28), 10)
    model = create_model(ModelConfig(name="mlp", options={"hidden": [100, 100]}), spec, seed=0)
    squares = Squares(model.eval(), nn.CrossEntropyLoss(reduction="none"), torch.float32)
    ids = torch.arange(256)
    batch = Batch(ids, torch.randn(256, *spec.x_shape), ids % 10)
    works = (lambda: squares.of(batch)), (lambda: squares.vectorized(batch))
    return seconds_of(*works, clock=CPU)


def _kfac_arithmetic(updater: KFACOnline, steps: int) -> Work:
    """Return the matrix products that ``steps`` steps need beside the plain ones, and no more."""
    deltas = {n: torch.randn_like(w) for n, w in updater.committed.items()}
    inputs = _layer_inputs(updater)

    def multiply() -> None:
        for _ in range(steps):
            for name, delta in deltas.items():
                updater.curvature[name].gradient(delta, 1.0, 0.1)
        for moments in inputs:
            moments()

    return multiply


def _layer_inputs(updater: KFACOnline) -> list[Callable[[], None]]:
    """Return, for each layer, the work of its statistics of one batch."""
    works: list[Callable[[], None]] = []

    def see(layer: Layer, a: torch.Tensor, output: torch.Tensor) -> None:
        sums = FactorSums.view(layer, torch.zeros(layer.elements + 1))
        g = torch.randn_like(output)
        works.append(lambda: layer.add_moments_(sums, a, g))

    handles = [
        layer.module.register_forward_hook(lambda _, args, out, of=layer: see(of, args[0], out))
        for layer in updater.layers
    ]
    with torch.no_grad():
        updater.model(torch.randn(BATCH, 1, 28, 28))
    for handle in handles:
        handle.remove()
    return works


def rounds(repeats: int) -> dict[str, float]:
    """Return median seconds of a round of 10 epochs, by priority (``on``) and uniform. Local."""
    runtime = Runtime()
    works: dict[str, Work] = {}
    with tempfile.TemporaryDirectory() as out:
        for name, on in (("on", True), ("off", False)):
            config = config_of(
                training={"batch_size": BATCH, "epochs": 10},
                continual_learning={"importance_weighting": on},
            )
            stream = stream_of(config, 320)
            works[name] = _round_of(trainer_of(config, runtime, stream, Path(out)))
        found = seconds_of(*works.values(), repeats=repeats, clock=CPU)
    runtime.close()
    return dict(zip(works, found, strict=True))


def _round_of(trainer: ContinuousTrainer) -> Work:
    """Return the work of a round on the first experience, as if its samples were new."""

    def train() -> None:
        trainer.parts.scorer.cache.clear()
        trainer.run_round(trainer.parts.stream.experiences[0], "bench")

    return train


class StopsAtOnce(Updater):
    """Ends the process after the first step."""

    def update_post_optimizer_call(self) -> None:
        """End it, without cleaning up."""
        os._exit(0)


def _start_up() -> Row:
    """Return the time to the end of the first step of a job, against importing torch."""
    train = [sys.executable, "-m", "distcl", "train", str(CONFIG), "--quiet", "--set"]
    train.append(f"continual_learning.update_mode={__name__}:{StopsAtOnce.__name__}")
    with tempfile.TemporaryDirectory() as out:
        ours, theirs = seconds_of(
            lambda: subprocess.run([*train, "--out", out, "--overwrite"], check=True, cwd=ROOT),
            lambda: subprocess.run([sys.executable, "-c", "import torch"], check=True),
            repeats=3,
        )
    unit = "s, of python -c 'import torch'"
    return compared("start-up to the first step", ours, theirs, unit, "<= 2.5", limit=theirs)
