"""One strict way from files to a run: resume, eval and export; what each rank reads of them."""

from __future__ import annotations

import gc
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from distcl import job
from distcl.checkpoint import reader, state, store
from distcl.checkpoint.export import evaluate, export
from distcl.checkpoint.store import CheckpointStore, load, rank_file
from distcl.distributed.runtime import Runtime
from distcl.errors import CheckpointError, Preempted
from distcl.types import DataSpec
from tests.small import execute, small
from tests.spawn import run_ranks

PLAIN = (
    "model.options={}",
    "stream.experiences=2",
    "stream.samples_per_experience=300",
    "training.pretrain_epochs=1",
    "training.epochs=1",
)
KEYS = (f"model.name={__name__}:variant", *PLAIN)
made: list[nn.Module] = []


def variant(spec: DataSpec) -> nn.Module:
    """A model whose code, not configuration, says what it is."""
    kind = os.environ.get("TEST_VARIANT", "")
    width = 12 if kind == "width" else 16
    conv = nn.Conv2d(1, 4, (2, 4) if kind == "transposed" else (4, 2))
    model = nn.Sequential(
        conv,
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(16, width),
        nn.Tanh(),
        nn.Linear(width, spec.classes),
    )
    if kind == "surplus":
        model.append(nn.Linear(spec.classes, spec.classes))
    if kind == "lacks":
        model[5] = nn.Linear(width, spec.classes, bias=False)
    model.register_buffer("count", torch.zeros(3, dtype=torch.float32 if kind == "kind" else int))
    return model


REFUSED = {
    "width": r"'3.weight' has shape \[16, 16\], the model's has \[12, 16\], '3.bias'.*, '5.weight'",
    "transposed": r"'0.weight' has shape \[4, 1, 4, 2\], the model's has \[4, 1, 2, 4\]",
    "surplus": "lacks '6.weight', '6.bias' of the model",
    "lacks": "has '5.bias', which the model has not",
    "kind": "'count' is int, the model's is float",
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: Any) -> Path:
    out = tmp_path_factory.mktemp("variants") / "run"
    execute("train", KEYS, out)
    return out


@pytest.mark.parametrize("kind", REFUSED)
def test_weights_of_another_model_are_refused(
    kind: str, run: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setenv("TEST_VARIANT", kind)
    newest = max((run / "checkpoints").glob("step-*"))
    with pytest.raises(CheckpointError, match=REFUSED[kind]):
        evaluate(run)
    with pytest.raises(CheckpointError, match=REFUSED[kind]):
        evaluate(newest)
    with pytest.raises(CheckpointError, match=REFUSED[kind]):
        job.execute("train", small(*KEYS), tmp_path, resume=str(newest))
    final = run / "checkpoints" / "final.safetensors"
    with pytest.raises(CheckpointError, match=REFUSED[kind]):
        execute("train", (*KEYS, f"model.pretrained={final}"), tmp_path / "pretrained")


def channels_last(spec: DataSpec) -> nn.Module:
    conv = nn.Conv2d(3, 4, 3, padding=1)
    model = nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1), conv, nn.Flatten(), nn.Linear(256, spec.classes)
    )
    return model.to(memory_format=torch.channels_last)


def test_a_model_in_another_memory_format_is_what_it_was(tmp_path: Path) -> None:
    keys = (f"model.name={__name__}:channels_last", *PLAIN, "optimizer.momentum=0.9")
    summary = execute("train", keys, tmp_path / "run")
    assert evaluate(tmp_path / "run")["accuracy"] == summary["accuracy"][-1]
    first = min((tmp_path / "run" / "checkpoints").glob("step-*"))
    again = job.execute("train", small(*keys), tmp_path / "again", resume=str(first))
    assert again["accuracy"] == summary["accuracy"]


def test_eval_and_export_fall_back_past_what_is_damaged(tmp_path: Path) -> None:
    keys = (*KEYS, "checkpoint.save_final=false", "checkpoint.keep=3")
    execute("train", keys, tmp_path / "run")
    first, last = sorted((tmp_path / "run" / "checkpoints").glob("step-*"))
    with (last / store.MODEL).open("ab") as file:
        file.write(b"x")
    for call in (evaluate, lambda path, warn: export(path, tmp_path / "to", warn)):
        warned: list[str] = []
        call(tmp_path / "run", warned.append)
        assert len(warned) == 1
        assert f"'{last / store.MODEL}' has" in warned[0]
        assert "falling back to the one before" in warned[0]
    assert (tmp_path / "to" / store.MODEL).read_bytes() == (first / store.MODEL).read_bytes()
    (tmp_path / "run" / "checkpoints" / "final.safetensors").write_bytes(b"cut")
    warned = []
    assert evaluate(tmp_path / "run", warned.append)["weights"] == str(first / store.MODEL)
    assert "final.safetensors' is not a valid" in warned[0]
    (first / "shared.pt").unlink()
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* can be used"):
        evaluate(tmp_path / "run")


def _mapped(word: str) -> int:
    """Bytes of files whose name has ``word`` that are mapped into this process and were read."""
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            inside = word in line
        elif inside and line.startswith("Rss:"):
            total += 1024 * int(line.split()[1])
    return total


def _anonymous() -> int:
    """Bytes of this process's memory that no file backs."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


class Rotary(nn.Module):
    def __init__(self, spec: DataSpec) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(64, 1000), nn.Tanh())
        self.norm = nn.BatchNorm1d(1000)
        self.mix = nn.Linear(1000, 500)
        self.head = nn.Linear(500, spec.classes)
        freq = 10_000 ** -(torch.arange(1000) / 1000)
        self.register_buffer("inv_freq", freq, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.mix(self.norm(self.body(x)) * self.inv_freq))


def rotary(spec: DataSpec) -> nn.Module:
    made.append(Rotary(spec))
    return made[-1]


def _stopped(keys: tuple[str, ...], out: Path) -> None:
    with pytest.raises(Preempted):
        job.execute("train", small(*keys, "run.max_minutes=1e-6"), out)


def _resumed(keys: tuple[str, ...], out: Path) -> dict[str, Any]:
    """Go on with a run, and note what this rank reads of its checkpoint."""
    held: list[Any] = []
    hashed: list[str] = []
    found: dict[str, Any] = {}
    digest, restore = store.file_digest, job.restore

    def noted(file: Path) -> str:
        hashed.append(file.name)
        return digest(file)

    class Kept(reader.Reader):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            held.append(self)

    def restored(*args: Any) -> None:
        restore(*args)
        found["mapped"] = _mapped("/rank-")
        held.clear()
        gc.collect()
        found["left"] = _mapped("/rank-") + _mapped("/shared.pt") + _mapped("/model.safe")
        store.file_digest = digest

    store.file_digest, job.restore, state.Reader = noted, restored, Kept
    job.execute("train", small(*keys), out, resume="auto")
    own = Rotary(DataSpec((8, 8), 10))
    found["inv_freq"] = torch.equal(made[-1].inv_freq, own.inv_freq)
    return {"hashed": hashed, **found}


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_three_ranks_share_what_is_read_of_a_checkpoint(strategy: str, tmp_path: Path) -> None:
    keys = (
        f"model.name={__name__}:rotary",
        *PLAIN,
        f"parallel.strategy={strategy}",
        "continual_learning.update_mode=si",
        "optimizer.name=adam",
        "optimizer.lr=0.001",
        "run.poll_steps=2",
    )
    run_ranks(3, _stopped, keys, tmp_path)
    (path,) = (tmp_path / "checkpoints").glob("step-*")
    sizes = {p.name: p.stat().st_size for p in path.iterdir() if p.name != store.MANIFEST}
    ranks = run_ranks(3, _resumed, keys, tmp_path)
    assert all(rank["inv_freq"] for rank in ranks)
    assert sorted(name for rank in ranks for name in rank["hashed"]) == sorted(sizes)
    whole, largest = sum(sizes.values()), max(sizes.values())
    assert largest < whole / 3 + sizes[rank_file(0)]
    for k, rank in enumerate(ranks):
        assert sum(sizes[name] for name in rank["hashed"]) <= whole / 3 + largest / 2
        assert rank["left"] == 0
        if strategy == "fsdp2":  # under ddp every rank needs the optimizer's whole state
            assert rank["mapped"] < sizes[rank_file(k)] + 2**20


def _chosen(folder: Path) -> tuple[str, list[str], list[str]]:
    """Write three checkpoints, damage what rank 2 reads of the newest, and look for a good one."""
    runtime = Runtime()
    warned: list[str] = []
    checkpoints = CheckpointStore(runtime, folder, 3, warned.append)
    for step in (1, 2, 3):
        mine = {"slice": torch.full((50_000 + runtime.rank,), float(step))}
        model = {"w": torch.full((9,), float(step))}
        checkpoints.save(step, mine, {"step": step}, model, {"config": {}})
        assert checkpoints.finish()
    if runtime.rank == 1:
        for step, name in ((3, rank_file(0)), (2, store.MODEL)):
            file = folder / f"step-0000000{step}" / name
            data = bytearray(file.read_bytes())
            data[len(data) // 2] ^= 1
            file.write_bytes(data)
    runtime.barrier()
    seen: list[str] = []
    digest = store.file_digest
    store.file_digest = lambda file: seen.append(f"{file.parent.name}/{file.name}") or digest(file)
    found, hashed = checkpoints.newest(), list(seen)
    assert found is not None
    with pytest.raises(CheckpointError, match=r"rank-00000.pt' is damaged"):
        store.verify(folder / "step-00000003", runtime)
    return found.name, hashed, warned


def test_a_file_that_one_rank_finds_damaged_makes_all_fall_back(tmp_path: Path) -> None:
    ranks = run_ranks(3, _chosen, tmp_path)
    assert [name for name, _, _ in ranks] == ["step-00000001"] * 3
    hashed = [name for _, names, _ in ranks for name in names]
    assert len(hashed) == len(set(hashed))  # none by two ranks
    assert sorted(n for n in hashed if n.startswith(ranks[0][0])) == [
        f"step-00000001/{n}" for n in (store.MODEL, *map(rank_file, range(3)), store.SHARED)
    ]
    for _, _, warned in ranks:
        assert len(warned) == 2


def test_what_a_file_holds_is_not_read_before_it_is_used(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(5_000_000)}, tmp_path / "rank-00000.pt")
    before = _anonymous()
    held = load(tmp_path / "rank-00000.pt")
    assert _mapped("/rank-00000.pt") < 2**20
    assert _anonymous() - before < 5 * 2**20  # of 20 MB
    assert held["a"][:10].sum() == 10
    held["a"][0] = 5  # a copy of the page, not the file
    assert load(tmp_path / "rank-00000.pt")["a"][0] == 1
