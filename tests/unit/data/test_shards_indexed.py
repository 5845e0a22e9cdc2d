"""Shards as a source: random reads, decoding, transforms, experiences, and every kind of fault."""

import io
import os
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from distcl.config import DataConfig, StreamConfig
from distcl.data.loader import BatchLoader
from distcl.data.shards.decode import decode, npy_bytes
from distcl.data.shards.index import index_folder, verify_folder
from distcl.data.shards.indexed import ShardSource
from distcl.data.shards.manifest import read_shards, write_manifest
from distcl.data.stream import DriftStream, create_stream
from distcl.errors import ConfigError, DataError
from distcl.sampling.sampler import DistributedWeightedSampler
from tests.files import row_value as value
from tests.files import shard_folder, write_tar


def write(tar: Path, samples: list[dict[str, bytes]]) -> None:
    rows = enumerate(samples)
    write_tar(tar, [(f"{i:04d}.{ext}", data) for i, row in rows for ext, data in row.items()])


def source(folder: Path, **data: object) -> ShardSource:
    manifest = read_shards(folder)
    return ShardSource(folder, manifest.split("train"), DataConfig(**data))


def test_samples_are_read_by_id_in_the_order_asked(tmp_path):
    train = source(shard_folder(tmp_path, [3, 1, 5]))
    ids = np.array([8, 0, 8, 3, 2, 4, 0])
    batch = train.read(ids)
    np.testing.assert_array_equal(batch.x, np.stack([value(r) for r in ids]))
    assert batch.y.tolist() == [r % 3 for r in ids] and batch.ids.tolist() == ids.tolist()
    np.testing.assert_array_equal(train.info.known_labels(), np.arange(9) % 3)
    assert train.read(ids[:0]).x.shape == (0, 3) and len(train.read(ids[:0]).y) == 0
    for wrong in (9, -1):
        with pytest.raises(DataError, match=f"no sample {wrong} "):
            train.read(np.array([1, wrong]))


def test_more_shards_than_files_may_be_open(tmp_path):
    train = source(shard_folder(tmp_path, [1] * 80))
    ids = np.random.default_rng(0).integers(0, 80, 300)
    open_before = len(os.listdir("/proc/self/fd"))
    np.testing.assert_array_equal(train.read(ids).x[:, 0], ids)
    assert len(os.listdir("/proc/self/fd")) <= open_before + 64


def test_worker_processes_read_what_the_main_process_reads(tmp_path):
    train = source(shard_folder(tmp_path, [20, 30, 14]))
    train.read(np.arange(5))  # files are open as the workers start
    sampler = DistributedWeightedSampler(16, seed=3)
    sampler.set_weights(64, np.arange(64) + 1.0)
    seen = list(BatchLoader(train, sampler, workers=2))
    assert [b.ids.tolist() for b in seen] == [sampler.global_batch(i).tolist() for i in range(4)]
    for batch in seen:
        np.testing.assert_array_equal(batch.x[:, 0], batch.ids)


# ---------------------------------------------------------------- decoding


def picture(mode: str, ext: str) -> bytes:
    out = io.BytesIO()
    kind = {"jpg": "jpeg"}.get(ext, ext)
    Image.new(mode, (6, 4), 7).save(out, kind, **({"lossless": True} if ext == "webp" else {}))
    return out.getvalue()


@pytest.mark.parametrize("ext", ["png", "jpg", "webp"])
@pytest.mark.parametrize(("mode", "channels"), [("L", 1), ("RGB", 3)])
def test_images_become_channels_height_width(ext, mode, channels):
    found = decode(ext, picture(mode, ext))
    assert found.dtype == np.uint8
    assert found.shape == (3 if ext == "webp" else channels, 4, 6)  # webp has no grey


def test_text_json_and_unknown_members():
    assert decode("txt", "é".encode()) == "é"
    assert decode("meta.json", b'{"a": [1]}') == {"a": [1]}
    assert decode("mp4", b"\x00") == b"\x00"
    for ext, data in (("json", b"{"), ("txt", b"\xff"), ("png", b"\x89PNG"), ("npy", b"\x93NUM")):
        with pytest.raises(DataError, match=f"member '{ext}' cannot be decoded"):
            decode(ext, data)


def test_a_sample_of_more_arrays_than_others_is_named_in_any_batch_and_nan_by_verify(tmp_path):
    two = {"npy": npy_bytes(value(1)), "b.npy": npy_bytes(value(1)), "cls": b"1"}
    write(tmp_path / "a.tar", [{"npy": npy_bytes(value(0)), "cls": b"0"}, two])
    index_folder(tmp_path)
    for ids in ([0, 1], [1]):
        train = source(tmp_path)
        train.read(np.array([0]))
        with pytest.raises(DataError, match="sample 1 has 2 arrays, but sample 0 1 array"):
            train.read(np.array(ids))
    write(tmp_path / "a.tar", [{"npy": npy_bytes(value(0) * np.float32("nan")), "cls": b"0"}])
    index_folder(tmp_path)
    assert (
        "sample '0000', id 0: member 'npy' has a value that is NaN"
        in (verify_folder(tmp_path)[1][0])
    )


def tokenize(sample: dict[str, object], length: int = 4) -> dict[str, object]:
    text = str(sample.pop("txt")).encode()
    return sample | {"tokens": np.frombuffer(text[:length].ljust(length), np.uint8).astype(int)}


def fails(sample: dict[str, object]) -> dict[str, object]:
    raise KeyError("caption")


def test_transforms_of_ones_own_see_the_decoded_sample(tmp_path):
    write(tmp_path / "a.tar", [{"txt": b"hello", "cls": b"1"}, {"txt": b"x", "cls": b"0"}])
    index_folder(tmp_path)
    with pytest.raises(DataError, match="nothing to feed a model"):
        source(tmp_path).read(np.array([0]))
    spec = {"name": f"{__name__}:tokenize", "length": 5}
    batch = source(tmp_path, transforms=[spec]).read(np.array([1, 0]))
    assert batch.x.tolist() == [list(b"x    "), list(b"hello")] and batch.y.tolist() == [0, 1]
    with pytest.raises(DataError, match=r"'a.tar', sample '0000', id 0: transform .*caption"):
        source(tmp_path, transforms=[f"{__name__}:fails"]).read(np.array([0]))


@pytest.mark.parametrize(
    ("transforms", "message"),
    [
        (["crap"], "unknown transform 'crap', did you mean 'crop'"),
        ([{"size": 3}], "has no name"),
        ([{"name": "crop", "side": 3}], "no option 'side'"),
        ([{"name": "normalize", "mean": [0.1], "std": [0.0]}], "std > 0"),
    ],
)
def test_a_wrong_transform_is_named(tmp_path, transforms, message):
    shard_folder(tmp_path, [2])
    with pytest.raises((ConfigError, ValueError), match=re.escape(message)):
        source(tmp_path, transforms=transforms)


# ---------------------------------------------------------------- experiences


def stream(folder: Path, how: str, n: int, **keys: object) -> DriftStream:
    config = StreamConfig(
        source="shards",
        path=str(folder),
        drift="none",
        experiences=n,
        options={"experiences": how},
        **keys,
    )
    return create_stream(config, 0, DataConfig())


def rows(made: DriftStream, e: int) -> set[int]:
    experience = made.experiences[e]
    ids = np.concatenate([experience.train, experience.test])
    return {int(v) for v in made.read(ids).x[:, 0]}


def test_experiences_by_ranges_of_shards_by_key_and_by_time(tmp_path):
    folder = shard_folder(tmp_path, [6] * 4, facts=True)
    by_shards = stream(folder, "shards", 2)
    assert [rows(by_shards, e) for e in range(2)] == [set(range(12)), set(range(12, 24))]
    by_key = stream(folder, "key:site", 2)
    assert [rows(by_key, e) for e in range(2)] == [set(range(0, 24, 2)), set(range(1, 24, 2))]
    by_time = stream(folder, "time:time", 3)
    assert [rows(by_time, e) for e in range(3)] == [set(range(k, k + 8)) for k in (0, 8, 16)]
    recurring = stream(folder, "shards", 4, recurring=2)
    assert rows(recurring, 3) == set(range(12, 24))


@pytest.mark.parametrize(
    ("how", "n", "error", "message"),
    [
        ("shards", 5, ConfigError, "4 shards, too few for 5"),
        ("key:site", 3, ConfigError, "finds 2 values (0, 1), but the stream has 3"),
        ("key:where", 2, DataError, "sample '0000', id 0: its json has no usable 'where'"),
        ("time:site", 4, ConfigError, "too few different times"),
        ("weekday", 2, ConfigError, "is none of shards, key:FIELD, time:FIELD"),
    ],
)
def test_experiences_that_the_data_do_not_have_are_refused(tmp_path, how, n, error, message):
    with pytest.raises(error, match=re.escape(message)):
        stream(shard_folder(tmp_path, [6] * 4, facts=True), how, n)


# ---------------------------------------------------------------- faults


def edit(path: Path, at: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(data)


def cut(path: Path, size: int) -> None:
    with path.open("r+b") as file:
        file.truncate(size)


def other_samples(folder: Path, samples: int) -> None:
    manifest = read_shards(folder)
    shards_ = [replace(s, samples=samples, first_id=0) for s in manifest.shards[:1]]
    write_manifest(folder, replace(manifest, shards=shards_))


PLACE = 2 * 512 * 2  # bytes of one sample of shard_folder


@pytest.mark.parametrize(
    ("damage", "verify", "message"),
    [
        (
            lambda f: cut(f / "s1.tar", 4000),
            False,
            "'s1.tar' has 4000 bytes but shards.json says",
        ),
        (lambda f: (f / "s1.tar").unlink(), False, "shard 's1.tar' is missing"),
        (lambda f: (f / "s1.index.npy").unlink(), False, "'s1.tar' has no index; make it with"),
        (lambda f: (f / "shards.json").unlink(), False, "has no shards.json; make it with"),
        (lambda f: edit(f / "shards.json", 30, b"]"), False, "shards.json' is damaged"),
        (lambda f: other_samples(f, 3), False, "'s0.tar': its index is of another number"),
        (lambda f: other_samples(f, 0), False, "there are no samples|empty|another number"),
        (
            lambda f: edit(f / "s0.tar", 3 * PLACE + 700, b"?"),
            True,
            "sample '0003', id 3: its bytes",
        ),
        (lambda f: edit(f / "s1.tar", 512, b"?"), False, "sample '0004', id 4: its bytes"),
        (lambda f: edit(f / "s1.tar", 124, b"9"), False, "sample '0004', id 4: its bytes"),
        (lambda f: edit(f / "s1.tar", 0, b"9"), False, "sample '9004', id 4: its bytes"),
    ],
)
def test_damage_after_indexing_names_shard_and_id(tmp_path, damage, verify, message):
    folder = shard_folder(tmp_path, [4, 4])
    damage(folder)
    with pytest.raises(DataError, match=message):
        source(folder, verify=verify).read(np.arange(8))


def good(i: int) -> dict[str, bytes]:
    return {"npy": npy_bytes(value(i)), "cls": b"1"}


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"npy": npy_bytes(value(2))}, "sample '0002', id 2: it has no label: there is no member"),
        ({"npy": npy_bytes(value(2)), "cls": b"two"}, "sample '0002', id 2: it has no label"),
        ({"npy": npy_bytes(value(2)), "cls": b"-3"}, "id 2: its label, -3, is not"),
        ({"pyd": b"\x80\x04.", "cls": b"1"}, "member '0002.pyd': a member '.pyd' is a pickle"),
        (
            {"x.pickle": b"\x80\x04.", "cls": b"1"},
            "'0002.x.pickle': a member '.x.pickle' is a pick",
        ),
    ],
)
def test_bad_samples_are_found_by_indexing_and_can_be_skipped(tmp_path, bad, message):
    write(tmp_path / "a.tar", [good(0), good(1), bad, good(3)])
    with pytest.raises(DataError, match=re.escape(message)):
        index_folder(tmp_path)
    assert not (tmp_path / "shards.json").exists()
    _, problems = index_folder(tmp_path, skip=True)
    assert len(problems) == 1 and message in problems[0]
    with pytest.raises(
        DataError, match=r"sample '0002', id 2: it (has no label, or )?is marked as bad"
    ):
        source(tmp_path)
    train = source(tmp_path, on_bad_sample="skip")
    assert train.usable.tolist() == [True, True, False, True] and len(train.problems) == 1
    made = DriftStream(train, train, StreamConfig(drift="none", experiences=1), 0)
    assert made.info.unusable == 2 and sorted(made.experiences[0].train) == [0, 1, 3]


def twice(folder: Path) -> None:
    names = ("0.npy", "0.cls", "1.npy", "1.cls", "0.npy", "0.cls")
    data = {"npy": npy_bytes(value(0)), "cls": b"1"}
    write_tar(folder / "a.tar", [(name, data[name[2:]]) for name in names])


@pytest.mark.parametrize(
    ("damage", "message", "left"),
    [
        (twice, "id 2: member '0.npy': another sample has the key '0' too", 2),
        (
            lambda f: cut(f / "a.tar", 5 * 2048 - 700),
            "'a.tar', in or after sample '0004': it is truncated",
            3,
        ),
        (
            lambda f: cut(f / "a.tar", 4 * 2048),
            "'a.tar', in or after sample '0003': it is truncated",
            3,
        ),
        (
            lambda f: edit(f / "a.tar", 2 * 2048, b"\xff" * 600),
            "after sample '0001': the header at byte 4096 is damaged",
            1,
        ),
        (lambda f: (f / "a.tar").write_bytes(b"no tar at all" * 99), "no uncompressed tar", None),
        (lambda f: (f / "a.tar").write_bytes(bytes(1024)), "is empty", None),
        (lambda f: (f / "a.tar").write_bytes(b""), "'a.tar'", None),
    ],
)
def test_archives_that_are_not_sound_are_not_indexed(tmp_path, damage, message, left):
    write(tmp_path / "a.tar", [good(i) for i in range(6)])
    write(tmp_path / "b.tar", [good(i) for i in range(3)])
    damage(tmp_path)
    with pytest.raises(DataError, match=message):
        index_folder(tmp_path)
    manifest, problems = index_folder(tmp_path, skip=True)
    assert len(problems) == 1
    assert sum(s.samples for s in manifest.shards) >= (left or 0) + 3


def test_object_arrays_are_refused_by_name_and_never_unpickled(tmp_path):
    out = io.BytesIO()
    np.save(out, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    write(tmp_path / "a.tar", [{"npy": out.getvalue(), "cls": b"0"}])
    index_folder(tmp_path)
    with pytest.raises(DataError, match=r"id 0: member 'npy'.*object dtype.*unpickled"):
        source(tmp_path).read(np.array([0]))


def test_an_undecodable_sample_is_replaced_and_remembered_also_by_workers(tmp_path):
    samples = [good(i) for i in range(12)]
    samples[5]["npy"] = b"not an array"
    samples[7]["npy"] = npy_bytes(np.array([np.nan, 0, 0], np.float32))
    write(tmp_path / "a.tar", samples)
    index_folder(tmp_path)
    faults = verify_folder(tmp_path)[1]
    assert "'a.tar', sample '0005', id 5: member 'npy' cannot" in faults[0]
    assert len(faults) == 2 and "id 7: member 'npy' has a value that is NaN" in faults[1]
    with pytest.raises(DataError, match="id 7: member 'npy' has a value that is NaN"):
        source(tmp_path).read(np.array([7]))
    train = source(tmp_path, on_bad_sample="skip")
    batch = train.read(np.array([7, 5, 1]))
    assert batch.ids.tolist() == [8, 6, 1] and batch.x[:, 0].tolist() == [8, 6, 1]
    for workers in (0, 2):
        made = DriftStream(train, train, StreamConfig(drift="none", experiences=2), 0)
        sampler = DistributedWeightedSampler(4, seed=0)
        sampler.set_weights(made.experiences[1].train)
        list(BatchLoader(made, sampler, workers=workers))
        assert {i & 0xFF for i in made.info.replaced} == {5, 7}


def test_a_missing_shard_is_left_out_when_bad_samples_are_skipped(tmp_path):
    folder = shard_folder(tmp_path, [3, 4, 2])
    (folder / "s1.tar").unlink()
    train = source(folder, on_bad_sample="skip")
    assert np.flatnonzero(~train.usable).tolist() == [3, 4, 5, 6]
    assert train.read(np.array([8, 2])).x[:, 0].tolist() == [8, 2]
