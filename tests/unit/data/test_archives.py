"""Archives as other writers make them: read right, or refused in the same words by whoever reads.

Whoever reads: indexing, --verify, indexed and streamed access, and cutting anew.
"""

import gzip
import itertools
import os
import re
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from distcl.cli.app import app
from distcl.config import DataConfig, StreamConfig
from distcl.config.files import file_digest
from distcl.data.shards.decode import npy_bytes
from distcl.data.shards.index import (
    IndexBuilder,
    index_folder,
    index_path,
    verify_folder,
)
from distcl.data.shards.indexed import ShardSource
from distcl.data.shards.inputs import open_samples
from distcl.data.shards.manifest import Shard, numbered, read_shards, write_manifest
from distcl.data.shards.open import shards
from distcl.data.shards.sequential import StreamedSource
from distcl.data.shards.tar import END
from distcl.data.shards.writer import write_shards
from distcl.data.sources.arrays import ArraySource
from distcl.errors import DataError, UsageError
from tests.files import archive, member, row_value, sample, write_tar


def forge(folder: Path) -> None:
    """Write index and manifest as a program would that checks nothing."""
    listed = []
    for tar in sorted(folder.glob("*.tar")):
        raw, builder, begins, last = tar.read_bytes(), IndexBuilder(), list[int](), ""
        with tarfile.open(tar) as found:
            for info in found.getmembers():
                key = "/".join([*info.name.split("/")[:-1], info.name.split("/")[-1].split(".")[0]])
                begins += [info.offset] if key != last else []
                last = key
            end = found.offset
        places = [*begins, end]
        for begin, stop in itertools.pairwise(places):
            builder.add(begin, raw[begin:stop], 0)
        builder.write(tar, tar.stat())
        listed.append(Shard(tar.name, "train", len(builder), len(raw), file_digest(tar), 0, 2))
    write_manifest(folder, numbered("cls", listed))


def source(folder: Path, access: str, **data: object) -> ShardSource:
    manifest = read_shards(folder)
    config = DataConfig(access=access, **data)
    if access == "stream":
        return StreamedSource(folder, manifest.shards, config, "cls", "", "shards")
    return ShardSource(folder, manifest.shards, config)


def words(folder: Path, out: Path, *access: str) -> dict[str, str]:
    """Return what each reader says of a folder of archives with a fault."""
    said: dict[str, str] = {}

    def told(who: str, work: object) -> None:
        with pytest.raises(DataError) as error:
            work()  # type: ignore[operator]
        said[who] = str(error.value)

    told("index", lambda: index_folder(folder))
    told("recut", lambda: write_shards(open_samples(str(folder)), out))
    forge(folder)
    said["verify"] = " ".join(verify_folder(folder)[1])
    for way in access or ("indexed", "stream"):
        told(way, lambda way=way: (s := source(folder, way)).read(np.arange(len(s))))
    return said


# ---------------------------------------------------------------- members that are no plain files


@pytest.mark.parametrize(
    "form", ["gnu", "oldgnu", "pax --sparse-version=0.0", "pax --sparse-version=0.1", "pax"]
)
@pytest.mark.parametrize("holes", [2, 60])  # old headers hold 4 stretches of data, then go on
def test_sparse_members_are_refused_by_name_by_all(tmp_path, form, holes):
    files = tmp_path / "files"
    files.mkdir()
    for row in range(4):
        name, n = files / f"{row:04d}.npy", 8192 * holes
        x = np.lib.format.open_memmap(name, "w+", np.float32, (n,))  # it leaves holes
        x[slice(6000, None, 8192) if row < 2 else slice(None)] = row
        x.flush()
        (files / f"{row:04d}.cls").write_text(str(row % 2))
    (tmp_path / "s").mkdir()
    command = f"tar -S --format={form} -cf ../s/a.tar $(ls | sort)"
    subprocess.run(command, shell=True, cwd=files, check=True)
    assert (tmp_path / "s" / "a.tar").stat().st_size < 3 * 32768 * holes
    expected = "shard 'a.tar', sample '0000', id 0: member '0000.npy': it is sparse"
    for who, text in words(tmp_path / "s", tmp_path / "out").items():
        assert (expected if who != "recut" else "sample '0000': member '0000.npy': it is") in text
    manifest, problems = index_folder(tmp_path / "s", skip=True)
    assert len(problems) == 2 and manifest.shards[0].samples == 4
    with pytest.raises(
        DataError, match=r"id 0: it is marked as bad: member '0000\.npy': it is sparse"
    ):
        source(tmp_path / "s", "indexed")
    for access in ("indexed", "stream"):
        found = source(tmp_path / "s", access, on_bad_sample="skip").read(np.array([2, 3, 0]))
        assert found.ids.tolist() == [2, 3, 2] and found.x[:, 0].tolist() == [2, 3, 2]
    bad: list[str] = []
    made = open_samples(str(tmp_path / "s"), skip=True)
    write_shards(made, tmp_path / "left", problems=bad)
    kept = source(tmp_path / "left", "indexed").read(np.arange(2))
    assert len(bad) == 2 and kept.x[:, 0].tolist() == [2, 3]


@pytest.mark.parametrize(
    ("wrong", "expected"),
    [
        (member("0002.npy", type=tarfile.LNKTYPE, linkname="0001.npy"), "hard link to '0001.npy'"),
        (member("0002.npy", type=tarfile.SYMTYPE, linkname="x/y"), "symbolic link to 'x/y'"),
        (member("0002.npy", type=tarfile.CHRTYPE), "it is no file, but of type '3'"),
        (member("0002.npy", type=tarfile.FIFOTYPE), "it is no file, but of type '6'"),
        (member("0002.npy", npy_bytes(row_value(2)), type=b"M"), "it is no file, but of type 'M'"),
        (member("0002.npy", npy_bytes(row_value(2))) * 2, "it occurs twice"),
        (member("0002.pkl", b"\x80\x04."), "is a pickle"),
    ],
)
def test_members_that_are_no_files_are_said_in_the_same_words_by_all(tmp_path, wrong, expected):
    archive(tmp_path / "s/a.tar", 2, member("0002.cls", b"1"), wrong, sample(3))
    for who, text in words(tmp_path / "s", tmp_path / "out").items():
        assert "shard 'a.tar', sample '0002'" in text and expected in text, who
        assert ("id 2" in text) == (who != "recut")


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ((END, sample(2)), "there is more after the end mark"),
        ((bytes(512), sample(2)), "there is more after the end mark"),
        ((END, bytes(9000), b"x" * 512), "there is more after the end mark"),
        ((sample(0, "0000"),), "another sample has the key '0000' too"),
    ],
)
def test_what_stands_after_an_end_mark_and_keys_that_come_again(tmp_path, more, expected):
    archive(tmp_path / "s/a.tar", 2, *more)
    for who, text in words(tmp_path / "s", tmp_path / "out", "stream").items():
        assert "shard 'a.tar'" in text and expected in text, who


def test_zeros_after_the_end_mark_are_padding(tmp_path):
    tar = archive(tmp_path / "s/a.tar", 3)
    tar.write_bytes(tar.read_bytes() + bytes(30_000))
    index_folder(tmp_path / "s")
    assert verify_folder(tmp_path / "s")[1] == []
    for access in ("indexed", "stream"):
        assert source(tmp_path / "s", access).read(np.arange(3)).x[:, 0].tolist() == [0, 1, 2]


# ---------------------------------------------------------------- archives beside others


def test_archives_beside_others_are_read_or_said(tmp_path, caplog):
    archive(tmp_path / "s/a.tar", 2)
    archive(tmp_path / "s/B.TAR", 3)
    archive(tmp_path / "s/sub.tar", 1).rename(tmp_path / "s/._a.tar")
    archive(tmp_path / "s/nested/c.tar", 1)
    manifest, problems = index_folder(tmp_path / "s")
    assert [(s.name, s.samples) for s in manifest.shards] == [("B.TAR", 3), ("a.tar", 2)]
    assert "nested/" in caplog.text and "._a.tar" in caplog.text and not problems
    assert verify_folder(tmp_path / "s")[1] == []
    for name in ("b.tar.gz", "c.tgz", "d.TAR.XZ", "e.tar.zst"):
        other = tmp_path / "s" / name
        other.write_bytes(gzip.compress((tmp_path / "s/a.tar").read_bytes()))
        for work in (index_folder, lambda f: open_samples(str(f))):
            with pytest.raises(DataError, match=rf"{name}' is compressed"):
                work(tmp_path / "s")
        assert name in " ".join(index_folder(tmp_path / "s", skip=True)[1])
        assert name in open_samples(str(tmp_path / "s"), skip=True).problems[0]
        other.unlink()
    archive(tmp_path / "s/z.tar", 1)
    assert verify_folder(tmp_path / "s")[1][0].startswith("'z.tar' is not in shards.json")


# ---------------------------------------------------------------- keys


@pytest.mark.parametrize(
    "key", ["./0001", "v1.2/0001", "./a.b/c.d/0001", "f/" * 60 + "0001", "ü/" * 90 + "1", "../x"]
)
@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_keys_in_messages_are_the_real_ones(tmp_path, key, form):
    if form == tarfile.USTAR_FORMAT and len(key.encode()) > 150:
        return
    (tmp_path / "s").mkdir()
    members = [(f"{key}.npy", b"\x93NUMPY no array"), (f"{key}.cls", b"1")]
    write_tar(tmp_path / "s/a.tar", members, format=form)
    index_folder(tmp_path / "s")
    where = f"shard 'a.tar', sample '{key}', id 0: member 'npy'"
    assert verify_folder(tmp_path / "s")[1][0].startswith(where)
    for access in ("indexed", "stream"):
        with pytest.raises(DataError, match=re.escape(where)):
            source(tmp_path / "s", access).read(np.array([0]))
    with pytest.raises(DataError, match=re.escape(f"sample '{key}', id 0: it has no label")):
        index_folder(tmp_path / "s", "json:x")


# ---------------------------------------------------------------- the same as when it was indexed


@pytest.mark.parametrize("access", ["indexed", "stream"])
def test_an_archive_that_changed_since_it_was_indexed_is_refused(tmp_path, access):
    tar = archive(tmp_path / "s/a.tar", 6)
    index_folder(tmp_path / "s")
    was = tar.read_bytes()
    relabelled = bytearray(was)
    relabelled[3 * 2048 + 512] ^= 1  # one digit: the label of sample 3
    rows = [sample(row) for row in (0, 1, 4, 3, 2, 5)]
    for content, row in ((bytes(relabelled), 3), (b"".join(rows) + END, 2)):
        tar.write_bytes(content)
        assert len(content) == len(was)
        with pytest.raises(DataError, match=rf"id {row}: its bytes have changed since the index"):
            source(tmp_path / "s", access)
    skipped = source(tmp_path / "s", "indexed", on_bad_sample="skip")
    assert np.flatnonzero(~skipped.usable).tolist() == [2, 4]
    tar.write_bytes(was)  # as it was, but for its time: so is a copy
    assert source(tmp_path / "s", access).read(np.arange(6)).x[:, 0].tolist() == list(range(6))
    assert tar.stat().st_mtime_ns != index_path(tar).stat().st_mtime_ns
    assert verify_folder(tmp_path / "s")[1] == []
    assert tar.stat().st_mtime_ns == index_path(tar).stat().st_mtime_ns
    tar.write_bytes(was[:-512])
    with pytest.raises(DataError, match=r"bytes but shards\.json says"):
        source(tmp_path / "s", access)


@pytest.mark.parametrize("access", ["indexed", "stream"])
def test_another_archive_of_the_same_size_and_time_is_refused(tmp_path, access):
    tar = archive(tmp_path / "s/a.tar", 6)
    tar.write_bytes(tar.read_bytes() + bytes(4096))  # padding, as tar writes it
    index_folder(tmp_path / "s")
    stat, padding = tar.stat(), bytes(4096)
    rows = [sample(row) for row in range(7)]
    for made, told in (
        ([*rows[5::-1], END, padding], "id 0: its bytes have changed"),
        ([*rows, END, padding[2048:]], "shard 'a.tar' has more than its index"),
    ):
        tar.write_bytes(b"".join(made))
        os.utime(tar, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        assert tar.stat().st_size == stat.st_size
        with pytest.raises(DataError, match=told):
            source(tmp_path / "s", access)


def test_large_archives_of_another_time_are_compared_in_part(tmp_path, monkeypatch):
    tar = archive(tmp_path / "s/a.tar", 50)
    index_folder(tmp_path / "s")
    tar.write_bytes(b"".join(sample(row) for row in range(49, -1, -1)) + END)
    monkeypatch.setattr("distcl.data.shards.index._CHECKED", 8 * 2048)
    with pytest.raises(DataError, match="id 0: its bytes have changed"):
        source(tmp_path / "s", "indexed")


@pytest.mark.parametrize("packed", [False, True])
def test_a_stream_refuses_surplus_samples_and_keys_that_come_again(tmp_path, packed):
    def stream(content: bytes, samples: int) -> list[float]:
        (tmp_path / "s.tar").write_bytes(gzip.compress(content) if packed else content)
        shard = Shard("s.tar", "train", samples, len(content), "", 0, 2)
        write_manifest(tmp_path, numbered("cls", [shard]))
        return (
            source(tmp_path, "stream", shuffle_buffer=2).read(np.arange(samples)).x[:, 0].tolist()
        )

    whole = b"".join(map(sample, range(5)))
    assert stream(whole + END, 5) == [0, 1, 2, 3, 4]
    with pytest.raises(DataError, match=r"'s.tar' has more samples than shards.json says .id 3"):
        stream(whole + END, 4)
    with pytest.raises(DataError, match=r"has 5 samples but shards\.json says 6"):
        stream(whole + END, 6)
    with pytest.raises(
        DataError, match=r"sample '0001', id 5: .* another sample has the key '0001'"
    ):
        stream(whole + sample(1) + END, 6)
    with pytest.raises(DataError, match="more after the end mark"):
        stream(whole + END + whole + END, 5)
    if packed:
        (tmp_path / "s.tar").write_bytes(
            gzip.compress(whole + END) + gzip.compress(sample(7) + END)
        )
        with pytest.raises(DataError, match="more after the end mark"):
            source(tmp_path, "stream").read(np.arange(5))


# ---------------------------------------------------------------- one bad sample, while writing


def images(folder: Path, n: int = 9) -> Path:
    for label, name in enumerate(("cat", "dog")):
        (folder / name).mkdir(parents=True)
        for i in range(n):
            pixels = np.full((4, 4), 20 * label + i, np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    return folder


def pixels(folder: Path) -> list[int]:
    config = StreamConfig(path=str(folder), test_fraction=0.01)
    parts = shards(config, DataConfig())
    return sorted(
        int(v) for p in parts for v in p.read(np.arange(len(p))).x[:, 0, 0, 0] * 255 + 0.5
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_image_is_left_out_or_repaired_and_what_was_written_stays(tmp_path, workers):
    folder = images(tmp_path / "images")
    broken = folder / "dog" / "3.png"
    right = broken.read_bytes()
    broken.write_bytes(b"no image")
    every = [*range(9), *range(20, 29)]

    def write(out: str, problems: list[str] | None = None) -> Path:
        made = open_samples(str(folder))
        write_shards(made, tmp_path / out, 4, workers=workers, problems=problems)
        return tmp_path / out

    bad: list[str] = []
    assert pixels(write("skipped", bad)) == [v for v in every if v != 23]
    assert len(bad) == 1 and "3.png" in bad[0] and "sample 12 of train" in bad[0]
    with pytest.raises(DataError, match=r"dog/3\.png"):
        write("out")
    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").glob("*.tar")}
    assert len(before) >= 3
    broken.write_bytes(right)
    assert pixels(write("out")) == every
    kept = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").glob("*.tar")}
    assert sum(kept[name] == time for name, time in before.items()) >= 3
    broken.write_bytes(b"no image")
    with pytest.raises(DataError, match=r"dog/3\.png"):
        write("other")
    broken.unlink()  # those that follow move up: they are written anew
    assert pixels(write("other")) == [v for v in every if v != 23]
    broken.write_bytes(b"no image")
    with pytest.raises(DataError, match=r"dog/3\.png"):
        write("third")
    with pytest.raises(UsageError, match="another input"):
        write_shards(open_samples(str(images(tmp_path / "others"))), tmp_path / "third", 4)


def test_a_damaged_archive_is_left_out_or_repaired(tmp_path):
    for name, rows in (("a.tar", 6), ("b.tar", 6)):
        archive(tmp_path / "s" / name, rows)
    bad = tmp_path / "s/b.tar"
    right = bad.read_bytes()
    wrong = member("0006.cls", b"two") + member("0006.npy", npy_bytes(row_value(6)))
    bad.write_bytes(right[: -len(END)] + wrong + sample(7) + END)
    with pytest.raises(DataError, match=r"'b\.tar', sample '0006': it has no label"):
        write_shards(open_samples(str(tmp_path / "s")), tmp_path / "out", 5)
    first = (tmp_path / "out/train-000000.tar").stat().st_mtime_ns
    problems: list[str] = []
    write_shards(open_samples(str(tmp_path / "s"), skip=True), tmp_path / "left", problems=problems)
    found = source(tmp_path / "left", "indexed")
    assert found.read(np.arange(len(found))).x[:, 0].tolist() == [*range(6), *range(6), 7]
    assert len(problems) == 1
    bad.write_bytes(right)
    write_shards(open_samples(str(tmp_path / "s")), tmp_path / "out", 5)
    assert (tmp_path / "out/train-000000.tar").stat().st_mtime_ns == first
    found = source(tmp_path / "out", "indexed")
    assert found.read(np.arange(len(found))).x[:, 0].tolist() == [*range(6), *range(6)]
    bad.write_bytes(right[: 4 * 2048 + 100])
    made = open_samples(str(tmp_path / "s"), skip=True)
    assert (
        made.sizes == {"train": 6 + 3} and "'b.tar', in or after sample '0003'" in made.problems[0]
    )


class Picky(ArraySource):
    def read(self, ids):
        if 77 in ids:
            raise DataError("sample 77 is broken")
        return super().read(ids)


def picky(config: StreamConfig) -> tuple[ArraySource, ArraySource]:
    x = np.arange(300, dtype=np.float32)[:, None]
    return Picky(x, np.arange(300) % 3), ArraySource(x[:3], np.arange(3))


def test_of_a_source_that_reads_in_batches_only_the_bad_sample_is_left_out(tmp_path):
    name = f"{__name__}:picky"
    problems: list[str] = []
    made = open_samples(name, stream=StreamConfig(source=name))
    write_shards(made, tmp_path / "s", problems=problems)
    train, _ = shards(StreamConfig(path=str(tmp_path / "s")), DataConfig())
    assert train.read(np.arange(299)).x[:, 0].tolist() == [v for v in range(300) if v != 77]
    assert problems == ["sample 77 of train: sample 77 is broken"]


def test_the_command_skips_and_names_bad_samples(tmp_path):
    from typer.testing import CliRunner

    folder = images(tmp_path / "images", 2)
    (folder / "cat" / "0.png").write_bytes(b"")
    done = CliRunner().invoke(app, ["shard", str(folder), str(tmp_path / "s"), "--skip-bad"])
    assert done.exit_code == 0 and "cat/0.png" in done.output and "3 samples" in done.output
    for image in folder.glob("*/*.png"):
        image.write_bytes(b"")
    done = CliRunner().invoke(app, ["shard", str(folder), str(tmp_path / "t"), "--skip-bad"])
    assert isinstance(done.exception, DataError) and "not one sample" in str(done.exception)
