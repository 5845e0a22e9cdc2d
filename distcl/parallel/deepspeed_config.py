"""DeepSpeed's configuration: ours, or a user's file, checked key by key against the TOML. Local.

Nothing here imports DeepSpeed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distcl.config import ParallelConfig, RunConfig, TrainingConfig
from distcl.errors import ConfigError

BUCKET = 50_000_000
"""Elements of a bucket, where no file says otherwise: DeepSpeed's own 5e8 take 2 GB a rank."""

_REFUSED = {
    "optimizer": "the optimizer is chosen in [optimizer]",
    "scheduler": "the learning rate is chosen in [optimizer]",
    "amp": "the precision is chosen by run.precision",
    "torch_autocast": "the precision is chosen by run.precision",
    "tensor_parallel": "weights are spread by ZeRO alone",
    "pipeline": "weights are spread by ZeRO alone",
    "zero_optimization.zenflow": "the anchor cannot follow its layout",
    "zero_optimization.mics_shard_size": "the anchor cannot follow its layout",
    "zero_optimization.zero_quantized_weights": "gathered weights would not be the exact ones",
    "zero_optimization.zero_quantized_gradients": "the gradient would not be the exact mean",
}


def deepspeed_config(
    run: RunConfig,
    parallel: ParallelConfig,
    training: TrainingConfig,
    world_size: int,
    environ: Mapping[str, str] = os.environ,
) -> dict[str, Any]:
    """Return what DeepSpeed is given, complete and without "auto".

    A file of the user's (``parallel.deepspeed_config``, or ``--deepspeed_config_file`` of
    ``accelerate launch``) is taken as it is, "auto" and what it leaves out are filled in. Raises
    ConfigError naming every key of the file that says other than the TOML.
    """
    path = _file(parallel, environ)
    config = _read(path) if path else {}
    stage = int(parallel.strategy.removeprefix("zero"))
    device = "cpu" if parallel.offload_optimizer else "none"
    half = {name: run.precision == name for name in ("bf16", "fp16")}
    micro = -(-training.batch_size // (world_size * training.accumulate))
    wanted: dict[str, tuple[Any, str]] = {
        "zero_optimization.stage": (stage, "parallel.strategy"),
        "zero_optimization.offload_optimizer.device": (device, "parallel.offload_optimizer"),
        "bf16.enabled": (half["bf16"], "run.precision"),
        "fp16.enabled": (half["fp16"], "run.precision"),
        "gradient_accumulation_steps": (training.accumulate, "training.accumulate"),
        "gradient_clipping": (training.clip_norm, "training.clip_norm"),
        "train_batch_size": (training.batch_size, "training.batch_size"),
        "train_micro_batch_size_per_gpu": (micro, "training.batch_size"),
        "data_types.grad_accum_dtype": ("fp32", "adding regularizers"),
    }
    wrong = [
        f"{key} = {json.dumps(found)}, but {source} asks for {json.dumps(value)}"
        for key, (value, source) in wanted.items()
        if (found := _get(config, key)) not in (None, "auto", value)
    ]
    wrong += [f"{key}: {why}" for key, why in _REFUSED.items() if _get(config, key)]
    if _get(config, "zero_optimization.zero_hpz_partition_size") not in (None, 1):
        wrong.append("zero_optimization.zero_hpz_partition_size: it keeps second copies of weights")
    for part in ("offload_param", "offload_optimizer"):
        if _get(config, f"zero_optimization.{part}.device") == "nvme":
            wrong.append(f"zero_optimization.{part}.device: the anchor cannot follow to a disk")
    if wrong:
        raise ConfigError(f"{path}: " + "; ".join(wrong))
    _fill(config, wanted)
    return config


def _file(parallel: ParallelConfig, environ: Mapping[str, str]) -> str:
    launcher = environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "").replace("none", "")
    if launcher and parallel.deepspeed_config and launcher != parallel.deepspeed_config:
        raise ConfigError(
            f"parallel.deepspeed_config = '{parallel.deepspeed_config}', but accelerate launch was "
            f"given --deepspeed_config_file {launcher}"
        )
    return parallel.deepspeed_config or launcher


def _read(path: str) -> dict[str, Any]:
    try:
        config = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}") from error
    except ValueError as error:
        raise ConfigError(f"{path}: not JSON ({error})") from error
    if not isinstance(config, dict):
        raise ConfigError(f"{path}: a DeepSpeed configuration is a JSON object")
    return config


def _get(config: Mapping[str, Any], key: str) -> Any:
    node: Any = config
    for name in key.split("."):
        node = node.get(name) if isinstance(node, Mapping) else None
    return node


def _set(config: dict[str, Any], key: str, value: Any) -> None:
    *path, last = key.split(".")
    for name in path:
        config = config.setdefault(name, {})
    config[last] = value


def _fill(config: dict[str, Any], wanted: Mapping[str, tuple[Any, str]]) -> None:
    """Complete ``config``. We accumulate and clip ourselves, so DeepSpeed sees one plain step."""
    offloads = _get(config, "zero_optimization.offload_optimizer") is not None
    for key, (value, _) in wanted.items():
        if ".offload_optimizer." not in key or offloads or value != "none":
            _set(config, key, value)
    config.pop("train_batch_size")
    config["train_micro_batch_size_per_gpu"] = 1
    config["gradient_accumulation_steps"] = 1
    config["gradient_clipping"] = 0.0
    config["zero_force_ds_cpu_optimizer"] = False
    config["zero_allow_untested_optimizer"] = True
    stage = _get(config, "zero_optimization.stage")
    buckets = ["reduce_bucket_size"] + (
        ["stage3_prefetch_bucket_size"] if stage == 3 else ["allgather_bucket_size"]
    )
    for name in buckets:
        if _get(config, f"zero_optimization.{name}") in (None, "auto"):
            _set(config, f"zero_optimization.{name}", BUCKET)
    threshold = "zero_optimization.stage3_param_persistence_threshold"
    if _get(config, threshold) == "auto":
        _set(config, threshold, 100_000)
    if _get(config, "zero_optimization.offload_optimizer.device") == "cpu":
        config["zero_optimization"]["offload_optimizer"].setdefault("pin_memory", True)
