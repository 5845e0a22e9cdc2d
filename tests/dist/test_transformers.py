"""Models of transformers: any number of ranks, every layout; plain transformers loads them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from distcl.checkpoint.export import evaluate, export
from distcl.config.load import load_config
from distcl.data.shards.inputs import SourceSamples
from distcl.data.shards.writer import write_shards
from distcl.data.stream import create_stream
from distcl.distributed.runtime import Runtime
from distcl.errors import ConfigError
from distcl.job import execute
from distcl.models import create_model
from distcl.models.build import load_pretrained
from distcl.training.build import assemble
from distcl.training.trainer import ContinuousTrainer
from tests.spawn import run_ranks

pytest.importorskip("transformers", reason="the extra 'transformers' is not installed")

GPT2 = (
    "{model_type='gpt2', n_layer=1, n_embd=12, n_head=2, n_positions=24, "
    "attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0, pad_token_id=256}"
)
JOB = (
    "stream.source=jsonl", "stream.drift=none", "stream.experiences=2",
    "stream.options.domain=where", "model.name=hf:AutoModelForCausalLM", "model.loss=next_token",
    f"model.options.config={GPT2}", "optimizer.lr=0.2", "training.batch_size=7",
    "training.epochs=1", "training.pretrain_epochs=1", "training.normalize=token",
    "continual_learning.importance_weighting=true", "run.report=false",
)  # fmt: skip


def write(path: Path, number: int = 40) -> Path:
    """Lines of texts of 2 to 21 letters, of two domains and three classes."""
    rng = np.random.default_rng(0)
    with path.open("w") as file:
        for k in range(number):
            text = "".join(chr(97 + c) for c in rng.integers(0, 26, 2 + k % 20))
            line = {"text": text, "where": "ab"[k * 2 // number], "kind": k % 3}
            file.write(json.dumps(line) + "\n")
    return path


def learned(path: Path, out: Path, runs: dict[str, tuple[str, ...]]) -> dict[str, Any]:
    """What each run drew in its round, and its weights; all in one process a rank."""
    found: dict[str, Any] = {}
    runtime = None
    for name, more in runs.items():
        sets = [*JOB, f"stream.path={path}", "run.precision=fp64", "tracking.kind=none", *more]
        config = load_config(None, sets, environ={})
        runtime = runtime or Runtime(config.run)
        stream = create_stream(config.stream, config.run.seed)
        trainer = ContinuousTrainer(assemble(config, runtime, stream, out / name), config)
        trainer.pretrain(stream.experiences[0])
        trainer.run_round(stream.experiences[1], "scheduled", stream.experiences)
        module = trainer.parts.forward.module
        weights = {n: p.detach().numpy().copy() for n, p in module.named_parameters()}
        found[name] = [r["draws_sha256"] for r in trainer.rounds], weights
    return found


def job(path: Path, out: Path, runs: dict[str, tuple[str, ...]]) -> dict[str, Any]:
    found = {}
    for name, more in runs.items():
        sets = [*JOB, f"stream.path={path}", *more]
        found[name] = execute("train", load_config(None, sets, environ={}), out / name)
    return found


UPDATERS = {
    name: (f"continual_learning.update_mode={name}", *more)
    for name, more in {
        "base": ("priority.signal=grad_norm",),
        "er": ("priority.signal=entropy",),
        "ewc_online": ("priority.signal=fisher",),
        "si": (),
        "agem": (),
        "jvp_reg": ("continual_learning.jvp_rho_x=0",),
    }.items()
}


def test_updaters_draw_and_learn_the_same_on_any_number_of_ranks_and_from_shards(
    tmp_path: Path,
) -> None:
    path, folder = write(tmp_path / "texts.jsonl"), tmp_path / "shards"
    config = load_config(None, [*JOB, f"stream.path={path}"], environ={})
    write_shards(SourceSamples(config.stream), folder, 7)
    shards = ("stream.source=shards", "stream.options={}", f"stream.path={folder}")
    runs = UPDATERS | {"shards": (*UPDATERS["er"], *shards)}
    one, three = (run_ranks(w, learned, path, tmp_path / str(w), runs)[0] for w in (1, 3))
    assert one["shards"][0] == one["er"][0]
    for key, value in one["er"][1].items():
        np.testing.assert_array_equal(one["shards"][1][key], value)
    for name, (draws, weights) in one.items():
        assert three[name][0] == draws, name
        for key, value in weights.items():
            np.testing.assert_allclose(three[name][1][key], value, atol=1e-9, err_msg=name)


def test_classes_of_unequal_texts_are_learned_the_same_on_any_number_of_ranks(
    tmp_path: Path,
) -> None:
    """Where a text ends is told by its ids: those in padding must not depend on who pads."""
    path = write(tmp_path / "texts.jsonl")
    kind = "AutoModelForSequenceClassification"
    more = (f"model.name=hf:{kind}", *KINDS[kind])
    runs = {
        name: (f"continual_learning.update_mode={name}", f"priority.source={source}", *signal, *more)
        for name, source, signal in (
            ("er", "score", ()),
            ("agem", "online", ("priority.signal=entropy",)),
        )
    }
    one, three = (run_ranks(w, learned, path, tmp_path / str(w), runs)[0] for w in (1, 3))
    for name, (draws, weights) in one.items():
        assert three[name][0] == draws, name
        for key, value in weights.items():
            np.testing.assert_allclose(three[name][1][key], value, atol=1e-9, err_msg=name)


def test_kfac_refuses_a_head_that_shares_its_weights(tmp_path: Path) -> None:
    kfac = "continual_learning.update_mode=kfac_online"
    with pytest.raises(ConfigError, match="'kfac_online' counts all positions of a batch, padding"):
        job(write(tmp_path / "texts.jsonl"), tmp_path, {"unequal": (kfac,)})
    (tmp_path / "texts").mkdir()
    for name in "ab":
        (tmp_path / "texts" / name).write_text("some words, some more of them " * 9)
    packed = (kfac, "stream.source=text", "stream.options={length=16}")
    with pytest.raises(ConfigError, match="'lm_head' .Linear.*shares weights with 'transformer.wte"):
        job(tmp_path / "texts", tmp_path, {"packed": packed})


LAYOUTS = {
    name: (f"parallel.strategy={name}", "continual_learning.update_mode=ewc_online")
    for name in ("zero2", "zero3", "fsdp2")
}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """The folder of texts and of the run of one process, and its summary."""
    folder = tmp_path_factory.mktemp("alone")
    path = write(folder / "texts.jsonl")
    plain = {"run": ("continual_learning.update_mode=ewc_online",)}
    return folder, run_ranks(1, job, path, folder / "1", plain)[0]["run"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_trains_it_as_one_process_does(
    layout: str, alone: tuple[Path, Any], tmp_path: Path
) -> None:
    if "zero" in layout:
        pytest.importorskip("deepspeed", reason="the extra 'deepspeed' is not installed")
    folder, one = alone
    path = folder / "texts.jsonl"
    two = run_ranks(2, job, path, tmp_path / "2", {"run": LAYOUTS[layout]})[0]["run"]
    np.testing.assert_allclose(two["accuracy"][-1], one["accuracy"][-1], atol=0.02)
    names = [at / "run/checkpoints/final.safetensors" for at in (folder / "1", tmp_path / "2")]
    weights = [load_file(name) for name in names]
    assert weights[0].keys() == weights[1].keys() and "lm_head.weight" not in weights[0]
    for name, tensor in weights[0].items():
        np.testing.assert_allclose(weights[1][name], tensor, atol=2e-5, err_msg=name)
    row = run_ranks(2, evaluate, tmp_path / "2" / "run")[0]["accuracy"]
    np.testing.assert_allclose(row, two["accuracy"][-1], atol=1e-6)


THEIRS = """
import sys, torch, transformers
kind, folder, ids, out = sys.argv[1:]
model = getattr(transformers, kind).from_pretrained(folder).eval()
assert "distcl" not in sys.modules
with torch.no_grad():
    torch.save(model(input_ids=torch.load(ids)).logits, out)
"""


def ours(run: Path, ids: torch.Tensor) -> torch.Tensor:
    """The logits of a run's final weights, by the model that its configuration makes."""
    config = load_config(run / "config.toml", environ={})
    stream = create_stream(config.stream, config.run.seed)
    model = create_model(config.model, stream.spec, 1).eval()
    load_pretrained(model, run / "checkpoints" / "final.safetensors")
    with torch.no_grad():
        found: torch.Tensor = model(ids)
    return found


KINDS = {
    "AutoModelForCausalLM": (),
    "AutoModelForSequenceClassification": (
        "stream.options.label=kind", "model.loss=cross_entropy", "training.normalize=sample",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_plain_transformers_gives_the_same_logits(kind: str, tmp_path: Path) -> None:
    path = write(tmp_path / "texts.jsonl")
    execute_one = {"run": (f"model.name=hf:{kind}", *KINDS[kind])}
    job(path, tmp_path, execute_one)
    run, to = tmp_path / "run", tmp_path / "export"
    written = export(run, to)
    assert {file.name for file in written} == {"model.safetensors", "config.json", "config.toml"}
    ids = torch.randint(0, 256, (3, 9), generator=torch.Generator().manual_seed(0))
    torch.save(ids, tmp_path / "ids.pt")
    code = [sys.executable, "-c", THEIRS, kind, str(to), str(tmp_path / "ids.pt")]
    done = subprocess.run([*code, str(tmp_path / "logits.pt")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), ours(run, ids))

    again = f"model.options={{path='{to}'}}"  # and so do we: a run goes on from an export
    summary = job(path, tmp_path, {"again": (*execute_one["run"], again)})["again"]
    assert summary["status"] == "done"
    newest = export(sorted((run / "checkpoints").glob("step-*"))[-1], tmp_path / "newest")
    assert newest[-1].read_text() == (to / "config.json").read_text()
