"""What needs one process only: DeepSpeed's configuration, launchers, units, checkpointed blocks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from distcl.config import ParallelConfig, RunConfig, TrainingConfig
from distcl.distributed.environment import check_launcher
from distcl.errors import ConfigError, UsageError
from distcl.models import create_model
from distcl.parallel.activation_checkpointing import checkpoint_blocks
from distcl.parallel.deepspeed_config import deepspeed_config
from distcl.parallel.fsdp2 import units
from distcl.parallel.strategy import refuse_batchnorm
from distcl.types import DataSpec

ROOT = Path(__file__).parents[3]


def _config(
    tmp_path: Path, file: Any = None, environ: dict[str, str] | None = None, **keys: Any
) -> dict[str, Any]:
    training = {k: keys.pop(k) for k in ("batch_size", "accumulate", "clip_norm") if k in keys}
    run = RunConfig(precision=keys.pop("precision", "fp32"))
    if file is not None:
        path = tmp_path / "mine.json"
        path.write_text(file if isinstance(file, str) else json.dumps(file))
        keys["deepspeed_config"] = str(path)
    parallel = ParallelConfig(**{"strategy": "zero3", **keys})
    return deepspeed_config(run, parallel, TrainingConfig(**training), 2, environ or {})


def test_without_a_file_deepspeed_gets_the_stage_and_one_plain_step(tmp_path: Path) -> None:
    found = _config(tmp_path, strategy="zero2", precision="bf16", accumulate=4, clip_norm=1.0)
    assert found["zero_optimization"]["stage"] == 2
    assert found["bf16"] == {"enabled": True}
    assert found["fp16"] == {"enabled": False}
    assert found["gradient_accumulation_steps"] == 1  # we do that, and clip
    assert found["gradient_clipping"] == 0.0
    assert found["data_types"] == {"grad_accum_dtype": "fp32"}
    assert "offload_optimizer" not in found["zero_optimization"]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_shipped_files_say_nothing_against_any_toml(stage: int, tmp_path: Path) -> None:
    shipped = json.loads((ROOT / "launch" / "deepspeed" / f"zero{stage}.json").read_text())
    for precision in ("fp32", "bf16"):
        keys = {"strategy": f"zero{stage}", "accumulate": 2, "offload_optimizer": True}
        found = _config(tmp_path, shipped, precision=precision, **keys)
        assert "auto" not in json.dumps(found)
        assert found["zero_optimization"]["offload_optimizer"]["device"] == "cpu"


def test_a_users_file_is_honoured_key_by_key(tmp_path: Path) -> None:
    own = {"stage3_param_persistence_threshold": 7, "reduce_bucket_size": 123}
    file = {"zero_optimization": {"stage": 3, **own}, "wall_clock_breakdown": True}
    found = _config(tmp_path, file)
    assert found["wall_clock_breakdown"]
    assert own.items() <= found["zero_optimization"].items()


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ({"zero_optimization": {"stage": 2}}, "zero_optimization.stage = 2, but parallel.strategy"),
        ({"bf16": {"enabled": True}}, "bf16.enabled = true, but run.precision asks for false"),
        ({"gradient_clipping": 1.0}, "gradient_clipping = 1.0, but training.clip_norm asks for 0"),
        ({"gradient_accumulation_steps": 2}, "but training.accumulate asks for 1"),
        ({"train_batch_size": 8}, "train_batch_size = 8, but training.batch_size asks for 64"),
        ({"optimizer": {"type": "Adam"}}, "optimizer: the optimizer is chosen in"),
        (
            {"zero_optimization": {"offload_param": {"device": "nvme"}}},
            "zero_optimization.offload_param.device: the anchor cannot follow to a disk",
        ),
        ({"zero_optimization": {"zero_hpz_partition_size": 2}}, "zero_hpz_partition_size: it"),
        ({"data_types": {"grad_accum_dtype": "bf16"}}, "data_types.grad_accum_dtype"),
        ("{", "not JSON"),
        ("[]", "a DeepSpeed configuration is a JSON object"),
    ],
)
def test_conflicts_of_a_file_are_named_by_key(file: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        _config(tmp_path, file)
    assert str(tmp_path / "mine.json") in str(error.value)
    assert message in str(error.value)


def test_all_conflicts_are_told_at_once_and_a_missing_file_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"zero_optimization.stage.*; gradient_clipping"):
        _config(tmp_path, {"zero_optimization": {"stage": 1}, "gradient_clipping": 3.0})
    with pytest.raises(ConfigError, match=r"absent\.json: No such file"):
        _config(tmp_path, deepspeed_config="absent.json")


def test_the_launchers_file_is_read_and_may_not_differ_from_ours(tmp_path: Path) -> None:
    file = tmp_path / "launcher.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 3, "sub_group_size": 5}}))
    environ = {"ACCELERATE_DEEPSPEED_CONFIG_FILE": str(file)}
    found = _config(tmp_path, environ=environ)
    assert found["zero_optimization"]["sub_group_size"] == 5
    with pytest.raises(ConfigError, match=r"--deepspeed_config_file .*launcher\.json"):
        _config(tmp_path, environ=environ, deepspeed_config="other.json")


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "'zero1', 'zero2' or 'zero3', but"),
        ({"ACCELERATE_USE_FSDP": "true"}, "'fsdp2', but parallel.strategy = 'ddp'"),
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, "--mixed_precision bf16, but run.precision"),
        (
            {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"},
            "--gradient_accumulation_steps 4, but training.accumulate = 1",
        ),
        ({"ACCELERATE_GRADIENT_CLIPPING": "1.0"}, "--gradient_clipping 1.0, but training.clip"),
        (
            {"ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu"},
            "--offload_optimizer_device cpu, but parallel.offload_optimizer = none",
        ),
    ],
)
def test_what_a_launcher_asks_for_is_compared_by_key(environ: dict[str, str], message: str) -> None:
    run, parallel, training = RunConfig(), ParallelConfig(), TrainingConfig()
    with pytest.raises(ConfigError) as error:
        check_launcher(run, parallel, training, environ)
    assert message in str(error.value)
    check_launcher(run, parallel, training, {"ACCELERATE_MIXED_PRECISION": "no"})


@pytest.mark.parametrize("strategy", ["zero1", "zero2", "zero3", "fsdp2"])
def test_fp64_works_under_ddp_only(strategy: str) -> None:
    from distcl.config import Config

    with pytest.raises(ValueError, match="fp64"):
        Config(run=RunConfig(precision="fp64"), parallel=ParallelConfig(strategy=strategy))


def test_keys_of_other_strategies_are_refused() -> None:
    with pytest.raises(ValueError, match="offload_optimizer needs strategy"):
        ParallelConfig(offload_optimizer=True)
    with pytest.raises(ValueError, match="deepspeed_config needs strategy"):
        ParallelConfig(strategy="fsdp2", deepspeed_config="x.json")


def test_units_are_as_large_as_asked_and_leave_shared_weights_to_the_model() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(10, 8)
            self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in "ab")
            self.attention = nn.MultiheadAttention(8, 2)
            self.head = nn.Linear(8, 10, bias=False)
            self.head.weight = self.embed.weight

    model = Model()
    names = {module: name for name, module in model.named_modules()}
    assert [names[m] for m in units(model, 60)] == ["blocks.0.0", "blocks.1.0", "attention"]
    assert [names[m] for m in units(model, 100)] == ["attention"]
    assert list(units(model, 10_000)) == []


def test_half_precision_throughout_refuses_batchnorm_by_name() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    refuse_batchnorm(model, "zero2", "fp32")
    with pytest.raises(UsageError, match="BatchNorm '1' would be lost; use GroupNorm"):
        refuse_batchnorm(model, "zero2", "bf16")


def _vit() -> nn.Module:
    from distcl.config import ModelConfig

    options = {"patch": 4, "dim": 12, "depth": 3, "heads": 2}
    return create_model(ModelConfig(name="vit_tiny", options=options), DataSpec((8, 8), 10), 0)


def test_checkpointed_blocks_keep_inputs_only_and_change_no_gradient() -> None:
    x = torch.randn(5, 8, 8, generator=torch.Generator().manual_seed(1))
    kept, grads = [], []
    for recompute in (False, True):
        model = _vit()
        if recompute:
            assert checkpoint_blocks(model) == 3
        saved: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, saved=saved: saved.append(t.numel()) or t, lambda t: t
        ):
            loss = model(x).square().sum()
        kept.append(sum(saved))
        loss.backward()
        grads.append({n: p.grad for n, p in model.named_parameters()})
    assert kept[1] < 0.3 * kept[0]
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad)


def test_a_model_without_blocks_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"parallel\.activation_checkpointing: the model \(Seq"):
        checkpoint_blocks(nn.Sequential(nn.Linear(2, 2), nn.ReLU()))
