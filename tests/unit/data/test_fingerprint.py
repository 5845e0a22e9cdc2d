"""The same data as before, or which of them are not: permuted, relabelled, remade, fewer, more."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distcl.config import DataConfig, StreamConfig
from distcl.data.fingerprint import changes, check_ids, data_fingerprint
from distcl.data.shards.index import index_folder
from distcl.data.sources.arrays import ArraySource
from distcl.data.stream import DriftStream, create_stream
from distcl.errors import DataError
from distcl.types import Batch, Ids, pack_ids
from tests.files import shard_folder

RNG = np.random.default_rng(0)
X = RNG.random((600, 1, 6, 6), dtype=np.float32)
Y = np.arange(600) % 5


def of(x: Any = X, y: Any = Y, held: int = 100, **keys: Any) -> DriftStream:
    config = StreamConfig(**{"drift": "rotate", "experiences": 3, **keys})
    train, test = ArraySource(x[held:], y[held:]), ArraySource(x[:held], y[:held])
    return DriftStream(train, test, config, 0)


def told(before: DriftStream, now: DriftStream) -> str:
    return "; ".join(changes(data_fingerprint(before), data_fingerprint(now)))


def test_the_same_data_have_the_same_fingerprint() -> None:
    assert told(of(), of(X.copy())) == ""
    assert data_fingerprint(of()) == data_fingerprint(of())


def changed(**some: Any) -> Any:
    return lambda: of(**some)


def _one_label() -> np.ndarray[Any, Any]:
    y = Y.copy()
    y[321] = 4 - y[321]
    return y


ORDER = np.r_[:100, 100 + np.random.default_rng(1).permutation(500)]
CHANGES = {
    "fewer rows": (changed(x=X[:590], y=Y[:590]), "training samples: 500 -> 490"),
    "more rows": (changed(x=np.r_[X, X], y=np.r_[Y, Y]), "training samples: 500 -> 1100"),
    "a class fewer": (changed(y=np.minimum(Y, 3)), "classes: 5 -> 4"),
    "one label": (changed(y=_one_label()), "labels of training samples"),
    "rows permuted": (changed(x=X[ORDER], y=Y[ORDER]), "training samples of experience 3"),
    "held-out rows": (changed(x=np.r_[X[99::-1], X[100:]]), "test samples of experience 1"),
    "values": (changed(x=X * 2), "training samples of experience 1"),
    "type": (changed(x=X.astype(np.float64)), "types: ['torch.float32', 'torch.int64'] ->"),
    "shape": (changed(x=X.reshape(600, 1, 4, 9)), "shapes: [[1, 6, 6], []] -> [[1, 4, 9], []]"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_changed_is_told(change: str) -> None:
    make, words = CHANGES[change]
    assert words in told(of(), make())


class Random(ArraySource):
    """Reads a sample in another way each time."""

    def read(self, ids: Ids) -> Batch:
        batch = super().read(ids)
        return Batch(batch.ids, batch.x * (1 + random.random()), batch.y, len(batch))


def test_what_is_random_does_not_enter() -> None:
    def stream() -> DriftStream:
        config = StreamConfig(drift="none", experiences=1)
        return DriftStream(Random(X, Y), ArraySource(X, Y), config, 0)

    assert told(stream(), stream()) == ""


def test_few_samples_are_read() -> None:
    stream, read = of(experiences=40), []
    whole = stream.read
    stream.read = lambda ids: read.extend(ids.tolist()) or whole(ids)  # type: ignore[method-assign]
    data_fingerprint(stream)
    assert len(set(read)) <= 256
    experiences = {ids >> 40 & 0x3FFF for ids in read}
    assert experiences == set(range(40))


def test_ids_that_are_gone_are_named() -> None:
    check_ids(of(), of().experiences[2].train, "history")
    gone = pack_ids(2, np.array([3, 499]))
    check_ids(of(), gone, "history")
    with pytest.raises(DataError, match=rf"history: sample {gone[1]} is not in the stream"):
        check_ids(of(x=X[:590], y=Y[:590]), gone, "history")


def _shards(folder: Path, access: str, live: float = 0) -> DriftStream:
    options = {"live_seconds": live} if live else {}
    config = StreamConfig(
        source="shards", path=str(folder), drift="none", experiences=1, options=options
    )
    return create_stream(config, 0, DataConfig(access=access))


def _remade(folder: Path, sizes: list[int], bad: tuple[int, ...] = ()) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    shard_folder(folder, sizes, bad)
    shutil.copyfile(folder / "s0.tar", folder / "test-0.tar")
    index_folder(folder)
    return folder


@pytest.mark.parametrize("access", ["indexed", "stream"])
def test_shards_are_known_by_what_their_list_says(access: str, tmp_path: Path) -> None:
    folder = _remade(tmp_path / "sh", [4, 5, 3])
    before = data_fingerprint(_shards(folder, access))
    assert list(changes(before, data_fingerprint(_shards(folder, access)))) == []
    data = bytearray((folder / "s1.tar").read_bytes())
    at = data.index(b"\x93NUMPY", 512)
    data[at + 130] ^= 1  # a value of a sample
    (folder / "s1.tar").write_bytes(data)
    index_folder(folder)
    told = list(changes(before, data_fingerprint(_shards(folder, access))))
    assert "training shards ('s1.tar' first)" in told
    told = list(changes(before, data_fingerprint(_shards(_remade(folder, [4, 5, 2]), access))))
    assert "training samples: 12 -> 11" in told
    assert "training shards ('s2.tar' first)" in told


@pytest.mark.parametrize("access", ["indexed", "stream"])
def test_a_folder_that_only_got_more_is_the_same(access: str, tmp_path: Path) -> None:
    folder = _remade(tmp_path / "sh", [4, 5])
    before = data_fingerprint(_shards(folder, access, live=1))
    more = _shards(_remade(folder, [4, 5, 3]), access, live=1)
    assert list(changes(before, data_fingerprint(more, before))) == []
    assert "training samples: 9 -> 12" in changes(before, data_fingerprint(more))
    other = _shards(_remade(folder, [4, 6, 3]), access, live=1)
    told = list(changes(before, data_fingerprint(other, before)))
    assert "training shards ('s1.tar' first)" in told
