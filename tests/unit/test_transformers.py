"""What models of transformers refuse, and what they are made with."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch

from distcl.config import ModelConfig
from distcl.errors import ConfigError
from distcl.models import create_model
from distcl.types import DataSpec

pytest.importorskip("transformers", reason="the extra 'transformers' is not installed")

TOKENS = DataSpec((), 257, (8,), tokens=257)
SMALL: dict[str, Any] = {"model_type": "gpt2", "n_layer": 1, "n_embd": 8, "n_head": 2}


def build(name: str, spec: DataSpec = TOKENS, seed: int = 0, **options: Any) -> Any:
    return create_model(ModelConfig(name=f"hf:{name}", options=options), spec, seed)


def causal(**config: Any) -> Any:
    return build("AutoModelForCausalLM", config={**SMALL, **config})


def test_sizes_come_from_the_stream_and_weights_from_the_seed() -> None:
    state = torch.random.get_rng_state()
    one, same, other = (
        build("AutoModelForCausalLM", seed=s, config=SMALL).state_dict() for s in (0, 0, 1)
    )
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(one[n], same[n]) for n in one)
    assert not torch.equal(one["lm_head.weight"], other["lm_head.weight"])
    assert causal().config.vocab_size == 257 and causal(vocab_size=300).config.vocab_size == 300
    heads = build(
        "AutoModelForSequenceClassification", DataSpec((), 5, tokens=40), config=SMALL
    ).config
    assert (heads.num_labels, heads.vocab_size) == (5, 40)


@pytest.mark.parametrize("model_type", ["gpt2", "llama", "bert"])
def test_padding_on_the_right_changes_nothing_and_nothing_later_is_seen(model_type: str) -> None:
    sizes = {
        "num_hidden_layers": 1, "hidden_size": 8, "num_attention_heads": 2,
    }  # fmt: skip
    config = {"model_type": model_type, **sizes}
    model = build("AutoModelForCausalLM", config=config).double().eval()
    ids = torch.tensor([[5, 6, 7, 256, 256], [9, 8, 7, 6, 5]])
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    padded = model({"input_ids": ids, "attention_mask": mask})
    torch.testing.assert_close(padded[0, :3], model(ids[:1, :3])[0])
    torch.testing.assert_close(padded[1, :2], model(ids[1:, :2])[0])


SIZES: dict[str, Any] = {"num_hidden_layers": 1, "hidden_size": 8, "num_attention_heads": 2}


def classifier(model_type: str, **more: Any) -> Any:
    config = {"model_type": model_type, **SIZES, **more}
    spec = DataSpec((), 3, tokens=257)
    model = build("AutoModelForSequenceClassification", spec, config=config).double().eval()
    for p in model.parameters():  # a head that begins with zeros would hide everything
        torch.nn.init.normal_(p, generator=torch.Generator().manual_seed(p.numel()))
    return model


@pytest.mark.parametrize("filler", [0, 9, 256])
@pytest.mark.parametrize("model_type", ["gpt2", "llama", "bert", "roberta"])
def test_what_is_behind_a_text_does_not_change_its_class(model_type: str, filler: int) -> None:
    model = classifier(model_type)
    ids = torch.tensor([[5, 6, 7, 256, filler, filler], [9, 8, 7, 6, 5, 256]])
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1] * 6])
    padded = model({"input_ids": ids, "attention_mask": mask})
    one = torch.ones(1, 4, dtype=torch.int64)
    torch.testing.assert_close(padded[:1], model({"input_ids": ids[:1, :4], "attention_mask": one}))
    torch.testing.assert_close(padded[1:], model(ids[1:]))


def test_a_classifier_without_a_padding_token_is_given_one_and_says_so(caplog: Any) -> None:
    with caplog.at_level("INFO", "distcl"):
        assert classifier("gpt2").config.pad_token_id == 256
        assert classifier("gpt2", eos_token_id=7).config.pad_token_id == 7
        assert classifier("gpt2", pad_token_id=4).config.pad_token_id == 4
        assert classifier("bert").config.pad_token_id == 0
    said = [record.getMessage().partition("; it is ")[2] for record in caplog.records]
    assert said == ["token 256, the last of its vocabulary", "token 7, its eos_token_id"]


def test_tokens_are_classified() -> None:
    config = {"model_type": "bert", "hidden_size": 8, "num_hidden_layers": 1, "vocab_size": 50,
              "num_attention_heads": 2}  # fmt: skip
    spec = DataSpec((6,), 3, (6,))
    logits = build("AutoModelForTokenClassification", spec, config=config)(torch.ones(2, 6).long())
    assert logits.shape == (2, 6, 3)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("AutoModelForCausalLN", {}, "no class 'AutoModelForCausalLN', did you mean 'AutoModelFor"),
        ("AutoModelForCausalLM", {}, "needs one of model.options.path"),
        ("AutoModelForCausalLM", {"path": "x", "config": SMALL}, "needs only one of"),
        ("AutoModelForCausalLM", {"pth": "x"}, "no option 'pth', did you mean 'path'"),
        ("AutoModelForCausalLM", {"path": "/no/where"}, "of '/no/where': "),
        ("AutoModelForCausalLM", {"config": {"model_type": "gpt3"}}, "no 'gpt3', did you mean"),
        ("AutoModelForCausalLM", {"config": {"n_layer": 2}}, "has no None"),
        ("AutoModelForCausalLM", {"config": {**SMALL, "n_layers": 2}}, "no 'n_layers', did you"),
        ("AutoModelForCausalLM", {"config": {**SMALL, "n_layer": "two"}}, "n_layer.*expected int"),
        ("AutoModelForCausalLM", {"config": {**SMALL, "n_head": 3}}, "must be divisible"),
        ("AutoModelForCausalLM", {"config": {**SMALL, "vocab_size": 99}}, "99 tokens.*up to 256"),
        ("AutoModelForCausalLM", {"config": SMALL, "attn_implementation": "no"}, "config: "),
        ("AutoModelForCausalLM", {"config": SMALL, "dtype": "bfloat16"}, "options.dtype"),
        ("AutoModelForCausalLM", {"config": {"model_type": "vit"}}, "options.config: "),
    ],
)  # fmt: skip
def test_what_cannot_be_is_a_sentence(name: str, options: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        build(name, **options)
    assert len(str(raised.value)) < 400


def test_a_longer_sample_than_the_model_reads_is_a_sentence() -> None:
    model = causal(n_positions=4)
    with pytest.raises(ConfigError, match=r"at most 4 tokens.*a sample has 5"):
        model(torch.zeros(1, 5, dtype=torch.int64))


def test_the_longest_sample_is_compared_before_anything_is_trained() -> None:
    longest = DataSpec((), 257, (0,), tokens=257, longest=9)
    with pytest.raises(ConfigError, match=r"at most 8 tokens.*a sample has 9"):
        build("AutoModelForCausalLM", longest, config={**SMALL, "n_positions": 8})
    build("AutoModelForCausalLM", longest, config={**SMALL, "n_positions": 9})


def test_positions_of_padding_are_no_room_for_tokens() -> None:
    """RoBERTa counts positions from behind that of its padding token, 1: two less are left."""
    model = classifier("roberta", max_position_embeddings=12)
    assert model(torch.full((1, 10), 5)).shape == (1, 3)
    with pytest.raises(ConfigError, match=r"at most 10 tokens.*a sample has 11"):
        model(torch.full((1, 11), 5))
    assert classifier("bert", max_position_embeddings=12)(torch.full((1, 12), 5)).shape == (1, 3)


def test_transformers_that_is_absent_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)  # as if it were not there
    with pytest.raises(ConfigError, match=r"needs the package 'transformers'.*distcl\[transform"):
        causal()
