"""Files by an enemy: whatever they hold, only errors of our own, nothing run, nothing outside.

Bytes come from hypothesis: at random, or a sound file with places changed, cut or repeated. Memory
is bounded: what Python and numpy allocate while reading stays below a few times the file's size.
"""

from __future__ import annotations

import io
import json
import pickle
import tarfile
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from distcl.checkpoint import MANIFEST, MODEL, SHARED, load, rank_file, verify
from distcl.config_load import load_config
from distcl.data.index import Shard, index_folder, open_index, read_manifest
from distcl.data.npy import npz_keys, open_npy, open_npz, parse_npy
from distcl.data.tars import END, member_bytes, read_members
from distcl.errors import CheckpointError, ConfigError, DataError, DistclError

SLACK = 8 << 20
"""Bytes that reading may take whatever the size of the file."""

bounded = settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def _changed(sound: bytes) -> st.SearchStrategy[bytes]:
    """Return files: any bytes, or the sound one with places changed, cut out or repeated."""

    def change(edits: list[tuple[int, int, bytes]]) -> bytes:
        data = sound
        for at, length, new in edits:
            at %= len(data) + 1
            data = data[:at] + new + data[at + length :]
        return data

    edit = st.tuples(st.integers(0, len(sound)), st.integers(0, 64), st.binary(max_size=24))
    return st.one_of(st.binary(max_size=256), st.lists(edit, min_size=1, max_size=4).map(change))


def _guarded(read: Callable[[], Any], size: int, error: type[DistclError]) -> None:
    """Read; nothing but the error may come of it, and memory stays bounded."""
    tracemalloc.start()
    try:
        read()
    except error as caught:
        assert str(caught)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < SLACK + 16 * size


class Evil:
    """Whoever unpickles one makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


# ---------------------------------------------------------------- configuration

CONFIG = b"""[run]
seed = 3
[training]
batch_size = 64
[model.options]
hidden = [16, 8]
[stream.options]
max_angle = 1e1
"""


@bounded
@given(_changed(CONFIG))
def test_the_configuration(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "job.toml"
    path.write_bytes(data)
    _guarded(lambda: load_config(path, environ={}), len(data), ConfigError)


@bounded
@given(
    st.sampled_from(["run.seed", "model.options.x", "stream", "a.b.c.d", ".", "run..seed"]),
    st.text(max_size=60),
)
def test_keys_of_the_command_line_and_the_environment(key: str, value: str) -> None:
    _guarded(lambda: load_config(None, [f"{key}={value}"], {}), len(value), ConfigError)
    name = "DISTCL_" + key.upper().replace(".", "__")
    _guarded(lambda: load_config(None, [], {name: value}), len(value), ConfigError)


@pytest.mark.parametrize("text", ["x = " + "[" * 100_000, "x" + ".x" * 5_000 + " = 1"])
def test_a_configuration_that_is_nested_without_end(text: str, tmp_path: Path) -> None:
    path = tmp_path / "job.toml"
    path.write_text(text)
    with pytest.raises(ConfigError):
        load_config(path, environ={})


# ---------------------------------------------------------------- arrays


def _npy(array: Any, pickled: bool = False) -> bytes:
    out = io.BytesIO()
    np.save(out, array, allow_pickle=pickled)
    return out.getvalue()


def _npz(compressed: bool) -> bytes:
    out = io.BytesIO()
    save = np.savez_compressed if compressed else np.savez
    save(out, x=np.arange(24, dtype=np.float32).reshape(6, 4), y=np.arange(6))
    return out.getvalue()


@bounded
@given(_changed(_npy(np.arange(40, dtype=np.int16).reshape(8, 5))))
def test_an_npy_file(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "a.npy"
    path.write_bytes(data)
    _guarded(lambda: open_npy(path).sum(dtype=np.float64), len(data), DataError)
    _guarded(lambda: parse_npy(data).sum(dtype=np.float64), len(data), DataError)


@bounded
@given(st.one_of(_changed(_npz(False)), _changed(_npz(True))))
def test_an_npz_file(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "a.npz"
    path.write_bytes(data)
    _guarded(lambda: open_npz(path, ("x",), ("y",)), len(data), DataError)
    _guarded(lambda: npz_keys(path), len(data), DataError)


def test_an_npz_file_that_unpacks_without_end_takes_what_its_header_says(tmp_path: Path) -> None:
    path = tmp_path / "bomb.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.npy", _npy(np.zeros(8, np.float32)) + bytes(200 << 20))
    _guarded(lambda: open_npz(path, ("x",), ()), path.stat().st_size, DataError)


def test_a_header_that_promises_terabytes_is_not_believed(tmp_path: Path) -> None:
    sound = _npy(np.zeros((1, 4), np.float64))
    data = sound.replace(b"(1, 4), }" + b" " * 12, b"(1000000000000, 4), }")
    assert len(data) == len(sound)
    (tmp_path / "a.npy").write_bytes(data)
    (tmp_path / "a.npz").write_bytes(b"")
    with zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.npy", data)
    for read in (
        lambda: open_npy(tmp_path / "a.npy"),
        lambda: parse_npy(data),
        lambda: open_npz(tmp_path / "a.npz", ("x",), ()),
    ):
        with pytest.raises(DataError, match="truncated"):
            read()
        _guarded(read, len(data), DataError)


# ---------------------------------------------------------------- archives


def _tar() -> bytes:
    members = [("a.x.npy", _npy(np.arange(4.0))), ("a.cls", b"3")]
    members += [("b.x.npy", _npy(np.arange(4.0))), ("b.cls", b"1")]
    return b"".join(member_bytes(name, data) for name, data in members) + END


@bounded
@given(_changed(_tar()))
def test_an_archive_and_the_making_of_its_index(tmp_path: Path, data: bytes) -> None:
    for old in tmp_path.iterdir():
        old.unlink()
    (tmp_path / "a.tar").write_bytes(data)
    _guarded(lambda: index_folder(tmp_path), len(data), DataError)
    _guarded(lambda: index_folder(tmp_path, skip=True), len(data), DataError)
    _guarded(lambda: read_members(data), len(data), DataError)
    assert {p.name for p in tmp_path.iterdir()} <= {"a.tar", "a.index.npy", "shards.json"}


@pytest.mark.parametrize("name", ["../out.cls", "/tmp/out.cls", "a/../../out.cls"])
def test_names_in_an_archive_are_no_paths(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    folder.mkdir()
    link = tarfile.TarInfo("a.cls")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    with (folder / "a.tar").open("wb") as file:
        file.write(link.tobuf() + member_bytes(name, b"1") + END)
    _guarded(lambda: index_folder(folder), 4096, DataError)
    assert [p.name for p in tmp_path.iterdir()] == ["shards"]


INDEX = _npy(np.array([[0, 2048, 4096], [3 << 32, 1 << 32, 5120]], dtype="<i8"))


@bounded
@given(_changed(INDEX))
def test_an_index(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a.tar").write_bytes(bytes(5120))
    (tmp_path / "a.index.npy").write_bytes(data)
    _guarded(lambda: open_index(tmp_path / "a.tar", 2, 5120), len(data), DataError)


@bounded
@given(st.lists(st.integers(-(1 << 62), 1 << 62), min_size=3, max_size=3))
def test_places_in_an_index_are_checked(tmp_path: Path, places: list[int]) -> None:
    from distcl.config import DataConfig
    from distcl.data.shards import ShardSource

    tar = _tar()
    (tmp_path / "a.tar").write_bytes(tar)
    words = [3 << 32, 1 << 32, len(tar)]
    (tmp_path / "a.index.npy").write_bytes(_npy(np.array([places, words], dtype="<i8")))
    shard = Shard("a.tar", "train", 2, len(tar), "", 0)

    def read() -> None:
        ShardSource(tmp_path, [shard], DataConfig()).read(np.array([0, 1]))

    _guarded(read, len(tar), DataError)


# ---------------------------------------------------------------- manifests

json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=8,
)
SHARD = {"name": "a.tar", "split": "train", "samples": 2, "bytes": 9, "sha256": "", "first_id": 0}


def _altered(sound: dict[str, Any]) -> st.SearchStrategy[bytes]:
    """Return JSON of a sound table with some values replaced."""
    swaps = st.dictionaries(st.sampled_from([*sound, "other"]), json_values, max_size=3)
    return swaps.map(lambda swap: json.dumps(sound | swap).encode())


@bounded
@given(
    st.one_of(
        _changed(json.dumps({"label": "cls", "shards": [SHARD]}, indent=1).encode()),
        _altered({"label": "cls", "shards": [SHARD]}),
        _altered(SHARD).map(lambda line: b'{"label": "cls", "shards": [' + line + b"]}"),
    )
)
def test_the_list_of_shards(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "shards.json").write_bytes(data)
    _guarded(lambda: read_manifest(tmp_path), len(data), DataError)


@pytest.mark.parametrize("name", ["../a.tar", "/etc/passwd", "", ".", "..", "a\0b"])
def test_a_shard_outside_the_folder_is_refused(name: str, tmp_path: Path) -> None:
    text = json.dumps({"label": "cls", "shards": [SHARD | {"name": name}]})
    (tmp_path / "shards.json").write_text(text)
    with pytest.raises(DataError):
        read_manifest(tmp_path)


def test_lists_that_are_nested_without_end(tmp_path: Path) -> None:
    nested = "[" * 100_000
    (tmp_path / "shards.json").write_text(nested)
    (tmp_path / MANIFEST).write_text(nested)
    with pytest.raises(DataError):
        read_manifest(tmp_path)
    with pytest.raises(CheckpointError):
        verify(tmp_path)


FILE = {"bytes": 3, "sha256": "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"}
CHECKPOINT = {
    "schema": 1,
    "step": 7,
    "world_size": 1,
    "round": 1,
    "score": 0.5,
    "config": {},
    "files": {MODEL: FILE, SHARED: FILE, rank_file(0): FILE},
}


def _checkpoint(folder: Path, manifest: bytes) -> Path:
    for name in (MODEL, SHARED, rank_file(0)):
        (folder / name).write_bytes(b"abc")
    (folder / MANIFEST).write_bytes(manifest)
    return folder


def test_the_sound_manifest_is_sound(tmp_path: Path) -> None:
    verify(_checkpoint(tmp_path, json.dumps(CHECKPOINT).encode()))


@bounded
@given(
    st.one_of(
        _changed(json.dumps(CHECKPOINT).encode()),
        _altered(CHECKPOINT),
        _altered(dict(CHECKPOINT["files"])).map(
            lambda files: json.dumps(CHECKPOINT | {"files": json.loads(files)}).encode()
        ),
    )
)
def test_the_manifest_of_a_checkpoint(tmp_path: Path, data: bytes) -> None:
    _guarded(lambda: verify(_checkpoint(tmp_path, data)), len(data), CheckpointError)


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "", ".", "..", "a\0b", "link"])
def test_a_checkpoint_names_no_file_outside_itself(name: str, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("/etc/passwd")
    manifest = CHECKPOINT | {"files": {**dict(CHECKPOINT["files"]), name: FILE}}
    with pytest.raises(CheckpointError):
        verify(_checkpoint(tmp_path, json.dumps(manifest).encode()))


# ---------------------------------------------------------------- pickles


def test_no_reader_runs_what_a_pickle_says(tmp_path: Path) -> None:
    done = tmp_path / "done"
    evil = np.array([Evil(done)], dtype=object)
    (tmp_path / "a.npy").write_bytes(_npy(evil, pickled=True))
    np.savez(tmp_path / "a.npz", x=evil)
    (tmp_path / "raw.pkl").write_bytes(pickle.dumps(Evil(done)))
    torch.save({"x": Evil(done)}, tmp_path / "a.pt")
    shards = tmp_path / "shards"
    shards.mkdir()
    members = [("a.x.pkl", pickle.dumps(Evil(done))), ("b.x.pt", b""), ("c.cls", b"1")]
    members.append(("d.x.npy", _npy(evil, pickled=True)))
    (shards / "a.tar").write_bytes(b"".join(member_bytes(*m) for m in members) + END)
    readers: list[Callable[[], Any]] = [
        lambda: open_npy(tmp_path / "a.npy"),
        lambda: open_npy(tmp_path / "raw.pkl"),
        lambda: open_npz(tmp_path / "a.npz", ("x",), ()),
        lambda: parse_npy((tmp_path / "a.npy").read_bytes()),
        lambda: load(tmp_path / "a.pt"),
        lambda: load(tmp_path / "raw.pkl"),
        lambda: index_folder(shards),
        lambda: read_members((shards / "a.tar").read_bytes()[:1024]),
    ]
    for read in readers:
        with pytest.raises(DistclError):
            read()
    assert not done.exists()


@bounded
@given(st.data())
def test_a_damaged_checkpoint_file(tmp_path: Path, data: st.DataObject) -> None:
    out = io.BytesIO()
    torch.save({"w": torch.arange(6.0), "n": [1, "two"]}, out)
    changed = data.draw(_changed(out.getvalue()))
    for name in ("a.pt", MODEL):
        path = tmp_path / name
        path.write_bytes(changed)
        _guarded(lambda path=path: load(path), len(changed), CheckpointError)
