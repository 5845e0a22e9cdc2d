"""Adapters of peft in models: what trains, under which names, and what is refused."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from distcl.config import ModelConfig
from distcl.config.load import load_config
from distcl.errors import CheckpointError, ConfigError
from distcl.models import create_model
from distcl.models.lora import split_adapter
from distcl.types import DataSpec
from tests.small import execute, small

pytest.importorskip("peft", reason="the extra 'transformers' is not installed")

TOKENS = DataSpec((), 257, (8,), tokens=257)
GPT2: dict[str, Any] = {"model_type": "gpt2", "n_layer": 1, "n_embd": 8, "n_head": 2}
IDS = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12]])


def build(name: str, spec: DataSpec, options: dict[str, Any], seed: int = 0, **lora: Any) -> Any:
    return create_model(ModelConfig(name=name, options=options, lora=lora), spec, seed)


def causal(seed: int = 0, **lora: Any) -> Any:
    return build("hf:AutoModelForCausalLM", TOKENS, {"config": GPT2}, seed, **lora)


def trained(model: nn.Module) -> list[str]:
    return [name for name, p in model.named_parameters() if p.requires_grad]


def test_without_targets_every_linear_layer_but_the_head_has_an_adapter() -> None:
    layers = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    expected = [
        f"transformer.h.0.{layer}.lora_{x}.default.weight" for layer in layers for x in "AB"
    ]
    assert trained(causal(r=2)) == expected
    assert trained(causal(r=2, targets=["attn.c_attn"])) == expected[:2]
    assert trained(causal(r=2, targets=["*attn.c_*"])) == expected[:4]


def test_a_new_adapter_changes_no_output_and_comes_from_the_seed() -> None:
    plain, one, same, other = causal().eval(), *(causal(s, r=2).eval() for s in (0, 0, 1))
    assert torch.equal(plain(IDS), one(IDS))
    a = "transformer.h.0.attn.c_attn.lora_A.default.weight"
    one, same, other = (dict(m.named_parameters())[a] for m in (one, same, other))
    assert torch.equal(one, same) and not torch.equal(one, other)
    assert one.shape == (2, 8)


def test_heads_of_classes_train_whole_and_any_model_may_have_adapters() -> None:
    spec = DataSpec((), 3, tokens=257)
    heads = build("hf:AutoModelForSequenceClassification", spec, {"config": GPT2}, r=1)
    assert "score.weight" in trained(heads)
    images = DataSpec((3, 8, 8), 5)
    mlp = build("mlp", images, {"hidden": [6]}, r=1, targets=["body.0"], train=["head"])
    names = ["body.0.lora_A.default.weight", "body.0.lora_B.default.weight"]
    assert trained(mlp) == [*names, "head.weight", "head.bias"]
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(mlp.eval()(x), build("mlp", images, {"hidden": [6]}).eval()(x))
    cnn = build("resnet18", images, {"width": 4, "norm": "batch"}, r=1, train=["head", "body.7"],
                targets=["body.0.residual.0"])  # fmt: skip
    assert not cnn.train().stem[1].training and cnn.body[7].residual[1].training


@pytest.mark.parametrize(
    ("lora", "says"),
    [
        ({"rank": 3}, r"model\.lora: it needs 'r', the rank of the adapters"),
        ({"r": 3, "target": []}, r"there is no 'target' in it, did you mean 'targets'\?"),
        ({"r": 3, "zzz": 1}, "there is no 'zzz' in it; it takes r, alpha, targets, dropout, train"),
        ({"r": 0}, "'r': input should be greater than or equal to 1, not 0"),
        ({"r": 3, "dropout": 1.0}, "'dropout': input should be less than 1, not 1.0"),
        ({"r": 3, "targets": "c_attn"}, "'targets': input should be a valid list, not 'c_attn'"),
    ],
)
def test_a_table_that_does_not_fit_is_refused(lora: dict[str, Any], says: str) -> None:
    text = ", ".join(f"{k} = {v!r}" for k, v in lora.items())
    with pytest.raises(ConfigError, match=says):
        load_config(None, [f"model.lora={{{text}}}"], environ={})


@pytest.mark.parametrize(
    ("lora", "says"),
    [
        (
            {"targets": ["c_atn"]},
            r"lora\.targets: the model has no Linear .* 'c_atn', did you mean",
        ),
        ({"targets": ["wte"]}, "no Linear or Conv2d layer 'wte'"),
        ({"train": ["lm_hed"]}, r"lora\.train: the model has no module 'lm_hed', .*'lm_head'\?"),
        ({"train": ["lm_head"]}, "'lm_head' shares its weights with 'transformer.wte.weight'"),
        ({"train": ["attn"], "targets": ["c_attn"]}, "c_attn' is in targets and in what trains"),
    ],
)
def test_names_that_do_not_fit_are_refused(lora: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        causal(r=1, **lora)


def test_without_peft_it_says_what_to_type(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigError, match=r"needs the package 'peft'.*pip install 'distcl\[trans"):
        causal(r=1)


def test_tensors_of_a_peft_model_are_split_as_those_of_ours() -> None:
    about = {"modules_to_save": ["score"]}
    ours = ["h.c.base_layer.weight", "h.c.lora_A.default.weight", "h.default.bias", "score.weight"]
    theirs = [f"base_model.model.{n}" for n in ours[:3]]
    theirs += ["base_model.model.score.original_module.weight"]
    theirs += ["base_model.model.score.modules_to_save.default.weight"]
    for names in (ours, theirs):
        adapter, base = split_adapter(names, about)
        assert adapter.keys() == {
            "base_model.model.h.c.lora_A.weight", "base_model.model.score.weight",
        }  # fmt: skip
        assert base.keys() == {"h.c.weight", "h.default.bias", "score.weight"}
    assert (
        base["score.weight"] == theirs[3] and adapter["base_model.model.score.weight"] == theirs[4]
    )


def test_a_run_may_begin_with_the_adapters_of_another(tmp_path: Path) -> None:
    lora = ("model.lora={r = 2, targets = ['body.0'], train = ['head']}", "training.epochs=1")
    execute("train", lora, tmp_path / "a")
    final = tmp_path / "a" / "checkpoints" / "final.safetensors"
    config = small(*lora, f"model.pretrained={final}")
    model = create_model(config.model, DataSpec((1, 8, 8), 10), 5)
    held = load_file(final)
    assert all(torch.equal(tensor, held[name]) for name, tensor in model.state_dict().items())
    assert float(held["body.0.lora_B.default.weight"].abs().max()) > 0
    plain = small(f"model.pretrained={final}")
    with pytest.raises(ConfigError, match=r"final\.safetensors' has adapters: it needs the same"):
        create_model(plain.model, DataSpec((1, 8, 8), 10), 5)
    other = small("model.lora={r = 3, targets = ['body.0']}", f"model.pretrained={final}")
    with pytest.raises(CheckpointError, match=r"body\.0\.lora_A"):
        create_model(other.model, DataSpec((1, 8, 8), 10), 5)
