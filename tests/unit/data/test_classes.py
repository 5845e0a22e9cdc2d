"""Classes that occur: dealt out, weighed, named, and counted as such."""

import json

import numpy as np
import pytest
from PIL import Image

from distcl.config import DataConfig, StreamConfig
from distcl.data.shards.decode import label_of
from distcl.data.shards.index import index_folder
from distcl.data.shards.inputs import open_samples
from distcl.data.shards.manifest import read_shards
from distcl.data.shards.open import shards
from distcl.data.shards.writer import append_shards, write_shards
from distcl.data.sources.arrays import ArraySource
from distcl.data.stream import DriftStream
from distcl.errors import ConfigError, DataError
from distcl.job import execute
from distcl.training.scores import AccuracyScore
from tests.forked import distcl
from tests.small import small


def stream(classes, experiences, seed=0, drift="split", each=10, tests=None, **options):
    y, other = (np.repeat(np.array(list(c)), each) for c in (classes, tests or classes))
    train, test = (ArraySource(np.zeros((len(part), 3), np.float32), part) for part in (y, other))
    config = StreamConfig(drift=drift, experiences=experiences, **options)
    return DriftStream(train, test, config, seed)


def dealt(made, test=False):
    return [set(made.read(e.test if test else e.train).y.tolist()) for e in made.experiences]


@pytest.mark.parametrize(
    ("classes", "experiences", "sizes"),
    [
        (range(1, 11), 5, [2] * 5),
        ([3, 7], 2, [1, 1]),
        ([10, 20, 30, 40], 2, [2, 2]),
        ([0, 1, 2, 3, 4, 5, 6, 7, 9], 5, [2, 2, 2, 2, 1]),
        (range(1, 6), 5, [1] * 5),
    ],
)
def test_split_deals_out_the_classes_that_occur(classes, experiences, sizes):
    for seed in range(8):
        made = stream(classes, experiences, seed)
        found = dealt(made)
        assert [len(part) for part in found] == sizes
        assert set().union(*found) == set(classes) and sum(sizes) == len(set(classes))
        assert dealt(made, test=True) == found


def test_split_of_all_classes_is_as_it_was():
    for seed in range(4):
        order = np.random.default_rng([seed, 3]).permutation(10)
        assert dealt(stream(range(10), 4, seed)) == [set(p) for p in np.array_split(order, 4)]


def test_more_experiences_than_classes_are_refused():
    with pytest.raises(ConfigError, match=r"3 concepts .* need as many, but the data have 2"):
        stream([3, 7], 3)


def test_a_class_without_training_samples_is_tested_on():
    made = stream([3, 7], 2, tests=[3, 5, 7])
    assert sorted(map(sorted, dealt(made))) == [[3], [7]]
    assert set().union(*dealt(made, test=True)) == {3, 5, 7}


def test_label_shift_weighs_the_classes_that_occur():
    """However few of the classes below the largest label there are, at every strength."""
    for seed in range(5):
        made = stream([900, 1000], 4, seed, "label_shift", each=200, severity=1000.0)
        counts = [
            np.bincount(made.read(e.train).y, minlength=1001)[[900, 1000]] for e in made.experiences
        ]
        assert counts[0].tolist() == [200, 200] and all(max(c) == 200 for c in counts)


def test_labels_that_are_no_classes_are_refused():
    class Own(ArraySource):
        def __init__(self, largest):
            super().__init__(np.zeros((4, 3), np.float32), np.arange(4) % 2)
            self.labels = np.array([0, 1, 0, largest])

    for largest, message in ((1 << 20, "is not below 1048576"), (-1, "is negative")):
        with pytest.raises(DataError, match=message):
            DriftStream(Own(largest), Own(largest), StreamConfig(drift="none"), 0)


@pytest.mark.parametrize("text", [b"1_0", b"+1", b"-0", b"1.0", b"", b"one", b"1 2", "٣".encode()])
def test_a_label_is_digits(text):
    with pytest.raises(DataError, match="member 'cls' does not hold digits"):
        label_of({"cls": text}, "cls")


@pytest.mark.parametrize(("text", "label"), [(b"7", 7), (b"007\n", 7), (b" 10 ", 10)])
def test_digits_are_a_label(text, label):
    assert label_of({"cls": text}, "cls") == label


# ---------------------------------------------------------------- class folders


def pictures(folder, names, each=3, kind="png"):
    for label, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        for k in range(each):
            color = (60 * label, 20 * k, 5)
            Image.new("RGB", (4, 5), color).save(folder / name / f"{k}.{('jpg', kind)[k % 2]}")
    return folder


def test_what_is_no_image_of_a_class_is_named(tmp_path):
    folder = pictures(tmp_path / "i", ["cat", "dog"])
    pictures(folder, [".thumbnails"])
    (folder / "cat" / ".DS_Store").write_bytes(b"x")
    (folder / "cat" / "._0.jpg").write_bytes(b"x")
    (folder / "cat" / "Thumbs.db").write_bytes(b"x")
    (folder / "dog" / "more.png").mkdir()
    (folder / "labels.csv").write_text("x")
    made = open_samples(str(folder))
    assert made.class_names == ["cat", "dog"] and made.sizes == {"train": 6}
    assert made.skipped == ["labels.csv", "cat/Thumbs.db", "dog/more.png"]
    done = distcl("shard", str(folder), str(tmp_path / "s"))
    assert done.returncode == 0
    assert "3 skipped in" in done.stderr and "'cat/Thumbs.db'" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_folders_beside_train_and_test_are_named(tmp_path):
    for part in ("train", "test", "val", "extra"):
        pictures(tmp_path / part, ["a", "b"], 2)
    made = open_samples(str(tmp_path))
    assert made.skipped == ["extra", "val"] and made.sizes == {"train": 4, "test": 4}


@pytest.mark.parametrize("split", ["", "train", "test"])
def test_a_class_without_images_is_refused(tmp_path, split):
    for part in ("train", "test") if split else ("",):
        pictures(tmp_path / part, ["a", "b"])
    (tmp_path / split / "b").rename(tmp_path / split / ".b")
    (tmp_path / split / "b").mkdir()
    (tmp_path / split / "b" / "0.bmp").write_bytes(b"x")
    with pytest.raises(DataError, match=r"class '.*b' has no images \(png, jpg, jpeg, webp\)"):
        open_samples(str(tmp_path))


def test_names_of_classes_go_with_the_shards_into_summary_and_report(tmp_path):
    """From a folder that mixes JPEG and PNG, through training."""
    pictures(tmp_path / "i" / "train", ["cat", "dog", "eel"], 8)
    pictures(tmp_path / "i" / "test", ["cat", "dog", "eel"], 3)
    write_shards(open_samples(str(tmp_path / "i")), tmp_path / "a", per_shard=7)
    assert json.loads((tmp_path / "a" / "shards.json").read_text())["class_names"] == [
        "cat",
        "dog",
        "eel",
    ]
    write_shards(open_samples(str(tmp_path / "a")), tmp_path / "s", per_shard=9)
    index_folder(tmp_path / "s")
    assert read_shards(tmp_path / "s").class_names == ["cat", "dog", "eel"]
    config = small(
        "stream.source=shards",
        f"stream.path={tmp_path / 's'}",
        "stream.drift=split",
        "stream.samples_per_experience=0",
        "run.report=true",
    )
    summary = execute("train", config, tmp_path / "o")
    assert summary["class_names"] == ["cat", "dog", "eel"]
    page = (tmp_path / "o" / "report.html").read_text()
    assert sum(f">{name}<" in page for name in ("cat", "dog", "eel")) >= 2
    pictures(tmp_path / "j", ["cat", "dog"])
    with pytest.raises(DataError, match="has the classes cat, dog, eel, but what is to be added"):
        append_shards(open_samples(str(tmp_path / "j")), tmp_path / "s")


def test_manifests_without_names_are_as_they_were(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.zeros((6, 3), np.float32), y=np.arange(6) % 2)
    write_shards(open_samples(str(tmp_path / "a.npz")), tmp_path / "s")
    assert set(json.loads((tmp_path / "s" / "shards.json").read_text())) == {"label", "shards"}
    train, _ = shards(StreamConfig(path=str(tmp_path / "s")), DataConfig())
    assert train.class_names == []


def test_chance_counts_the_classes_that_occur():
    """What a model is compared with that knows nothing but which classes there are."""
    spec = stream([3, 7], 1).spec
    assert spec.classes == 8 and spec.occurring == (3, 7) and spec.labels.tolist() == [3, 7]
    assert AccuracyScore(spec, "cross_entropy").chance() == 0.5
    whole = stream(range(4), 1).spec
    assert whole.occurring == () and whole.labels.tolist() == [0, 1, 2, 3]
