"""Parameters that do not train: which, what is refused, and norms that stay as they are."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import nn

from distcl.config import ModelConfig
from distcl.errors import ConfigError
from distcl.models import create_model
from distcl.models.freezing import freeze
from distcl.types import DataSpec
from tests.models import frozen_names

SPEC = DataSpec((3, 8, 8), 5)


def resnet(*patterns: str) -> Any:
    options = {"width": 4, "norm": "batch"}
    config = ModelConfig(name="resnet18", options=options, freeze=list(patterns))
    return create_model(config, SPEC, 0)


def test_parameters_that_match_take_no_gradients_and_weights_are_the_same() -> None:
    model, plain = resnet("stem.*", "body.[0-3].*"), resnet()
    assert not frozen_names(plain)
    every = dict(model.named_parameters())
    assert frozen_names(model) == {
        n for n in every if n.startswith(("stem.", *(f"body.{k}." for k in range(4))))
    }
    assert all(torch.equal(p, every[n]) for n, p in plain.named_parameters())


def test_norms_whose_statistics_match_stay_in_eval_mode_and_others_do_not() -> None:
    whole, weights = resnet("stem.*"), resnet("stem.?.weight", "stem.?.bias")
    x = torch.randn(4, 3, 8, 8)
    for model, moves in ((whole, False), (weights, True)):
        model.eval()
        model.train()
        before = model.stem[1].running_mean.clone()
        model(x)
        assert torch.equal(before, model.stem[1].running_mean) is not moves
        assert model.stem[1].training is moves
        assert model.training and model.body[0].residual[1].training
        assert not model.stem[1].weight.requires_grad
    statistics = resnet("*.running_mean").train()
    assert not frozen_names(statistics)
    assert not any(m.training for m in statistics.modules() if isinstance(m, nn.BatchNorm2d))
    bare = nn.Sequential(nn.BatchNorm1d(3, affine=False), nn.Linear(3, 2))
    freeze(bare, ["0.*"])
    assert not bare.train()[0].training


def test_a_norm_that_is_the_model_has_a_name_too() -> None:
    norm = nn.BatchNorm1d(3)
    freeze(norm, ["running_mean"])
    assert not norm.train().training and norm.weight.requires_grad


def test_a_tied_weight_is_frozen_under_any_of_its_names() -> None:
    for pattern in ("left.*", "right.*"):
        model = nn.Sequential(OrderedDict(left=nn.Linear(3, 3), right=nn.Linear(3, 3)))
        model.right.weight = model.left.weight
        freeze(model, [pattern])
        assert not model.left.weight.requires_grad


def test_what_matches_nothing_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(
        ConfigError, match=r"'stm\.\*' matches no parameter .*, did you mean 'stem\.\*'\?"
    ):
        resnet("stm.*")
    with pytest.raises(ConfigError, match=r"did you mean 'body\.0\.residual\.\*'"):
        resnet("body.0.residuals.*")
    with pytest.raises(ConfigError, match=r"did you mean 'head\.weight'"):
        resnet("head.weigth")
    with pytest.raises(
        ConfigError, match=r"; it has stem\.0\.weight, stem\.1\.weight, .* and more"
    ):
        resnet("encoder.layer.*")


def test_a_model_without_anything_to_train_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"model\.freeze = \['\*'\] leaves no parameter to train"):
        resnet("*")
    with pytest.raises(ConfigError, match="leaves no parameter to train"):
        resnet("stem.*", "[bh]*")
