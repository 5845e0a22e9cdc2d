"""Input that nobody meant well: whatever the bytes are, the only errors are distcl's own.

Files that are right are cut, flipped and spliced by hypothesis; what reads them must read them, or
say in a DistclError what is wrong. Nothing is executed, nothing outside the folder is touched, and
no size that a header claims is believed before the bytes are there.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import resource
import struct
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from distcl.checkpoint.store import SCHEMA, load, sealed, verify
from distcl.config import Config, StreamConfig
from distcl.config.load import load_config
from distcl.data.shards.index import index_folder, index_path, verify_folder
from distcl.data.shards.inputs import ArraySamples
from distcl.data.shards.manifest import MANIFEST, read_shards
from distcl.data.shards.tar import END, member_bytes, read_members, scan
from distcl.data.shards.writer import write_shards
from distcl.data.sources.arrays import arrays
from distcl.data.sources.npy import open_npy, parse_npy
from distcl.data.sources.vision import open_idx
from distcl.data.stream import create_stream
from distcl.errors import DataError, DistclError
from tests.files import idx_bytes, write_tar

fuzz = settings(
    max_examples=120,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
Edits = list[tuple[str, float, bytes]]
EDITS: st.SearchStrategy[Edits] = st.lists(
    st.tuples(
        st.sampled_from(["put", "put", "insert", "cut", "end"]),
        st.floats(0, 1, exclude_max=True),
        st.one_of(
            st.binary(min_size=1, max_size=12),
            st.sampled_from(
                [b"\0" * 12, b"-0000000512", b"77777777777\0", b"\xff" * 8, b"..", b"/"]
            ),
        ),
    ),
    min_size=1,
    max_size=4,
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=6,
)


def edited(data: bytes, edits: Edits) -> bytes:
    for kind, place, piece in edits:
        at = int(place * len(data))
        if kind == "put":
            data = data[:at] + piece + data[at + len(piece) :]
        elif kind == "insert":
            data = data[:at] + piece + data[at:]
        elif kind == "cut":
            data = data[:at] + data[at + len(piece) :]
        else:
            data = data[:at]
    return data


def replaced(tree: Any, path: list[float], value: Any) -> Any:
    """Put a value somewhere into a tree of dicts and lists; the path chooses where."""
    if not path or not isinstance(tree, dict | list) or not tree:
        return value
    keys = list(tree) if isinstance(tree, dict) else list(range(len(tree)))
    key = keys[int(path[0] * len(keys))]
    changed = dict(tree) if isinstance(tree, dict) else list(tree)
    changed[key] = replaced(tree[key], path[1:], value)
    return changed


PATHS = st.lists(st.floats(0, 1, exclude_max=True), min_size=1, max_size=3)


def tolerated(work: Callable[[], Any]) -> None:
    """Let work succeed, or raise an error of ours that has something to say."""
    try:
        work()
    except DistclError as error:
        assert str(error)


class Bomb:
    """An object whose unpickling leaves a mark."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


@pytest.fixture(autouse=True, scope="module")
def _little_memory() -> Iterator[None]:
    """Inputs of a few kB need little: what asks for more than 4 GiB fails, and so does the test."""
    now = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (4 << 30), now[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, now)


# -- configurations ------------------------------------------------------------------------------


TOML = b"""[run]
seed = 3
[stream]
source = "digits"
drift = ["rotate", "noise"]
[model.options]
hidden = [64, 32]
[training]
epochs = 2
[detector]
name = "adwin"
options = { delta = 0.01 }
"""


@fuzz
@given(edits=EDITS)
def test_any_configuration_file(tmp_path: Path, edits: Edits) -> None:
    path = tmp_path / "c.toml"
    path.write_bytes(edited(TOML, edits))
    tolerated(lambda: load_config(path, environ={}))


@fuzz
@given(
    section=st.sampled_from(list(Config.model_fields)),
    place=st.floats(0, 1, exclude_max=True),
    value=st.one_of(JSON.map(str), JSON.map(json.dumps), st.text(max_size=20)),
)
def test_any_value_of_any_key(section: str, place: float, value: str) -> None:
    keys = list(type(getattr(Config(), section)).model_fields)
    key = keys[int(place * len(keys))]
    tolerated(lambda: load_config(None, overrides=[f"{section}.{key}={value}"], environ={}))
    name = f"DISTCL_{section}__{key}".upper()
    tolerated(lambda: load_config(None, environ={name: value}))


# -- arrays --------------------------------------------------------------------------------------


def _npz(compressed: bool) -> bytes:
    out = io.BytesIO()
    x, y = np.arange(60, dtype=np.float32).reshape(12, 5), np.arange(12) % 3
    (np.savez_compressed if compressed else np.savez)(out, x=x, y=y)
    return out.getvalue()


@fuzz
@given(edits=EDITS, compressed=st.booleans())
def test_any_npz(tmp_path: Path, edits: Edits, compressed: bool) -> None:
    path = tmp_path / "a.npz"
    path.write_bytes(edited(_npz(compressed), edits))
    config = StreamConfig(source="arrays", path=str(path), drift="none", experiences=2)
    tolerated(lambda: create_stream(config, 0).read(np.arange(3)))


@fuzz
@given(edits=EDITS)
def test_any_npy(tmp_path: Path, edits: Edits) -> None:
    out = io.BytesIO()
    np.save(out, np.arange(24.0).reshape(4, 6))
    data = edited(out.getvalue(), edits)
    (tmp_path / "a.npy").write_bytes(data)
    tolerated(lambda: open_npy(tmp_path / "a.npy"))
    tolerated(lambda: parse_npy(data))


@fuzz
@given(edits=EDITS)
def test_any_idx(tmp_path: Path, edits: Edits) -> None:
    path = tmp_path / "images-idx3-ubyte"
    path.write_bytes(edited(idx_bytes(np.zeros((3, 4, 5), np.uint8)), edits))
    tolerated(lambda: open_idx(path, 3))


def test_sizes_that_headers_claim_are_not_allocated(tmp_path: Path) -> None:
    head = b"{'descr': '<f8', 'fortran_order': False, 'shape': (999999999999,), }"
    data = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(head)) + head + bytes(80)
    (tmp_path / "a.npy").write_bytes(data)
    (tmp_path / "big.tar").write_bytes(_header(b"77777777777") + bytes(1024))
    tracemalloc.start()
    for work in (
        lambda: open_npy(tmp_path / "a.npy"),
        lambda: parse_npy(data),
        lambda: list(scan(tmp_path / "big.tar")),
        lambda: read_members(_header(b"77777777777") + bytes(512)),
    ):
        with pytest.raises(DataError):
            work()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


# -- shards --------------------------------------------------------------------------------------


def _header(size: bytes) -> bytes:
    """Return the header of a member whose size field is ``size``, with a checksum that is right."""
    header = bytearray(member_bytes("0001.npy", b"")[:512])
    header[124:136] = size.ljust(12, b"\0")
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    x, y = np.arange(120, dtype=np.float32).reshape(20, 6), np.arange(20) % 2
    np.savez(folder / "a.npz", x=x, y=y)
    write_shards(ArraySamples(folder / "a.npz"), folder / "shards", per_shard=10)
    return folder / "shards"


def _copied(shards: Path, folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    for file in shards.iterdir():
        if file.is_file():
            (folder / file.name).write_bytes(file.read_bytes())
    return folder


def _read_all(folder: Path) -> None:
    config = StreamConfig(
        source="shards", path=str(folder), drift="none", experiences=1, test_fraction=0.2
    )
    stream = create_stream(config, 0)
    stream.read(stream.experiences[0].train)


@pytest.mark.timeout(120)
@fuzz
@given(edits=EDITS)
def test_any_archive(tmp_path: Path, shards: Path, edits: Edits) -> None:
    folder = _copied(shards, tmp_path / "shards")
    tar = sorted(folder.glob("*.tar"))[0]
    tar.write_bytes(edited(tar.read_bytes(), edits))
    tolerated(lambda: verify_folder(folder))
    tolerated(lambda: _read_all(folder))
    tolerated(lambda: index_folder(folder))
    tolerated(lambda: index_folder(folder, skip=True))
    tolerated(lambda: _read_all(folder))


@fuzz
@given(edits=EDITS)
@example(edits=[("put", 0.65625, b"\x01\0\0\0\0\0\0\0\x81")])
def test_any_index(tmp_path: Path, shards: Path, edits: Edits) -> None:
    folder = _copied(shards, tmp_path / "shards")
    path = index_path(sorted(folder.glob("*.tar"))[0])
    path.write_bytes(edited(path.read_bytes(), edits))
    tolerated(lambda: verify_folder(folder))
    tolerated(lambda: _read_all(folder))


@fuzz
@given(
    path=PATHS, value=JSON | st.sampled_from(["..", "../a.tar", "/etc/passwd", "a\0b", 1 << 70, -1])
)
def test_any_manifest_of_shards(
    tmp_path: Path, shards: Path, path: list[float], value: Any
) -> None:
    folder = _copied(shards, tmp_path / "shards")
    changed = replaced(json.loads((folder / MANIFEST).read_text()), path, value)
    (folder / MANIFEST).write_text(json.dumps(changed))
    tolerated(lambda: verify_folder(folder))
    tolerated(lambda: _read_all(folder))


@pytest.mark.parametrize("name", ["..", "../x.tar", "/etc/passwd", "a/../../x.tar", "", ".", "a\0"])
def test_a_manifest_cannot_name_a_file_outside_its_folder(
    name: str, tmp_path: Path, shards: Path
) -> None:
    folder = _copied(shards, tmp_path / "shards")
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["shards"][0]["name"] = name
    (folder / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(DataError, match="damaged"):
        read_shards(folder)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("size", [b"-0000001000", b"0o7", b"1_0", b"\x80" + b"\xff" * 11])
def test_an_archive_with_sizes_that_lead_backwards_is_read_to_an_end(
    size: bytes, tmp_path: Path
) -> None:
    data = _header(size)
    (tmp_path / "a.tar").write_bytes(data + member_bytes("0001.cls", b"1") + END)
    with pytest.raises(DataError):
        list(scan(tmp_path / "a.tar"))
    with pytest.raises(DataError):
        read_members(data + member_bytes("0001.cls", b"1"))


def test_a_member_that_climbs_out_is_a_name_and_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    folder.mkdir()
    out = io.BytesIO()
    np.save(out, np.zeros(3, np.float32))
    keys, data = ("../../climbed", "/abs/climbed"), {"npy": out.getvalue(), "cls": b"0"}
    write_tar(folder / "a.tar", [(f"{key}.{ext}", data[ext]) for key in keys for ext in data])
    before = sorted(p for p in tmp_path.rglob("*"))
    index_folder(folder)
    assert verify_folder(folder)[1] == []
    made = {folder / MANIFEST, index_path(folder / "a.tar")}
    assert set(tmp_path.rglob("*")) == {*before, *made}


# -- checkpoints ---------------------------------------------------------------------------------


def _checkpoint(folder: Path) -> Path:
    import hashlib

    folder.mkdir(exist_ok=True)
    torch.save({"trainer": {"stage": None}}, folder / "shared.pt")
    torch.save({}, folder / "rank-00000.pt")
    save_file({"w": torch.zeros(3)}, folder / "model.safetensors")
    files = {
        name: {
            "bytes": (folder / name).stat().st_size,
            "sha256": hashlib.sha256((folder / name).read_bytes()).hexdigest(),
        }
        for name in ("shared.pt", "model.safetensors", "rank-00000.pt")
    }
    manifest = {"schema": SCHEMA, "step": 4, "world_size": 1, "config": {}, "files": files}
    (folder / "manifest.json").write_text(json.dumps(sealed(manifest)))
    return folder


@fuzz
@given(path=PATHS, value=JSON | st.sampled_from(["..", "../x", "/etc/passwd", "a\0b"]), edits=EDITS)
def test_any_manifest_of_a_checkpoint(
    tmp_path: Path, path: list[float], value: Any, edits: Edits
) -> None:
    folder = _checkpoint(tmp_path / "step-00000004")
    text = (folder / "manifest.json").read_bytes()
    changed = replaced(json.loads(text), path, value)
    if isinstance(changed, dict):  # by someone who knows how it is sealed
        changed = sealed(changed)
    (folder / "manifest.json").write_text(json.dumps(changed))
    tolerated(lambda: verify(folder))
    (folder / "manifest.json").write_bytes(edited(text, edits))
    tolerated(lambda: verify(folder))


@fuzz
@given(edits=EDITS, name=st.sampled_from(["shared.pt", "model.safetensors"]))
def test_any_file_of_a_checkpoint(tmp_path: Path, edits: Edits, name: str) -> None:
    file = _checkpoint(tmp_path / "step-00000004") / name
    file.write_bytes(edited(file.read_bytes(), edits))
    tolerated(lambda: load(file))


def test_deep_nesting_is_damage_not_a_crash(tmp_path: Path) -> None:
    deep = "[" * 100_000
    folder = _checkpoint(tmp_path / "step-00000004")
    (folder / "manifest.json").write_text(deep)
    (tmp_path / MANIFEST).write_text(deep)
    (tmp_path / "c.toml").write_text(f"a = {deep}")
    for work in (
        lambda: verify(folder),
        lambda: read_shards(tmp_path),
        lambda: load_config(tmp_path / "c.toml", environ={}),
    ):
        with pytest.raises(DistclError):
            work()


# -- nothing is unpickled ------------------------------------------------------------------------


def test_no_reader_unpickles(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    bomb = pickle.dumps(Bomb(mark))
    pickle.loads(bomb)
    assert mark.exists(), "the bomb is a dud, so this test would prove nothing"
    mark.unlink()
    out = io.BytesIO()
    np.save(out, np.array([Bomb(mark)], dtype=object), allow_pickle=True)
    folder = tmp_path / "shards"
    folder.mkdir()
    kinds = enumerate((("pkl", bomb), ("npy", out.getvalue()), ("pt", bomb)))
    members = [((f"{k}.{ext}", data), (f"{k}.cls", b"0")) for k, (ext, data) in kinds]
    write_tar(folder / "a.tar", [one for pair in members for one in pair])
    np.savez(tmp_path / "a.npz", x=np.array([Bomb(mark)], dtype=object), y=np.zeros(1, np.int64))
    checkpoint = _checkpoint(tmp_path / "step-00000004")
    torch.save({"a": Bomb(mark)}, checkpoint / "shared.pt")
    (tmp_path / "raw.npy").write_bytes(bomb)
    for work in (
        lambda: index_folder(folder),
        lambda: (index_folder(folder, skip=True), _read_all(folder)),
        lambda: arrays(StreamConfig(source="arrays", path=str(tmp_path / "a.npz"))),
        lambda: open_npy(tmp_path / "raw.npy"),
        lambda: load(checkpoint / "shared.pt"),
    ):
        with pytest.raises(DistclError):
            work()
    assert not mark.exists()


def test_sources_over_hostile_folders_are_closed(tmp_path: Path, shards: Path) -> None:
    """A reader that gave up has no file open: a stream that is retried would run out of them."""
    folder = _copied(shards, tmp_path / "shards")
    tar = sorted(folder.glob("*.tar"))[0]
    tar.write_bytes(b"x" * tar.stat().st_size)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(30):
        tolerated(lambda: _read_all(folder))
        tolerated(lambda: verify_folder(folder))
    assert len(os.listdir("/proc/self/fd")) <= before + 2
