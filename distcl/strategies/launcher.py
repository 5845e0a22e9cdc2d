"""What ``accelerate launch`` was asked for, compared with the TOML. Local."""

from __future__ import annotations

import os
from collections.abc import Mapping

from distcl.config import ParallelConfig, RunConfig, TrainingConfig
from distcl.errors import ConfigError


def check_launcher(
    run: RunConfig,
    parallel: ParallelConfig,
    training: TrainingConfig,
    environ: Mapping[str, str] = os.environ,
) -> None:
    """Raise ConfigError naming what the launcher and the TOML say differently.

    The launcher tells its processes by ``ACCELERATE_*``. What only repeats its own default ("no",
    "none", one step of accumulation) is not compared.
    """
    found = "ddp"
    if environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true":
        found = f"zero{environ.get('ACCELERATE_DEEPSPEED_ZERO_STAGE', '')}"
    elif environ.get("ACCELERATE_USE_FSDP", "").lower() == "true":
        found = "fsdp2"
    if found != "ddp" and not parallel.strategy.startswith(found):  # "zero": a file has the stage
        choice = "'zero1', 'zero2' or 'zero3'" if found == "zero" else f"'{found}'"
        raise ConfigError(
            f"accelerate launch asks for {choice}, but parallel.strategy = '{parallel.strategy}'"
        )
    device = "cpu" if parallel.offload_optimizer else "none"
    for option, key, value, default in (
        ("MIXED_PRECISION", "run.precision", run.precision, "no"),
        ("GRADIENT_ACCUMULATION_STEPS", "training.accumulate", str(training.accumulate), "1"),
        ("GRADIENT_CLIPPING", "training.clip_norm", str(training.clip_norm), "none"),
        (
            "DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE",
            "parallel.offload_optimizer",
            device,
            "none",
        ),
    ):
        asked = environ.get(f"ACCELERATE_{option}", default).lower()
        if asked not in (default, value, "auto"):
            flag = option.removeprefix("DEEPSPEED_").lower()
            raise ConfigError(f"accelerate launch asks for --{flag} {asked}, but {key} = {value}")
