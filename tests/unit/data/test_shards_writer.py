"""``distcl shard``: what is written, that it is the same every time, and how it survives a kill."""

import hashlib
import io
import json
import multiprocessing
import os
import signal
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image

from distcl.cli.app import app
from distcl.config import DataConfig, StreamConfig
from distcl.data.shards.index import index_folder, verify_folder
from distcl.data.shards.inputs import ArraySamples, open_samples
from distcl.data.shards.manifest import read_shards
from distcl.data.shards.open import shards
from distcl.data.shards.writer import write_shards
from distcl.data.sources.arrays import ArraySource, arrays
from distcl.data.stream import create_sources
from distcl.errors import DataError, UsageError

RNG = np.random.default_rng(0)


def save(path: Path, n: int = 50, dtype: str = "uint8", test: int = 0) -> Path:
    def some(n: int) -> np.ndarray:
        return (RNG.random((n, 1, 4, 4)) * 255).astype(dtype)

    parts = {"x": some(n), "y": RNG.integers(0, 5, n)}
    if test:
        parts |= {"x_test": some(test), "y_test": RNG.integers(0, 5, test)}
    np.savez(path, **parts)
    return path


def digests(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


def both(npz: Path, folder: Path) -> list[tuple[object, object]]:
    as_arrays = arrays(StreamConfig(source="arrays", path=str(npz)))
    as_shards = shards(StreamConfig(source="shards", path=str(folder)), DataConfig())
    return list(zip(as_arrays, as_shards, strict=True))


@pytest.mark.parametrize("dtype", ["uint8", "int16", "float32", "float64", ">f4"])
@pytest.mark.parametrize("test", [0, 20])
def test_shards_read_the_same_bits_as_the_arrays_they_are_made_of(tmp_path, dtype, test):
    npz = save(tmp_path / "d.npz", dtype=dtype, test=test)
    write_shards(ArraySamples(npz), tmp_path / "s", per_shard=7)
    for ours, theirs in both(npz, tmp_path / "s"):
        ids = RNG.integers(0, len(ours), 64)
        a, b = ours.read(ids), theirs.read(ids)
        assert len(ours) == len(theirs)
        assert a.x.dtype == b.x.dtype and torch.equal(a.x, b.x)
        assert torch.equal(a.y, b.y) and torch.equal(a.ids, b.ids)
        np.testing.assert_array_equal(ours.info.known_labels(), theirs.info.known_labels())
        assert ours.read(ids[:0]).x.shape == theirs.read(ids[:0]).x.shape


def test_bytes_do_not_depend_on_the_number_of_processes(tmp_path):
    samples = ArraySamples(save(tmp_path / "d.npz", test=9))
    for workers in (0, 2, 3):
        write_shards(samples, tmp_path / f"s{workers}", per_shard=8, workers=workers)
    assert digests(tmp_path / "s0") == digests(tmp_path / "s2") == digests(tmp_path / "s3")


def test_the_manifest_tells_samples_bytes_digests_and_first_ids(tmp_path):
    told = []
    manifest = write_shards(
        ArraySamples(save(tmp_path / "d.npz", n=20, test=5)),
        tmp_path / "s",
        per_shard=8,
        tell=lambda *a: told.append(a),
    )
    lines = [(s.name, s.split, s.samples, s.first_id) for s in manifest.shards]
    assert lines == [
        ("train-000000.tar", "train", 8, 0),
        ("train-000001.tar", "train", 8, 8),
        ("train-000002.tar", "train", 4, 16),
        ("test-000000.tar", "test", 5, 0),
    ]
    for shard in manifest.shards:
        data = (tmp_path / "s" / shard.name).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (shard.bytes, shard.sha256)
    assert read_shards(tmp_path / "s") == manifest
    assert sum(n for _, n in told) == 25


def test_what_training_takes_or_refuses_of_an_npz_so_does_writing(tmp_path):
    x = np.zeros((3, 2), np.float32)
    np.savez(tmp_path / "d.npz", x=x, y=np.array([True, False, True]))
    write_shards(ArraySamples(tmp_path / "d.npz"), tmp_path / "s")
    assert (
        create_sources(
            StreamConfig(source="shards", path=str(tmp_path / "s"), test_fraction=0.3), DataConfig()
        )[0]
        .info.known_labels()
        .sum()
    )
    x[1] = np.nan
    np.savez(tmp_path / "d.npz", x=x, y=np.arange(3))
    with pytest.raises(DataError, match="sample 1 of train: member 'npy' has a value that is NaN"):
        write_shards(ArraySamples(tmp_path / "d.npz"), tmp_path / "t")


def test_shards_stay_below_the_size_asked_for(tmp_path):
    npz = save(tmp_path / "d.npz", n=40)
    manifest = write_shards(ArraySamples(npz), tmp_path / "s", per_shard=15, max_bytes=20_000)
    assert max(s.bytes for s in manifest.shards) <= 20_000
    assert sum(s.samples for s in manifest.shards) == 40 and len(manifest.shards) > 3
    ours, theirs = both(npz, tmp_path / "s")[0]
    ids = np.arange(len(ours))
    assert torch.equal(ours.read(ids).x, theirs.read(ids).x)


class Killed(ArraySamples):
    """Kills its process, as the system might, when it comes to sample 33."""

    def read(self, split: str, begin: int, end: int) -> Iterator[dict[str, bytes]]:
        for row, members in enumerate(super().read(split, begin, end), begin):
            if row == 33:
                os.kill(os.getpid(), signal.SIGKILL)
            yield members


def test_a_killed_run_leaves_no_half_shard_and_goes_on(tmp_path):
    npz = save(tmp_path / "d.npz")
    write_shards(ArraySamples(npz), tmp_path / "whole", per_shard=10)
    folder = tmp_path / "killed"
    process = multiprocessing.get_context("fork").Process(
        target=write_shards, args=(Killed(npz), folder, 10)
    )
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    visible = {p.name for p in folder.iterdir() if not p.name.startswith(".")}
    whole = [f"train-{i:06d}" for i in range(3)]
    expected = {f"{name}{end}" for name in whole for end in (".tar", ".index.npy")}
    assert visible == expected | {"shards.plan.json"}
    before = {p.name: p.stat().st_mtime_ns for p in folder.glob("*.tar")}
    with pytest.raises(UsageError, match="other options"):
        write_shards(ArraySamples(npz), folder, per_shard=11)
    write_shards(ArraySamples(npz), folder, per_shard=10)
    assert digests(folder) == digests(tmp_path / "whole")
    assert before.items() <= {p.name: p.stat().st_mtime_ns for p in folder.glob("*.tar")}.items()
    with pytest.raises(UsageError, match="is complete"):
        write_shards(ArraySamples(npz), folder, per_shard=10)


def test_a_killed_worker_is_told_and_the_rest_is_kept(tmp_path):
    npz = save(tmp_path / "d.npz")
    with pytest.raises(DataError, match="goes on from here"):
        write_shards(Killed(npz), tmp_path / "s", per_shard=10, workers=2)
    write_shards(ArraySamples(npz), tmp_path / "s", per_shard=10, workers=2)
    write_shards(ArraySamples(npz), tmp_path / "t", per_shard=10)
    assert digests(tmp_path / "s") == digests(tmp_path / "t")


def test_archives_are_cut_anew(tmp_path):
    npz = save(tmp_path / "d.npz", test=9)
    write_shards(ArraySamples(npz), tmp_path / "a", per_shard=8)
    write_shards(open_samples(str(tmp_path / "a")), tmp_path / "b", per_shard=21)
    write_shards(ArraySamples(npz), tmp_path / "c", per_shard=21)
    assert digests(tmp_path / "b") == digests(tmp_path / "c")


def test_a_folder_of_images_keeps_its_files(tmp_path):
    for split, n in (("train", 3), ("val", 1)):
        for label, name in enumerate(("cat", "dog")):
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            for i in range(n):
                pixels = np.full((5, 4, 3), 40 * label + i, np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    manifest = write_shards(open_samples(str(tmp_path / "images")), tmp_path / "s")
    assert [(s.split, s.samples) for s in manifest.shards] == [("train", 6), ("test", 2)]
    train, _ = shards(StreamConfig(path=str(tmp_path / "s")), DataConfig())
    batch = train.read(np.arange(6))
    assert batch.x.shape == (6, 3, 5, 4) and batch.y.tolist() == [0, 0, 0, 1, 1, 1]
    assert torch.equal(batch.x[:, 0, 0, 0] * 255, torch.tensor([0.0, 1, 2, 40, 41, 42]))
    (tmp_path / "images" / "train" / "cat" / "1.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"1\.png"):
        write_shards(open_samples(str(tmp_path / "images")), tmp_path / "t")


def two_tensors(config: StreamConfig) -> tuple[object, object]:
    n = 12
    x = {"tokens": np.arange(n * 3, dtype=np.int64).reshape(n, 3), "mask": np.ones((n, 3), bool)}
    return ArraySource(x, np.arange(n) % 3), ArraySource(x, np.arange(n) % 3)


def test_a_source_of_ones_own_with_several_tensors(tmp_path):
    name = f"{__name__}:two_tensors"
    write_shards(open_samples(name, stream=StreamConfig(source=name)), tmp_path / "s", per_shard=5)
    train, _ = shards(StreamConfig(path=str(tmp_path / "s")), DataConfig())
    ours = two_tensors(StreamConfig())[0].read(np.array([7, 2]))
    batch = train.read(np.array([7, 2]))
    assert batch.x.keys() == ours.x.keys()
    assert all(torch.equal(batch.x[k], ours.x[k]) for k in ours.x)
    assert batch.x["mask"].dtype == torch.bool


def test_a_hugging_face_dataset_on_disk(tmp_path):
    reason = "the extra 'data' is not installed"
    datasets = pytest.importorskip("datasets", reason=reason)
    pixels = [RNG.integers(0, 256, (6, 5), dtype=np.uint8) for _ in range(8)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    rows = {"image": pixels, "label": [0, 1] * 4}
    saved = datasets.Dataset.from_dict(rows, features=features)
    datasets.DatasetDict({"train": saved, "test": saved}).save_to_disk(str(tmp_path / "hf"))
    write_shards(open_samples(str(tmp_path / "hf")), tmp_path / "s", per_shard=3)
    train, test = shards(StreamConfig(path=str(tmp_path / "s")), DataConfig())
    assert len(train) == len(test) == 8
    batch = train.read(np.array([5]))
    assert torch.equal(batch.x[0, 0], torch.from_numpy(pixels[5] / np.float32(255)))
    assert batch.y.tolist() == [1]


def test_archives_by_the_webdataset_library_are_indexed_as_they_are(tmp_path):
    for s in range(3):
        with webdataset.TarWriter(str(tmp_path / f"part_{s}.tar")) as writer:
            for i in range(10):
                x = np.full(3, s * 10 + i, np.float32)
                out = io.BytesIO()
                np.save(out, x)
                writer.write({"__key__": f"a/b{i}", "npy": out.getvalue(), "cls": str(i).encode()})
    manifest, problems = index_folder(tmp_path)
    assert not problems and [s.first_id for s in manifest.shards] == [0, 10, 20]
    assert verify_folder(tmp_path)[1] == []
    train, test = shards(StreamConfig(path=str(tmp_path), test_fraction=0.3), DataConfig())
    seen = np.concatenate([s.read(np.arange(len(s))).x.numpy()[:, 0] for s in (train, test)])
    np.testing.assert_array_equal(np.sort(seen), np.arange(30))


def test_other_peoples_archives_with_folders_long_names_and_labels_in_json(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w", format=tarfile.PAX_FORMAT) as archive:
        for i in range(4):
            folder = tarfile.TarInfo(f"../../climbs/out{i}")
            folder.type = tarfile.DIRTYPE
            archive.addfile(folder)
            stem = f"../../climbs/{'long' * 40}/ü{i}"
            label = json.dumps({"class": {"id": i}, "species": i // 2}).encode()
            out = io.BytesIO()
            np.save(out, np.full(2, i, np.float64))
            for ext, data in (("npy", out.getvalue()), ("json", label), ("mp4", b"raw")):
                info = tarfile.TarInfo(f"{stem}.{ext}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    index_folder(tmp_path, "json:species")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["shards.json", "x.index.npy", "x.tar"]
    train, test = shards(StreamConfig(path=str(tmp_path), test_fraction=0.5), DataConfig())
    for source in (train, test):
        batch = source.read(np.arange(2))
        assert torch.equal(batch.y, batch.x[:, 0].long() // 2) and batch.x.dtype == torch.float64


def test_the_command_writes_indexes_and_checks(tmp_path):
    from typer.testing import CliRunner

    run = CliRunner().invoke
    npz, folder = save(tmp_path / "d.npz"), tmp_path / "s"
    done = run(app, ["shard", str(npz), str(folder), "--per-shard", "20", "--max-mb", "1"])
    assert done.exit_code == 0 and "3 shards, 50 samples" in done.output
    assert run(app, ["shard", str(folder), "--verify"]).exit_code == 0
    (folder / "shards.json").unlink()
    for index in folder.glob("*.index.npy"):
        index.unlink()
    assert run(app, ["shard", str(folder), "--index-only"]).exit_code == 0
    tar = next(folder.glob("*.tar"))
    data = bytearray(tar.read_bytes())
    data[5000] ^= 1
    tar.write_bytes(data)
    done = run(app, ["shard", str(folder), "--verify"])
    assert isinstance(done.exception, DataError)
    assert isinstance(run(app, ["shard", str(folder)]).exception, UsageError)
