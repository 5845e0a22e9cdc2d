import pytest
import torch
from torch import nn

from distcl.config import OptimizerConfig
from distcl.errors import ConfigError
from distcl.training.optimizer import (
    create_optimizer,
    decay_factor,
    place_steps,
    reset,
    warmup_factor,
)

CONFIGS = [
    OptimizerConfig(name="sgd", lr=0.1, momentum=0.9, weight_decay=0.01),
    OptimizerConfig(name="sgd", lr=0.1),
    OptimizerConfig(name="adam", lr=0.1, weight_decay=0.01),
    OptimizerConfig(name="adamw", lr=0.1, weight_decay=0.01),
    OptimizerConfig(name="adam", lr=0.1, fused=True),
]


def parameter():
    return nn.Parameter(torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64))


def step(optimizer, p, times):
    for _ in range(times):
        optimizer.zero_grad()
        (p**2).sum().backward()
        optimizer.step()


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.name)
def test_the_optimizer_is_torchs_with_the_configured_options(config):
    optimizer = create_optimizer(config, [parameter()])
    wanted = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
    assert type(optimizer) is wanted[config.name]
    (group,) = optimizer.param_groups
    assert (group["lr"], group["weight_decay"]) == (config.lr, config.weight_decay)
    assert group.get("momentum", 0.0) == config.momentum
    assert bool(group["fused"]) == config.fused


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.name)
def test_a_reset_optimizer_steps_like_a_new_one(config):
    used, fresh = parameter(), parameter()
    optimizer = create_optimizer(config, [used])
    step(optimizer, used, 5)
    with torch.no_grad():
        used.copy_(fresh)
    optimizer.param_groups[0]["lr"] = 0.07
    reset(optimizer)
    assert optimizer.param_groups[0]["lr"] == 0.07
    optimizer.param_groups[0]["lr"] = config.lr
    step(optimizer, used, 3)
    step(create_optimizer(config, [fresh]), fresh, 3)
    assert torch.equal(used, fresh)


@pytest.mark.parametrize(("fused", "device"), [(True, "meta"), (False, "cpu")])
def test_fused_kernels_count_steps_on_the_device(fused, device):
    p = nn.Parameter(torch.empty(3, device="meta"))
    optimizer = create_optimizer(OptimizerConfig(name="adam"), [p])
    optimizer.param_groups[0]["fused"] = fused  # torch makes none for this device
    optimizer.state[p] = {"step": torch.tensor(3.0), "exp_avg": torch.zeros(3)}
    place_steps(optimizer)
    assert optimizer.state[p]["step"].device.type == device
    assert optimizer.state[p]["exp_avg"].device.type == "cpu"


def test_momentum_is_refused_where_it_would_be_ignored():
    with pytest.raises(ConfigError, match=r"optimizer\.momentum = 0\.9 is for sgd; adam has its"):
        create_optimizer(OptimizerConfig(name="adam", momentum=0.9), [parameter()])


def test_warm_up_is_linear_and_ends_at_one():
    assert [warmup_factor(k, 4) for k in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert warmup_factor(0, 0) == warmup_factor(0, 1) == 1.0


def test_the_rate_decays_from_one_and_never_reaches_zero():
    assert [decay_factor("none", k, 4) for k in range(4)] == [1, 1, 1, 1]
    assert [decay_factor("linear", k, 4) for k in range(4)] == [1, 0.75, 0.5, 0.25]
    cosine = [decay_factor("cosine", k, 4) for k in range(4)]
    assert cosine == pytest.approx([1, (2 + 2**0.5) / 4, 0.5, (2 - 2**0.5) / 4])
