"""Adapters on any number of ranks, in every layout; peft loads what a run exports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from distcl.checkpoint.export import evaluate, export
from distcl.checkpoint.store import rank_file
from distcl.config.load import load_config
from distcl.errors import Preempted
from distcl.job import execute
from distcl.models import create_model
from distcl.models.build import load_pretrained
from distcl.types import DataSpec
from tests import small
from tests.dist.test_transformers import JOB, KINDS, UPDATERS, job, learned, ours, write
from tests.faults.test_resume import Killer
from tests.spawn import run_ranks

peft = pytest.importorskip("peft", reason="the extra 'transformers' is not installed")
transformers = pytest.importorskip("transformers")

LORA = ("model.lora={r=3, alpha=6}",)
WORLD = 3


def adapters(weights: Any) -> set[str]:
    return {name for name in weights if ".lora_" in name}


def test_updaters_draw_and_learn_the_same_on_any_number_of_ranks(tmp_path: Path) -> None:
    path = write(tmp_path / "texts.jsonl")
    modes = {name: (*more, *LORA) for name, more in UPDATERS.items()}
    modes["kfac"] = (
        *LORA, "continual_learning.update_mode=kfac_online", "stream.source=text",
        f"stream.path={tmp_path / 'corpus'}", "stream.options={length=16}",
    )  # fmt: skip
    (tmp_path / "corpus").mkdir()
    for name in "ab":
        (tmp_path / "corpus" / name).write_text(f"some words of {name}, more of them " * 20)
    one, three = (run_ranks(w, learned, path, tmp_path / str(w), modes)[0] for w in (1, WORLD))
    for name, (draws, weights) in one.items():
        assert three[name][0] == draws, name
        assert any(weights[key].any() for key in adapters(weights) if "lora_B" in key), name
        for key, value in weights.items():
            np.testing.assert_allclose(three[name][1][key], value, atol=1e-9, err_msg=name)
            same = np.array_equal(value, one["base"][1][key])
            assert same or ".lora_" in key, (name, key)  # the base is frozen


@pytest.mark.parametrize("layout", ["ddp", "zero2", "zero3", "fsdp2"])
def test_anchor_and_fisher_are_as_large_as_the_adapter(layout: str, tmp_path: Path) -> None:
    if "zero" in layout:
        pytest.importorskip("deepspeed", reason="the extra 'deepspeed' is not installed")
    path = write(tmp_path / "texts.jsonl")
    keys = (*LORA, "continual_learning.update_mode=ewc_online", "optimizer.name=adamw",
            "optimizer.lr=0.01")  # fmt: skip
    one = run_ranks(1, job, path, tmp_path / "1", {"run": keys})[0]["run"]
    more = (*keys, f"parallel.strategy={layout}")
    several = run_ranks(WORLD, job, path, tmp_path / "3", {"run": more}, timeout=150)[0]["run"]
    np.testing.assert_allclose(several["accuracy"][-1], one["accuracy"][-1], atol=0.02)
    final = [load_file(tmp_path / w / "run/checkpoints/final.safetensors") for w in "13"]
    assert final[0].keys() == final[1].keys()
    for name, tensor in final[0].items():
        if name in adapters(final[0]):
            np.testing.assert_allclose(final[1][name], tensor, atol=1e-3, err_msg=name)
        else:
            assert torch.equal(final[1][name], tensor), name
    trained = sum(final[0][n].numel() * 4 for n in adapters(final[0]))
    newest = sorted((tmp_path / "3/run/checkpoints").glob("step-*"))[-1]
    total = 0
    for rank in range(WORLD):
        state = torch.load(newest / rank_file(rank), weights_only=True)
        held = {**state["anchor"]["theta_star"]}, state["updater"]["fisher"]
        assert all(adapters(part) == set(part) for part in held)
        size = sum(v.numel() * v.element_size() for part in held for v in part.values())
        assert size <= 1.05 * 2 * trained / WORLD
        total += size
    assert total == 2 * trained < 0.5 * sum(t.numel() * 4 for t in final[0].values())
    row = run_ranks(2, evaluate, tmp_path / "3" / "run")[0]["accuracy"]
    np.testing.assert_allclose(row, several["accuracy"][-1], atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_peft_loads_what_is_exported_and_gives_the_same_logits(kind: str, tmp_path: Path) -> None:
    path = write(tmp_path / "texts.jsonl")
    keys = (f"model.name=hf:{kind}", *KINDS[kind], "model.lora={r=2, dropout=0.1}")
    ids = torch.randint(0, 256, (3, 9), generator=torch.Generator().manual_seed(0))

    def compared(run: Path, base: Path) -> None:
        plain = getattr(transformers, kind).from_pretrained(str(base))
        loaded = peft.PeftModel.from_pretrained(plain, str(run / "to")).eval()
        torch.testing.assert_close(loaded(input_ids=ids).logits, ours(run, ids))

    job(path, tmp_path, {"run": keys})
    run = tmp_path / "run"
    names = {str(file.relative_to(run / "to")) for file in export(run, run / "to")}
    adapter = {"adapter_model.safetensors", "adapter_config.json", "config.toml"}
    assert names == adapter | {"base/model.safetensors", "base/config.json"}
    compared(run, run / "to" / "base")
    if kind != "AutoModelForCausalLM":
        return
    base = run / "to" / "base"
    job(path, tmp_path, {"again": (*keys, f"model.options={{path='{base}'}}")})
    again = tmp_path / "again"
    assert {file.name for file in export(again, again / "to")} == adapter
    about = json.loads((again / "to" / "adapter_config.json").read_text())
    assert about["base_model_name_or_path"] == str(base)
    compared(again, base)


def test_a_cut_run_goes_on_bit_for_bit(tmp_path: Path) -> None:
    path = write(tmp_path / "texts.jsonl")
    keys = (*JOB, f"stream.path={path}", *LORA, "run.poll_steps=1", "optimizer.momentum=0.9",
            "continual_learning.update_mode=si")  # fmt: skip
    config = load_config(None, keys, environ={})
    with pytest.raises(Preempted):
        execute("train", config, tmp_path / "cut", Killer(4))
    execute("train", config, tmp_path / "cut", resume="auto")
    execute("train", config, tmp_path / "whole")
    cut, whole = (
        load_file(tmp_path / name / "checkpoints/final.safetensors") for name in ("cut", "whole")
    )
    assert cut.keys() == whole.keys() and all(torch.equal(cut[n], whole[n]) for n in cut)


def theirs(spec: DataSpec) -> torch.nn.Module:
    """A PeftModel of the user's."""
    mlp = create_model(small.small().model, spec, 5)
    lora = peft.LoraConfig(r=2, target_modules=["body.0"], modules_to_save=["head"])
    model: torch.nn.Module = peft.get_peft_model(mlp, lora)
    return model


def test_a_model_that_is_a_peft_model_is_exported_alike(tmp_path: Path) -> None:
    keys = (f"model.name={__name__}:theirs", "model.options={}", "optimizer.lr=0.01")
    small.execute("train", keys, tmp_path / "run")
    export(tmp_path / "run", tmp_path / "to")
    spec = DataSpec((1, 8, 8), 10)
    plain = create_model(small.small().model, spec, 7)
    plain.load_state_dict(load_file(tmp_path / "to/base/model.safetensors"))
    loaded = peft.PeftModel.from_pretrained(plain, str(tmp_path / "to")).eval()
    mine = create_model(small.small(*keys).model, spec, 7).eval()
    load_pretrained(mine, tmp_path / "run/checkpoints/final.safetensors")
    x = torch.randn(4, 1, 8, 8)
    torch.testing.assert_close(loaded(x), mine(x))


def test_any_model_may_have_adapters_and_they_are_exported(tmp_path: Path) -> None:
    keys = ("model.lora={r=2, alpha=2, targets=['body.0'], train=['head']}", "optimizer.lr=0.05")
    small.execute("train", keys, tmp_path / "run")
    export(tmp_path / "run", tmp_path / "to")
    spec = DataSpec((1, 8, 8), 10)
    plain = create_model(small.small().model, spec, 5)
    plain.load_state_dict(load_file(tmp_path / "to/base/model.safetensors"))
    loaded = peft.PeftModel.from_pretrained(plain, str(tmp_path / "to")).eval()
    mine = create_model(small.small(*keys).model, spec, 5).eval()
    load_pretrained(mine, tmp_path / "run/checkpoints/final.safetensors")
    x = torch.randn(4, 1, 8, 8)
    torch.testing.assert_close(loaded(x), mine(x))
    assert not torch.equal(mine(x), create_model(small.small().model, spec, 0)(x))
