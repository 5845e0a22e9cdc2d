"""Paths that users give: ``~`` is home, all else is a name, and what the system refuses is said."""

import gzip
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from distcl.config import DataConfig, ModelConfig, StreamConfig
from distcl.config.load import load_config
from distcl.data.shards.index import index_folder
from distcl.data.shards.manifest import Shard, numbered, read_shards, write_manifest
from distcl.data.shards.sequential import open_url
from distcl.data.stream import create_stream
from distcl.errors import CheckpointError, ConfigError, DataError, DistclError
from distcl.models import create_model
from tests.files import archive, idx_bytes

NAMES = [
    "pipe:touch {ran}; true",
    "run{1}",
    "run{0..2}",
    "data:v2/s",
    "a[1]*?",
    "x::y",
    "~",
    "s3:b",
]


def make(kind: str, at: Path) -> dict[str, str]:
    """Put data of a source at a path; return the keys that name them."""
    at.mkdir(parents=True)
    rng = np.random.default_rng(0)
    x, y = rng.random((40, 1, 4, 4), dtype=np.float32), np.arange(40) % 2
    if kind == "shards":
        archive(at / "train.tar", 20)
        archive(at / "test.tar", 4)
        index_folder(at)
        return {"source": "shards", "path": str(at)}
    if kind == "npz":
        np.savez(at / "a.npz", x=x, y=y)
        return {"source": "arrays", "path": str(at / "a.npz")}
    if kind == "npy":
        np.save(at / "x.npy", x)
        np.save(at / "y.npy", y)
        return {"source": "arrays", "path": str(at)}
    if kind == "mnist":
        for stem in ("train", "t10k"):
            images = idx_bytes((x[:, 0] * 255).astype(np.uint8))
            (at / f"{stem}-images-idx3-ubyte.gz").write_bytes(gzip.compress(images))
            (at / f"{stem}-labels-idx1-ubyte").write_bytes(idx_bytes(y.astype(np.uint8)))
        return {"source": "mnist", "path": str(at)}
    if kind == "cifar10":
        for name in [*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"]:
            (at / f"{name}.bin").write_bytes(bytes([1, *[7] * 3072, 0, *[9] * 3072]))
        return {"source": "cifar10", "path": str(at)}
    datasets = pytest.importorskip("datasets", reason="the extra 'data' is not installed")
    rows = {"image": x[:, 0].tolist(), "label": y.tolist()}
    if "::" not in str(at):
        datasets.DatasetDict({"train": datasets.Dataset.from_dict(rows)}).save_to_disk(
            at.absolute()
        )
    return {"source": "hf", "path": str(at)}


def read(keys: dict[str, str], access: str = "auto") -> int:
    config = StreamConfig(drift="none", experiences=1, **keys)
    stream = create_stream(config, 0, DataConfig(access=access))
    return len(stream.read(stream.experiences[0].train))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["shards", "npz", "npy", "mnist", "cifar10", "hf"])
def test_a_path_is_a_local_file_whatever_its_name(tmp_path, monkeypatch, kind, name):
    monkeypatch.chdir(tmp_path)
    there = Path(name) if name != "~" else tmp_path / "home"
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    keys = {k: v.replace(str(there), name) for k, v in make(kind, there).items()}
    for access in ("indexed", "stream") if kind == "shards" else ("auto",):
        if kind == "hf" and "::" in name:
            with pytest.raises(DataError, match=r"cannot open '.*x::y': '::' has a meaning"):
                read(keys, access)
        else:
            assert read(keys, access) >= 10
    assert not Path("ran").exists()


def test_names_of_shards_are_never_read_by_a_shell(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("pipe:touch ran; cat a.tar", "$(touch ran).tar", "a;touch ran;.tar", "-x.tar"):
        folder = tmp_path / "s"
        folder.mkdir(exist_ok=True)
        tar = archive(folder / name, 3)
        write_manifest(folder, numbered("cls", [Shard(name, "train", 3, 0, "", 0, 2)]))
        test = Shard(name, "test", 3, 0, "", 0, 2)
        write_manifest(folder, numbered("cls", [*read_shards(folder).shards, test]))
        keys = {"source": "shards", "path": str(folder)}
        assert read(keys, "stream") == 3  # it lies there
        tar.unlink()
        with pytest.raises(DataError, match="is missing from"):
            read(keys, "stream")
        with pytest.raises(DataError, match=r"the name of shard .* is refused in a URL"):
            open_url("pipe:cat '{name}'", name)
    assert not (tmp_path / "ran").exists()


def test_a_url_of_what_lies_here_is_that_file_and_a_command_must_be_asked_for(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for folder in ("pipe:touch ran; cat ", "http:", "x{y}"):
        tar = archive(Path(folder) / "a.tar", 2)
        with open_url(f"{folder}/{{name}}", "a.tar") as file:
            assert file.read() == tar.read_bytes()
    with open_url("~/x{y}/{name}", "a.tar") as file:
        assert file.read() == tar.read_bytes()
    assert not Path("ran").exists()
    with pytest.raises(DataError, match="is missing from 'nowhere'"):
        open_url("nowhere/{name}", "a.tar")
    with pytest.raises(DataError, match="cannot be opened"):
        open_url("unknown:nowhere/{name}", "a.tar")
    with open_url("pipe:touch ran; cat 'x{y}/{name}'", "a.tar") as file:  # as documented
        assert file.read() == tar.read_bytes() and Path("ran").exists()


def test_home_is_found_in_every_key_that_is_a_path(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    keys = [
        *("stream.path", "run.out", "model.pretrained"),
    ]
    config = load_config(None, [f"{key}=~/a b" for key in keys], environ={})
    for key in keys:
        section, name = key.split(".")
        assert getattr(getattr(config, section), name) == f"{tmp_path}/a b"
    assert load_config(None, ["run.out=~nobody-of-this-name/x"], environ={}).run.out[0] == "~"
    (tmp_path / "c.toml").write_text('[parallel]\nstrategy = "zero1"\ndeepspeed_config = "~/d"\n')
    assert load_config("~/c.toml", environ={}).parallel.deepspeed_config == f"{tmp_path}/d"
    with pytest.raises(ConfigError, match=r"stream.path: .*null byte"):
        load_config(None, ['stream.path="a\\u0000b"'], environ={})


def refused(folder: Path) -> dict[str, str]:
    """Return paths that the system does not take, and its reason."""
    loop = folder / "loop"
    loop.symlink_to(loop)
    (folder / "file").write_text("")
    return {
        str(loop): "symbolic links",
        str(folder / ("n" * 300)): "name too long",
        str(folder / ("d/" * 3000)): "name too long",
        str(folder / "file" / "in"): "",
        str(folder / "file"): "",
        str(folder): "",
    }


@pytest.mark.parametrize("source", ["arrays", "mnist", "cifar10", "cifar100", "shards", "hf"])
def test_what_the_system_refuses_is_said_with_the_path(tmp_path, source):
    if source == "hf":
        pytest.importorskip("datasets", reason="the extra 'data' is not installed")
    for path, reason in refused(tmp_path).items():
        with pytest.raises(DistclError) as error:
            create_stream(StreamConfig(source=source, path=path), 0)
        assert error.value.exit_code in (2, 3)
        assert path[:200] in str(error.value) and reason in str(error.value).lower()


def test_weights_that_cannot_be_opened_are_said_with_the_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loop.safetensors").symlink_to(tmp_path / "loop.safetensors")
    (tmp_path / "folder.safetensors").mkdir()
    for name in ("loop", "folder", "n" * 300):
        path = f"{tmp_path}/{name}.safetensors"
        with pytest.raises((ConfigError, CheckpointError)) as error:
            _model(path)
        assert path in str(error.value)
    model = _model("")
    Path("pipe:touch ran").mkdir()
    save_file(model.state_dict(), "pipe:touch ran/{1}.safetensors")
    assert _model("pipe:touch ran/{1}.safetensors") is not None and not Path("ran").exists()


def _model(path: str) -> torch.nn.Module:
    stream = create_stream(StreamConfig(experiences=1), 0)
    options = {"hidden": [4]}
    return create_model(ModelConfig(options=options, pretrained=path), stream.spec, 0)


def test_commands_end_with_a_sentence_and_no_traceback(tmp_path):
    environ = os.environ | {"HOME": str(tmp_path)}
    long = str(tmp_path / ("n" * 300))
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    (tmp_path / "file").write_text("")
    folder = tmp_path / "pipe:touch ran"
    archive(folder / "train.tar", 8)
    archive(folder / "test.tar", 4)
    script = f"""
import sys
from distcl.cli import app
def run(*words):
    sys.argv = ["distcl", *words]
    try:
        app.main()
    except SystemExit as ended:
        print(">", ended.code, flush=True)
for words in (
    ["shard", {long!r}, "--verify"], ["shard", {str(loop)!r}, "x"], ["eval", {long!r}],
    ["shard", {str(tmp_path / "file")!r}, "--index-only"], ["report", {str(loop)!r}],
    ["status", {long!r}], ["checkpoint", "verify", {str(loop)!r}], ["config", {str(loop)!r}],
    ["train", {str(tmp_path / "c.toml")!r}, "--out", {long!r}, "--quiet"],
    ["train", {str(tmp_path / "c.toml")!r}, "--out", {str(tmp_path / "file")!r}, "--quiet"],
    ["train", "~/c.toml", "--out", "~/r", "--resume", {long!r}, "--quiet"],
    ["shard", "pipe:touch ran", "--index-only"], ["shard", "pipe:touch ran", "~/made"],
    ["checkpoint", "export", "~/c.toml", "--to", {long!r}],
    ["train", "~/c.toml", "--out", "", "--quiet"], ["eval", ""], ["shard", "", "--verify"],
    ["report", "made", "--out", "made"],
):
    run(*words)
"""
    (tmp_path / "c.toml").write_text("[run]\nreport = false\n[stream]\nexperiences = 1\n")
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environ, capture_output=True, text=True
    )
    codes = [line[2:] for line in done.stdout.splitlines() if line.startswith("> ")]
    assert len(codes) == 18 and codes[11:13] == ["0", "0"], done.stderr
    assert set(codes[:11] + codes[13:]) <= {"2", "3", "5"}, (codes, done.stderr)
    assert "Traceback" not in done.stderr and "internal error" not in done.stderr
    assert "distcl: 'made' is a folder, not a file" in done.stderr
    assert not (tmp_path / "status.json").exists()
    assert not (tmp_path / "ran").exists() and (tmp_path / "made" / "shards.json").exists()
