import pytest
import torch
from torch import nn

from distcl.config import OptimizerConfig
from distcl.errors import ConfigError
from distcl.training.optimizer import (
    create_optimizer,
    place_steps,
    rate_factor,
    reset,
)
from distcl.updaters.quadratic_penalty import learning_rates

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


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"name": "adam", "momentum": 0.9}, r"optimizer\.momentum = 0\.9 is for sgd; adam has its"),
        ({"name": "adamw", "nesterov": True}, r"optimizer\.nesterov = True is for sgd; adamw has"),
        ({"nesterov": True}, r"nesterov = true needs optimizer\.momentum above 0"),
        ({"betas": [0.8, 0.9]}, r"betas = \[0\.8, 0\.9\] are for adam and adamw, not for sgd"),
        ({"name": "adam", "betas": [0.8, 1.0]}, r"optimizer\.betas: 1\.0 is not from 0 to below 1"),
        ({"name": "adam", "betas": [0.8]}, "at least 2 items"),
        ({"min_lr": 0.01}, r"min_lr = 0\.01 is where optimizer\.decay ends, which is 'none'"),
        ({"min_lr": 0.1, "decay": "linear"}, r"min_lr = 0\.1 is above lr = 0\.05"),
    ],
)
def test_what_would_be_ignored_is_refused(keys, message):
    with pytest.raises(ValueError, match=message):
        OptimizerConfig(**keys)


def test_betas_and_nesterov_reach_torch():
    adam = create_optimizer(OptimizerConfig(name="adamw", betas=[0.8, 0.95]), [parameter()])
    assert adam.param_groups[0]["betas"] == (0.8, 0.95)
    sgd = create_optimizer(OptimizerConfig(momentum=0.5, nesterov=True), [parameter()])
    assert sgd.param_groups[0]["nesterov"] and sgd.param_groups[0]["momentum"] == 0.5


HEAD = {"pattern": "head.*", "lr": 0.5}


def named():
    names = ("body.weight", "body.bias", "head.weight", "head.bias")
    return {name: nn.Parameter(torch.ones(k + 1)) for k, name in enumerate(names)}


def grouping(*groups, lr=0.1):
    config = OptimizerConfig(lr=lr, weight_decay=0.01, groups=list(groups))
    optimizer = create_optimizer(config, named().values(), list(named()))
    return [(g["names"], g["lr"], g["weight_decay"]) for g in optimizer.param_groups], optimizer


def test_the_first_group_that_matches_has_a_parameter():
    found, optimizer = grouping({"pattern": "*.bias", "weight_decay": 0.0}, HEAD)
    assert found == [
        (["body.bias", "head.bias"], 0.1, 0.0),
        (["head.weight"], 0.5, 0.01),
        (["body.weight"], 0.1, 0.01),
    ]
    assert [len(p) for g in optimizer.param_groups for p in g["params"]] == [2, 4, 3, 1]
    rates = learning_rates(optimizer, ["head.weight", "body.weight", "head.bias"])
    assert rates == [0.5, 0.1, 0.1]
    assert (
        learning_rates(create_optimizer(OptimizerConfig(lr=0.3), [parameter()]), "ab") == [0.3] * 2
    )
    assert [names for names, _, _ in grouping({"pattern": "*", "lr": 1.0})[0]] == [list(named())]


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([{"pattern": "haed.*", "lr": 1.0}], r"'haed\.\*': it matches no .*did you mean 'head\."),
        ([HEAD, {"pattern": "head.bias", "lr": 1.0}], r"'head\.bias': all that it matches are in"),
        ([{"pattern": "head.*"}], "neither lr nor weight_decay"),
        ([{**HEAD, "weight_deca": 1.0}], "no 'weight_deca' in it, did you mean 'weight_decay'"),
        ([{"lr": 1.0}], "it needs 'pattern', which parameters"),
        ([{"pattern": "head.*", "lr": -1.0}], r"'lr': input should be greater than 0, not -1\.0"),
    ],
)
def test_groups_that_do_not_fit_are_refused(groups, message):
    with pytest.raises((ConfigError, ValueError), match=message):
        grouping(*groups)


def factors(steps, **keys):
    return [rate_factor(OptimizerConfig(**keys), k, steps) for k in range(steps)]


def test_warm_up_is_linear_and_ends_at_one():
    assert factors(6, warmup_steps=4) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert factors(1) == factors(1, warmup_steps=1) == [1.0]


def test_the_rate_decays_from_one_and_never_reaches_zero():
    assert factors(4, decay="none") == [1, 1, 1, 1]
    assert factors(4, decay="linear") == [1, 0.75, 0.5, 0.25]
    cosine = factors(4, decay="cosine")
    assert cosine == pytest.approx([1, (2 + 2**0.5) / 4, 0.5, (2 - 2**0.5) / 4])
    both = factors(4, decay="linear", warmup_steps=2)
    assert both == [0.5, 0.75, 0.5, 0.25]


def test_the_floor_is_that_of_torchs_schedulers():
    optimizer = torch.optim.SGD([parameter()], lr=0.2)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 9, eta_min=0.03)
    wanted = []
    for _ in range(9):
        wanted.append(theirs.get_last_lr()[0])
        optimizer.step()
        theirs.step()
    ours = factors(9, lr=0.2, min_lr=0.03, decay="cosine")
    assert [0.2 * f for f in ours] == pytest.approx(wanted, rel=1e-12)
    assert factors(4, lr=0.2, min_lr=0.1, decay="linear") == [1, 0.875, 0.75, 0.625]
