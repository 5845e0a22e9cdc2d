"""Class folders of images straight from the disk."""

import pickle

import numpy as np
import pytest

from distcl.config import DataConfig, StreamConfig
from distcl.data.sources.joined import JoinedSource
from distcl.data.stream import create_sources, create_stream
from distcl.errors import ConfigError, DataError
from distcl.types import info_of

Image = pytest.importorskip("PIL.Image", reason="the extra 'data' is not installed")
RNG = np.random.default_rng(0)


def picture(path, shape):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = RNG.integers(0, 256, shape, dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return pixels


@pytest.fixture
def photos(tmp_path):
    """Two classes of 10: grey and RGB, PNG and JPEG, of one size."""
    for name in ("dog", "cat"):
        for k in range(10):
            picture(
                tmp_path / name / f"{k}.{'jpg' if k % 5 == 0 else 'png'}", (8, 6, 3)[: 2 + k % 2]
            )
    (tmp_path / "cat" / "notes.txt").write_text("no image")
    return tmp_path


def sources(path, data=None, **options):
    config = StreamConfig(source="folder", path=str(path), options=options, experiences=1)
    return create_sources(config, data or DataConfig())


def test_formats_and_modes_are_mixed_and_names_are_classes(photos):
    train, test = sources(photos)
    assert (len(train), len(test)) == (16, 4)
    assert list(info_of(train).class_names) == ["cat", "dog"]
    files = info_of(train).columns["file"].tolist()
    ids = RNG.permutation(16)
    batch = train.read(ids)
    assert batch.x.shape == (16, 3, 8, 6) and batch.ids.tolist() == ids.tolist()
    for k, id_ in enumerate(ids):
        file = photos / ("cat", "dog")[batch.y[k]] / files[id_]
        dense = np.asarray(Image.open(file).convert("RGB"), dtype=np.float32) / 255
        np.testing.assert_array_equal(batch.x[k].numpy(), np.moveaxis(dense, -1, 0))
    again = pickle.loads(pickle.dumps(train))
    assert again.read(ids).x.equal(batch.x) and len(train.read(np.array([], int)).x) == 0


def test_grey_and_a_size_and_transforms_after_them(photos):
    train, _ = sources(photos, DataConfig(transforms=["flip"]), mode="grey", size=[4, 5])
    assert train.read(np.arange(3)).x.shape == (3, 1, 4, 5)
    grey, _ = sources(photos, mode="grey")
    file = info_of(grey).columns["file"].tolist()[3]
    batch = grey.read(np.array([3]))
    stored = Image.open(photos / "cat" / file).convert("L")
    np.testing.assert_allclose(batch.x[0, 0] * 255, np.asarray(stored), atol=0.6)


def test_folders_train_and_test_and_domains(tmp_path):
    for split, n in (("train", 4), ("val", 2)):
        for name in ("a", "b"):
            for k in range(n):
                picture(tmp_path / "one" / split / name / f"{k}.png", (5, 5))
    for name in ("b", "c"):
        for k in range(5):
            picture(tmp_path / "two" / name / f"{k}.png", (5, 5))
    train, test = sources(tmp_path / "one")
    assert (len(train), len(test)) == (8, 4)
    listed = [str(tmp_path / "one"), str(tmp_path / "two")]
    made = create_stream(StreamConfig(source="folder", experiences=listed), 0)
    assert [e.name for e in made.experiences] == ["one", "two"]
    assert made.spec.class_names == ("a", "b", "c")
    assert set(made.read(made.experiences[1].train).y.tolist()) == {1, 2}


def test_what_cannot_be_a_sample_is_named_by_its_file(photos):
    picture(photos / "cat" / "wide.png", (8, 9, 3))
    with pytest.raises(DataError, match=r"wide\.png' has shape \(3, 8, 9\).*resize"):
        [s.read(np.arange(len(s))) for s in sources(photos)]
    (photos / "cat" / "wide.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"cat/wide\.png': it is no image that Pillow knows"):
        [s.read(np.arange(len(s))) for s in sources(photos)]
    with pytest.raises(ConfigError, match=r"no option 'sizes', did you mean 'size'\?; it takes:"):
        sources(photos, sizes=4)
    with pytest.raises(ConfigError, match=r"stream\.options\.mode: input should be 'rgb', 'grey'"):
        sources(photos, mode="bgr")
    with pytest.raises(DataError, match="is no folder"):
        sources(photos / "none")


def test_bad_images_are_skipped_where_that_is_asked_for(photos):
    for k in (1, 2, 3):
        (photos / "cat" / f"{k}.png").write_bytes(b"no image")
    config = StreamConfig(source="folder", path=str(photos), experiences=2, drift="none")
    made = create_stream(config, 0, DataConfig(on_bad_sample="skip"))
    for e in made.experiences:
        for ids in (e.train, e.test):
            batch = made.read(ids)
            assert len(batch) == len(ids)
    assert len(made.info.replaced) == 6  # in both experiences


def test_a_bad_image_of_one_of_several_folders_is_replaced_and_told(photos):
    (photos / "cat" / "5.jpg").write_bytes(b"no image")
    bad, _ = sources(photos, DataConfig(on_bad_sample="skip"))
    sound, _ = sources(photos)
    row = info_of(bad).columns["file"].tolist().index("5.jpg")
    both = JoinedSource([sound, bad], ["sound", "bad"])
    assert both.info.replaces
    batch = both.read(np.array([len(sound) + row, 1, len(sound) + row + 1]))
    assert batch.ids.tolist() == [len(sound) + row + 1, 1, len(sound) + row + 1]
    assert batch.x[0].equal(batch.x[2])
