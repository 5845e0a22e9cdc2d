"""``data.transforms`` over every source: random ones in training batches only, by id and epoch."""

import pickle
import re

import numpy as np
import pytest
import torch
from PIL import Image

from distcl.config import DataConfig, StreamConfig
from distcl.data.loader import BatchLoader
from distcl.data.shards.inputs import open_samples
from distcl.data.shards.writer import write_shards
from distcl.data.sources.arrays import ArraySource
from distcl.data.stream import create_sources, create_stream
from distcl.data.transforms import Transforms, training_view
from distcl.errors import ConfigError, DataError
from distcl.sampling.groups import Part
from distcl.sampling.sampler import DistributedWeightedSampler
from distcl.types import Batch
from tests.files import CIFAR10, write_cifar, write_mnist

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (40, 3, 6, 6)).astype(np.uint8)
MEAN, STD = [0.1, 0.2, 0.3], [0.5, 0.5, 2.0]
RANDOM = [
    {"name": "crop", "size": 5, "pad": 1, "random": True},
    "flip",
    {"name": "normalize", "mean": MEAN, "std": STD},
]


def plain(image: np.ndarray) -> np.ndarray:
    """What RANDOM makes of an image [3, H, W] in [0, 1] where nothing is random."""
    return looked_at(image, None)


def looked_at(image: np.ndarray, rng: np.random.Generator | None) -> np.ndarray:
    image = np.pad(image, ((0, 0), (1, 1), (1, 1)))
    spare = np.array(image.shape[1:]) - 5
    down, right = spare // 2 if rng is None else rng.integers(0, spare + 1)
    image = image[:, down : down + 5, right : right + 5]
    if rng is not None and rng.random() < 0.5:
        image = image[:, :, ::-1]
    mean, std = (np.array(v, np.float32)[:, None, None] for v in (MEAN, STD))
    return (image - mean) / std


class Own:
    """A source of one's own, of one tensor or of a dict of one."""

    def __init__(self, named: bool = False) -> None:
        self.named = named

    def __len__(self) -> int:
        return len(IMAGES)

    def read(self, ids: np.ndarray) -> Batch:
        x = torch.from_numpy(IMAGES[ids] / np.float32(255))
        y = torch.from_numpy(ids % 4).double()[:, None]
        return Batch(torch.from_numpy(ids), {"image": x} if self.named else x, y, len(ids))


def own(config: StreamConfig) -> tuple[Own, Own]:
    return Own(), Own()


def own_by_name(config: StreamConfig) -> tuple[Own, Own]:
    return Own(named=True), Own(named=True)


def vectors(config: StreamConfig) -> tuple[ArraySource, ArraySource]:
    source = ArraySource(np.ones((8, 5), np.float32), np.arange(8) % 2)
    return source, source


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """The same kind of images behind every source; path by source."""
    folder = tmp_path_factory.mktemp("sources")
    held_out = {"x_test": IMAGES[:8], "y_test": np.arange(8) % 4}
    np.savez(folder / "a.npz", x=IMAGES, y=np.arange(40) % 4, **held_out)
    write_shards(open_samples(str(folder / "a.npz")), folder / "shards", per_shard=15)
    np.save(folder / "x.npy", IMAGES)
    np.save(folder / "y.npy", np.arange(40) % 4)
    write_cifar(folder / "cifar", 10, CIFAR10)
    (folder / "mnist").mkdir()
    write_mnist(folder / "mnist")
    return folder


SOURCES = [
    *("arrays", "npy", "digits", "mnist", "cifar10", "hf"),
    *("indexed", "stream", f"{__name__}:own", f"{__name__}:own_by_name"),
]


def opened(places, source, transforms, **keys):
    path = {"arrays": "a.npz", "mnist": "mnist", "cifar10": "cifar", "hf": "hf"}.get(source, "")
    data, name = DataConfig(transforms=transforms, **keys), source
    options = {"path": str(places / path)} if path else {}
    if source in ("indexed", "stream"):
        name, options = "shards", {"path": str(places / "shards")}
        data = data.model_copy(update={"access": source})
    if source == "npy":
        name, options = "arrays", {"path": str(places)}
    if source == "hf":
        datasets = pytest.importorskip("datasets", reason="the extra 'data' is not installed")
        if not (places / "hf").exists():
            kinds = {"image": datasets.Image(), "label": datasets.Value("int64")}
            rows = {"image": list(np.moveaxis(IMAGES, 1, -1)), "label": [0, 1, 2, 3] * 10}
            table = datasets.Dataset.from_dict(rows, features=datasets.Features(kinds))
            table.save_to_disk(str(places / "hf"))
    return StreamConfig(source=name, drift="none", experiences=1, **options), data


def tensor(x):
    return x["image"].numpy() if isinstance(x, dict) else x.numpy()


@pytest.mark.parametrize("source", SOURCES)
def test_transforms_apply_to_every_source(places, source):
    raw, raw_test = create_sources(*opened(places, source, ["to_rgb"]))
    made, test = create_sources(*opened(places, source, ["to_rgb", *RANDOM]))
    ids = np.array([3, 0, 5, 3])
    images, got = tensor(raw.read(ids).x), made.read(ids)
    assert isinstance(got.x, dict) == source.endswith("by_name")
    assert torch.equal(got.y, raw.read(ids).y) and got.ids.tolist() == ids.tolist()
    np.testing.assert_allclose(tensor(got.x), [plain(image) for image in images], rtol=1e-6)
    held_out = tensor(raw_test.read(ids).x)
    np.testing.assert_allclose(tensor(test.read(ids).x), [*map(plain, held_out)], rtol=1e-6)
    assert tensor(made.read(ids[:0]).x).shape == (0, 3, 5, 5)
    for epoch in range(2):
        view = (7, 2, epoch)
        with training_view(view):
            got = made.read(ids)
        expected = [
            looked_at(image, np.random.default_rng([*view, int(i)]))
            for image, i in zip(images, ids, strict=True)
        ]
        np.testing.assert_allclose(tensor(got.x), expected, rtol=1e-6)
    copy = pickle.loads(pickle.dumps(made))
    np.testing.assert_array_equal(tensor(copy.read(ids).x), tensor(made.read(ids).x))


@pytest.mark.parametrize("source", SOURCES)
def test_an_unknown_transform_is_refused_whatever_the_source(places, source):
    config, data = opened(places, source, [])
    for transforms, message in (
        ([{"name": "crop", "side": 3}], "no option 'side'"),
        ([{"name": f"{__name__}:mask", "share": 0.5}], "unexpected keyword argument 'share'"),
    ):
        with pytest.raises(ConfigError, match=message):
            create_sources(config, data.model_copy(update={"transforms": transforms}))
    with pytest.raises(ValueError, match="unknown transform 'crap', did you mean 'crop'"):
        opened(places, source, ["crap"])


@pytest.mark.parametrize("name", ["flip", "to_rgb", {"name": "resize", "size": 3}])
def test_a_transform_of_images_is_refused_where_there_are_none(name):
    config = StreamConfig(source=f"{__name__}:vectors", drift="none", experiences=1)
    with pytest.raises(ConfigError, match=r"needs images \[C, H, W\], but samples have 'x' \[5\]"):
        create_stream(config, 0, DataConfig(transforms=[name]))


def mask(sample, rng=None):
    """A random transform of one's own: nothing is drawn where the plain sample is asked for."""
    x = sample["x"].copy()
    if rng is not None:
        x[rng.random(x.shape) < 0.5] = 0
    return sample | {"x": x}


@pytest.mark.parametrize("workers", [0, 2])
def test_training_batches_differ_by_epoch_and_are_equal_in_any_process(workers):
    """By a reference: each draw of a sample in an epoch looks the same, in the next it does not."""
    source = f"{__name__}:own"
    config = StreamConfig(source=source, drift="none", experiences=2)
    transforms = [*RANDOM, f"{__name__}:mask"]
    made = create_stream(config, 0, DataConfig(transforms=transforms))
    sampler = DistributedWeightedSampler(16, seed=5, num_samples=60, round_index=3)
    sampler.set_weights(made.experiences[1].train, np.arange(40) + 1.0)
    loader = BatchLoader(made, sampler, workers=workers)
    seen: dict[tuple[int, int], np.ndarray] = {}
    for epoch in range(2):
        sampler.set_epoch(epoch)
        for batch in loader:
            for id_, x in zip(batch.ids.tolist(), batch.x.numpy(), strict=True):
                row = id_ & 0xFFFF
                rng = np.random.default_rng([5, 3, epoch, row])
                expected = looked_at(IMAGES[row] / np.float32(255), rng)
                expected = np.where(rng.random(expected.shape) < 0.5, 0, expected)
                np.testing.assert_allclose(x, expected, rtol=1e-6)
                seen[epoch, row] = x
    both = [row for epoch, row in seen if epoch == 0 and (1, row) in seen]
    assert len(both) > 10
    assert all(not np.array_equal(seen[0, row], seen[1, row]) for row in both)
    assert Transforms(transforms).random == ["crop", "flip", f"{__name__}:mask"]


def test_a_plan_in_windows_counts_its_passes():
    plan = DistributedWeightedSampler(
        8, window=5, num_samples=88, seed=1, draw="systematic", round_index=4
    )
    plan.set_groups([Part(np.arange(n), None, draws=n) for n in (30, 10)])
    assert [plan.view(step) for step in (0, 4, 5, 9, 10)] == [(1, 4, k) for k in (0, 0, 1, 1, 2)]


def test_resize_scales_as_pillow_does():
    image = RNG.random((3, 20, 31)).astype(np.float32)
    for options, size in (
        ({"size": 8}, (8, 8)),
        ({"size": [9, 40]}, (9, 40)),
        ({"size": 10, "keep_aspect": True}, (10, 16)),
    ):
        sample = {"x": image, "cls": 0}
        found = Transforms([{"name": "resize", **options}])(sample, "", 0)["x"]
        assert found.shape == (3, *size) and found.dtype == np.float32
        bands = [
            Image.fromarray(band).resize(size[::-1], Image.Resampling.BILINEAR) for band in image
        ]
        np.testing.assert_allclose(found, np.stack([np.asarray(b) for b in bands]), atol=1e-4)
    for options in (
        {"size": 0},
        {"size": [3]},
        {"size": 2.5},
        {"size": [2, 3], "keep_aspect": True},
    ):
        with pytest.raises(ConfigError, match="transform 'resize'"):
            Transforms([{"name": "resize", **options}])


def test_options_of_the_wrong_kind_are_refused_by_name():
    for options, told in (
        ({"name": "crop", "size": 0}, "transform 'crop'.options.size: input should be greater"),
        ({"name": "crop", "size": 3, "pad": -1}, "transform 'crop'.options.pad"),
        ({"name": "normalize", "mean": "x", "std": [1.0]}, "transform 'normalize'.options.mean"),
        ({"name": "normalize", "mean": [0.5], "std": [float("nan")]}, "'normalize'.options.std"),
    ):
        with pytest.raises(ConfigError, match=told):
            Transforms([options])


def test_to_rgb_gives_three_channels():
    image = RNG.random((4, 2, 3)).astype(np.float32)
    made = Transforms(["to_rgb"])
    for channels, expected in ((1, image[[0, 0, 0]]), (2, image[[0, 0, 0]]), (3, image[:3])):
        found = made({"x": image[:channels], "cls": 0}, "", 0)["x"]
        np.testing.assert_array_equal(found, expected)
    with pytest.raises(DataError, match="5 channels cannot become RGB"):
        made({"x": np.zeros((5, 2, 2)), "cls": 0}, "", 0)


@pytest.mark.parametrize("access", ["indexed", "stream", "hf"])
def test_images_of_different_sizes_are_named_and_can_be_resized(tmp_path, monkeypatch, access):
    """Also where each batch by itself has one size only."""
    shapes = [(6, 6, 3), (6, 6, 3), (7, 6, 3), (6, 6), (9, 5), (6, 6, 3)]
    for k, shape in enumerate(shapes):
        kind = "jpg" if k % 2 else "png"
        for split in ("train", "test"):
            folder = tmp_path / "images" / split / ("a", "b")[k % 2]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full(shape, 40 * k, np.uint8)).save(folder / f"{k}.{kind}")
    if access == "hf":
        datasets = pytest.importorskip("datasets", reason="the extra 'data' is not installed")
        datasets.disable_progress_bars()
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
        config = StreamConfig(source="hf", path=str(tmp_path / "images"), drift="none")
    else:
        write_shards(open_samples(str(tmp_path / "images")), tmp_path / "s", per_shard=2)
        config = StreamConfig(source="shards", path=str(tmp_path / "s"), drift="none")
    keys = {} if access == "hf" else {"access": access}
    train, _ = create_sources(config, DataConfig(**keys))
    train.read(np.array([0]))
    said = []
    for id_ in range(1, 6):
        try:
            train.read(np.array([id_]))
        except DataError as error:
            said.append(str(error))
    assert len(said) == 3
    assert sum("data.transforms has resize" in text for text in said) == 1
    assert sum("data.transforms has to_rgb and resize" in text for text in said) == 1
    assert sum(text.endswith("data.transforms has to_rgb") for text in said) == 1
    assert all(re.search(r"sample \d has shape .*, but of sample 0 it has", text) for text in said)
    data = DataConfig(transforms=["to_rgb", {"name": "resize", "size": 4}], **keys)
    assert create_sources(config, data)[0].read(np.arange(6)).x.shape == (6, 3, 4, 4)


def void(sample):
    """255 stands for no class in some maps of classes."""
    return sample | {"cls": np.where(sample["cls"] == 255, -100, sample["cls"])}


def test_labels_by_position_are_counted_as_transforms_leave_them(tmp_path):
    maps = RNG.integers(0, 4, (40, 6, 6))
    maps[:, 0] = 255
    np.savez(tmp_path / "a.npz", x=IMAGES, y=maps)
    config = StreamConfig(source="arrays", path=str(tmp_path / "a.npz"), drift="none")
    made = create_stream(config, 0, DataConfig(transforms=[f"{__name__}:void"]))
    assert made.spec.classes == 4 and create_stream(config, 0).spec.classes == 256
