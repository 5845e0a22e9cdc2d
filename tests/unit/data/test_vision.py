"""Files that people have: MNIST's IDX, CIFAR's binary version, and their checksums."""

import gzip
import hashlib
import pickle
import re

import numpy as np
import pytest
import torch

from distcl.config import Config, StreamConfig
from distcl.config.load import load_config
from distcl.data.sources.vision import cifar10, cifar100, mnist, open_idx
from distcl.data.stream import create_stream
from distcl.errors import ConfigError, DataError
from tests.files import CIFAR10, CIFAR100, IMAGES, LABELS, RNG, idx_bytes, write_cifar, write_mnist

# -- IDX ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dash", "pack"), [("-", False), (".", False), ("-", True)])
def test_mnist_files_are_read(tmp_path, dash, pack):
    train, test = mnist(write_mnist(tmp_path, dash=dash, pack=pack))
    assert (len(train), len(test)) == (40, 20)
    for source, start in ((train, 0), (test, 40)):
        batch = source.read(np.array([3, 0, 3]))
        rows = start + np.array([3, 0, 3])
        assert batch.x.shape == (3, 1, 7, 5) and batch.x.dtype == torch.float32
        np.testing.assert_array_equal(batch.x[:, 0].numpy(), IMAGES[rows] / np.float32(255))
        assert batch.y.tolist() == LABELS[rows].tolist()


def test_a_stream_of_mnist_drifts(tmp_path):
    config = write_mnist(tmp_path).model_copy(update={"drift": "rotate", "experiences": 2})
    stream = create_stream(config, 0)
    assert stream.spec.x_shape == (1, 7, 5) and stream.spec.classes == 10
    assert stream.read(stream.experiences[1].train).x.shape == (40, 1, 7, 5)


@pytest.mark.parametrize("dtype", ["u1", "i1", "i2", "i4", "f4", "f8"])
@pytest.mark.parametrize("shape", [(3,), (2, 3), (2, 3, 4, 1)])
@pytest.mark.parametrize("pack", [False, True])
def test_idx_files_of_every_type_are_read_and_mapped(tmp_path, dtype, shape, pack):
    array = (RNG.random(shape) * 100 - (dtype != "u1") * 50).astype(dtype)
    path = tmp_path / ("data.gz" if pack else "data")
    path.write_bytes(gzip.compress(idx_bytes(array)) if pack else idx_bytes(array))
    found = open_idx(path, len(shape))
    np.testing.assert_array_equal(found, array)
    assert not found.flags.writeable


GOOD = idx_bytes(IMAGES)
BAD_IDX = {
    "empty": (b"", r"has magic number 0x, but an IDX file .* 0x00000803"),
    "labels instead": (idx_bytes(LABELS), r"has magic number 0x00000801, but .* 0x00000803"),
    "another type": (b"\0\0\x07\x03" + GOOD[4:], "has magic number 0x00000703"),
    "a picture": (b"\x89PNG" + GOOD[4:], "has magic number 0x89504e47"),
    "short header": (GOOD[:9], "is truncated: its header is incomplete"),
    "truncated": (GOOD[:-7], "is truncated: 2093 of 2100 bytes of data are there"),
    "too long": (GOOD + b"x", r"is longer than its header says: 2100 bytes .*\(60, 7, 5\)"),
    "no samples": (GOOD[:4] + bytes(12), r"has shape \(0, 0, 0\), no data"),
    "a huge claim": (GOOD[:4] + b"\xff" * 12 + GOOD[16:], "is truncated: 2100 of 79228162458924"),
}


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("case", BAD_IDX)
def test_a_damaged_idx_file_is_named(tmp_path, case, pack):
    content, message = BAD_IDX[case]
    config = write_mnist(tmp_path, pack=pack)
    name = "t10k-images-idx3-ubyte" + ".gz" * pack
    (tmp_path / name).write_bytes(gzip.compress(content) if pack else content)
    with pytest.raises(DataError, match=message) as caught:
        mnist(config)
    assert f"'{tmp_path / name}'" in str(caught.value)


@pytest.mark.parametrize(
    "damage", [lambda b: b[:-20], lambda b: b[5:], lambda b: b[:40] + b"?" * 9]
)
def test_a_damaged_gzip_is_named(tmp_path, damage):
    config = write_mnist(tmp_path, pack=True)
    path = tmp_path / "train-labels-idx1-ubyte.gz"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=re.escape(str(path)) + "' is truncated or damaged"):
        mnist(config)


def test_mnist_files_that_are_absent_or_do_not_match_are_named(tmp_path):
    with pytest.raises(ConfigError, match=r"source = 'mnist' needs stream\.path"):
        mnist(StreamConfig(source="mnist"))
    with pytest.raises(DataError, match=r"nowhere' is neither a folder nor an \.npz"):
        mnist(StreamConfig(source="mnist", path=str(tmp_path / "nowhere")))
    config = write_mnist(tmp_path)
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx_bytes(LABELS[:39]))
    with pytest.raises(DataError, match=r"train-images.*x has 40 samples but y has 39 labels"):
        mnist(config)
    (tmp_path / "train-labels-idx1-ubyte").unlink()
    with pytest.raises(DataError, match=r"has no 'train-labels-idx1-ubyte', nor one with \.gz"):
        mnist(config)


@pytest.mark.parametrize("names", ["x y", "x_train y_train"])
@pytest.mark.parametrize("source", ["mnist", "arrays"])
def test_an_npz_may_name_its_arrays_as_keras_does(tmp_path, names, source):
    x, y = names.split()
    path = tmp_path / "mnist.npz"
    arrays = {x: IMAGES[:40], y: LABELS[:40], "x_test": IMAGES[40:], "y_test": LABELS[40:]}
    np.savez(path, **arrays)
    stream = create_stream(StreamConfig(source=source, path=str(path), drift="rotate"), 0)
    assert stream.spec.x_shape == (1, 7, 5) and len(stream.experiences[0].train) == 40
    ids = stream.experiences[0].test
    assert torch.equal(stream.read(ids).y, torch.from_numpy(LABELS[40:].astype(np.int64)))
    arrays.pop(y)
    np.savez(path, **arrays)
    with pytest.raises(DataError, match=f"mnist.npz' has no array '{y}'; it has '{x}'"):
        create_stream(StreamConfig(source=source, path=str(path)), 0)


# -- CIFAR -------------------------------------------------------------------------------------


@pytest.mark.parametrize("inner", ["", "cifar-10-batches-bin"])
def test_cifar10_is_read(tmp_path, inner):
    content = write_cifar(tmp_path / inner, 10, CIFAR10)
    train, test = cifar10(StreamConfig(source="cifar10", path=str(tmp_path)))
    labels, images = content["data_batch_2.bin"]
    batch = train.read(np.array([20, 49]))  # the first and last of the second file
    np.testing.assert_array_equal(batch.x.numpy(), images[[0, 29]] / np.float32(255))
    assert batch.y.tolist() == labels[[0, 29]].tolist()
    assert (len(train), len(test)) == (50, 10)


def test_cifar100_has_fine_labels(tmp_path):
    content = write_cifar(tmp_path, 100, CIFAR100)
    train, test = cifar100(StreamConfig(source="cifar100", path=str(tmp_path)))
    assert train.labels.tolist() == content["train.bin"][0].tolist()
    batch = test.read(np.array([7]))
    np.testing.assert_array_equal(batch.x[0].numpy(), content["test.bin"][1][7] / np.float32(255))


def test_damaged_cifar_files_are_named(tmp_path):
    config = StreamConfig(source="cifar10", path=str(tmp_path))
    with pytest.raises(DataError, match=r"has no 'data_batch_1\.bin'"):
        cifar10(config)
    write_cifar(tmp_path, 10, CIFAR10)
    path = tmp_path / "data_batch_2.bin"
    whole = path.read_bytes()
    for bad in (whole[:-1], b"", whole + b"x"):
        path.write_bytes(bad)
        with pytest.raises(DataError, match=rf"data_batch_2\.bin' has {len(bad)} bytes.* of 3073"):
            cifar10(config)
    path.write_bytes(whole[: 3073 * 4] + b"\x0a" + whole[3073 * 4 + 1 :])
    with pytest.raises(DataError, match=r"data_batch_2\.bin': label 10 at row 4 is out of range"):
        cifar10(config)
    path.write_bytes(whole)
    (tmp_path / "test_batch.bin").unlink()
    with pytest.raises(DataError, match=r"test_batch\.bin' does not exist"):
        cifar10(config)


def test_pickled_cifar_is_refused_with_advice_and_never_opened(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (tmp_path.joinpath("boom").touch, ())

    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "data_batch_1").write_bytes(pickle.dumps(Bomb()))
    config = StreamConfig(source="cifar10", path=str(folder))
    with pytest.raises(DataError, match=r"pickled .* refused: take .* cifar-10-binary\.tar\.gz"):
        cifar10(config)
    (tmp_path / "cifar-10-batches-py").mkdir()
    (tmp_path / "cifar-10-batches-py" / "batches.meta").touch()
    with pytest.raises(DataError, match="pickled"):
        cifar10(config.model_copy(update={"path": str(tmp_path)}))
    with pytest.raises(DataError, match=r"pickled .* cifar-100-binary\.tar\.gz"):
        cifar100(config.model_copy(update={"path": str(tmp_path / "cifar-100-python.tar.gz")}))
    archive = tmp_path / "cifar-10-binary.tar.gz"
    archive.touch()
    with pytest.raises(DataError, match="is a file; unpack it and give its folder"):
        cifar10(config.model_copy(update={"path": str(archive)}))
    with pytest.raises(ConfigError, match=r"'cifar10' needs stream\.path"):
        cifar10(StreamConfig(source="cifar10"))
    with pytest.raises(DataError, match="nowhere' is not a folder"):
        cifar10(config.model_copy(update={"path": str(tmp_path / "nowhere")}))
    assert not (tmp_path / "boom").exists()


# -- checksums ---------------------------------------------------------------------------------


def test_a_wrong_checksum_names_the_file(tmp_path):
    config = write_mnist(tmp_path)
    name = "train-images-idx3-ubyte"
    digest = hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()
    for right in (digest, digest.upper()):
        create_stream(config.model_copy(update={"sha256": {name: right}}), 0)
    with pytest.raises(DataError, match=f"{name}' has SHA-256 {digest}, but .* says {'0' * 64}"):
        create_stream(config.model_copy(update={"sha256": {name: "0" * 64}}), 0)
    with pytest.raises(DataError, match="no-such-file' does not exist"):
        create_stream(config.model_copy(update={"sha256": {"no-such-file": digest}}), 0)
    np.savez(tmp_path / "all.npz", x=IMAGES, y=LABELS)
    one = StreamConfig(source="arrays", path=str(tmp_path / "all.npz"), sha256={"all.npz": digest})
    with pytest.raises(DataError, match=r"all\.npz' has SHA-256"):
        create_stream(one, 0)


def test_a_checksum_is_given_in_toml_and_checked_for_its_form(tmp_path):
    path = tmp_path / "c.toml"
    path.write_text(f'[stream.sha256]\n"train-images" = "{"a" * 64}"\n')
    assert load_config(path).stream.sha256 == {"train-images": "a" * 64}
    path.write_text('[stream.sha256]\n"train-images" = "abc"\n')
    with pytest.raises(
        ConfigError, match=r"stream\.sha256: 'abc' of 'train-images' is not 64 hexa"
    ):
        load_config(path)
    assert Config().stream.sha256 == {}
