"""Hugging Face datasets, written and read for real; skipped where the extra is not installed."""

import sys

import numpy as np
import pytest
import torch

from distcl.config import StreamConfig
from distcl.data.sources.huggingface import HFSource, hf
from distcl.data.stream import create_stream
from distcl.errors import ConfigError, DataError
from distcl.types import DataSpec

datasets = pytest.importorskip("datasets", reason="the extra 'data' is not installed")
datasets.disable_progress_bars()

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (30, 6, 4, 3), dtype=np.uint8)
LABELS = np.arange(30) % 3
FEATURES = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b", "c"])}


def dataset(features=None, **columns):
    columns = columns or {"image": list(IMAGES), "label": LABELS.tolist()}
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features or FEATURES))


def saved(folder, **splits):
    datasets.DatasetDict(splits).save_to_disk(str(folder))
    return StreamConfig(source="hf", path=str(folder))


def test_a_saved_dataset_is_read(tmp_path):
    config = saved(tmp_path, train=dataset(), test=dataset().select(range(9)))
    train, test = hf(config)
    assert (len(train), len(test)) == (30, 9)
    assert train.labels.tolist() == LABELS.tolist()
    batch = train.read(np.array([7, 2, 7]))
    expected = np.moveaxis(IMAGES[[7, 2, 7]], -1, 1) / np.float32(255)
    np.testing.assert_array_equal(batch.x.numpy(), expected)
    assert batch.y.dtype == torch.int64 and batch.y.tolist() == [1, 2, 1]
    nothing = train.read(np.empty(0, dtype=np.int64))
    assert nothing.x.shape == (0, 3, 6, 4) and nothing.y.shape == (0,)
    with pytest.raises(DataError, match=r"train: there is no sample 30 \(0…29\)"):
        train.read(np.array([0, 30]))


def test_a_stream_over_a_dataset_without_test_split_drifts(tmp_path):
    dataset().save_to_disk(str(tmp_path))
    config = StreamConfig(source="hf", path=str(tmp_path), experiences=2, drift="rotate")
    stream = create_stream(config, 0)
    assert stream.spec == DataSpec((3, 6, 4), 3)
    assert [len(part) for part in (stream.experiences[1].train, stream.experiences[1].test)] == [
        24,
        6,
    ]
    y = stream.read(stream.experiences[0].test).y
    assert torch.bincount(y).tolist() == [2, 2, 2]


def test_a_folder_of_parquet_files_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    dataset().to_parquet(str(tmp_path / "data" / "train-00000.parquet"))
    config = StreamConfig(source="hf", path=str(tmp_path / "data"))
    train, test = hf(config)
    assert len(train) + len(test) == 30 and train.read(np.array([0])).x.shape == (1, 3, 6, 4)


def test_gray_images_have_one_channel_and_arrays_are_read_as_numbers(tmp_path):
    gray = HFSource(dataset(image=list(IMAGES[..., 0]), label=[0] * 30), "image", "label", "gray")
    np.testing.assert_array_equal(
        gray.read(np.array([4])).x.numpy(), IMAGES[4:5, None, :, :, 0] / np.float32(255)
    )
    x = RNG.random((5, 2, 3)).astype("f4")
    features = {"sensor": datasets.Array2D((2, 3), "float32"), "y": datasets.Value("float32")}
    table = dataset(features, sensor=list(x), y=[0.5, 1.0, 1.5, 2.0, 2.5])
    source = HFSource(table, "sensor", "y", "sensors")
    batch = source.read(np.array([3, 0]))
    np.testing.assert_array_equal(batch.x.numpy(), x[[3, 0]])
    assert source.labels is None and batch.y.dtype == torch.float32
    assert batch.y.tolist() == [2.0, 0.5]


def test_columns_and_splits_are_options_and_named_if_absent(tmp_path):
    table = dataset().rename_columns({"image": "img", "label": "fine_label"})
    config = saved(tmp_path, big=table, validation=table.select(range(6)))
    options = {"image": "img", "label": "fine_label", "train": "big", "test": "validation"}
    stream = create_stream(config.model_copy(update={"options": options, "drift": "rotate"}), 0)
    assert len(stream.experiences[0].test) == 6

    def message(**changed):
        with pytest.raises(ConfigError) as caught:
            hf(config, **{**options, **changed})
        return str(caught.value)

    assert "has no split 'bug', did you mean 'big'?; it has big, validation" in message(train="bug")
    wrong = message(image="imgs")
    assert "big has no column 'imgs', did you mean 'img'?; it has img, fine_label" in wrong
    assert "(stream.options.image)" in wrong
    assert "has no column 'label', did you mean 'fine_label'?" in message(label="label")
    with pytest.raises(ConfigError, match="source 'hf' has no option 'imag', did you mean 'image'"):
        create_stream(config.model_copy(update={"options": {"imag": "img"}}), 0)
    with pytest.raises(
        ConfigError, match=r"'hf' needs stream\.path, a folder or a name on the hub"
    ):
        hf(StreamConfig(source="hf"))


def test_bad_samples_are_named():
    images = [*IMAGES[:3], IMAGES[3, :5]]
    source = HFSource(dataset(image=images, label=[0, 1, 2, 0]), "image", "label", "mine")
    assert source.read(np.array([2, 1])).x.shape == (2, 3, 6, 4)
    with pytest.raises(DataError, match=r"mine: sample 3 has shape \(3, 5, 4\).* has resize"):
        source.read(np.array([0, 1, 3]))
    with pytest.raises(DataError, match="mine: row 2 has no 'label'"):
        HFSource(dataset(image=images, label=[0, 1, None, 0]), "image", "label", "mine")
    features = {"image": datasets.Value("float32"), "label": datasets.Value("string")}
    table = dataset(features, image=[1.0, float("nan")], label=["a", "b"])
    with pytest.raises(ConfigError, match="mine: column 'label' has type string; class labels"):
        HFSource(table, "image", "label", "mine")
    source = HFSource(table.add_column("y", [0, 1]), "image", "y", "mine")
    with pytest.raises(DataError, match="mine: sample 1: member 'image' has a value that is NaN"):
        source.read(np.array([0, 1]))
    source = HFSource(table.add_column("y", [0, 1]), "label", "y", "mine")
    with pytest.raises(DataError, match="mine: sample 0: column 'label' has no numbers"):
        source.read(np.array([0]))


def test_what_cannot_be_loaded_is_named(tmp_path):
    with pytest.raises(DataError, match=r"the dataset '.*empty' cannot be loaded: .*data file"):
        (tmp_path / "empty").mkdir()
        hf(StreamConfig(source="hf", path=str(tmp_path / "empty")))
    (tmp_path / "state.json").write_text("{")
    with pytest.raises(DataError, match="cannot be loaded"):
        hf(StreamConfig(source="hf", path=str(tmp_path)))


def test_without_the_extra_the_error_says_what_to_type(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)  # what the import system does for "absent"
    with pytest.raises(ConfigError, match="source = 'hf' needs the package 'datasets'; type: pip"):
        create_stream(StreamConfig(source="hf", path="x"), 0)


def test_a_file_is_read_from_the_disk_and_never_looked_up(tmp_path, monkeypatch):
    lines = ["x,label,site", *(f"{k / 4},{k % 2},{'ab'[k // 2 % 2]}" for k in range(40))]
    (tmp_path / "rows.csv").write_text("\n".join(lines))
    keys = {"source": "hf", "options": {"image": "x"}, "experiences": "key:site"}
    made = create_stream(StreamConfig(path=str(tmp_path / "rows.csv"), **keys), 0)
    assert [e.name for e in made.experiences] == ["a", "b"]
    assert [len(e.test) for e in made.experiences] == [4, 4]
    values = made.read(made.experiences[1].train).x * 4
    assert set((values.long() // 2 % 2).tolist()) == {1}
    monkeypatch.chdir(tmp_path)
    for path, message in (("other.csv", "there is no"), ("notes.md", "is no file that")):
        (tmp_path / "notes.md").write_text("no table")
        with pytest.raises(DataError, match=message):
            create_stream(StreamConfig(path=path, **keys), 0)
