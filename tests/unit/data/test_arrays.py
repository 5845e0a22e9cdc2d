import io
import os
import pickle
import re
import shutil
import zipfile

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from distcl.config import StreamConfig
from distcl.data.sources.arrays import MAX_CLASSES, ArraySource, arrays, digits
from distcl.data.sources.npy import open_npy, open_npz
from distcl.data.stream import DriftStream, create_stream
from distcl.errors import ConfigError, DataError
from distcl.losses import judged_by
from distcl.types import Source, SourceInfo

RNG = np.random.default_rng(0)
X = RNG.random((20, 6), dtype=np.float32)
Y = np.arange(20) % 4


def npy_bytes(array, **options):
    file = io.BytesIO()
    np.save(file, array, **options)
    return file.getvalue()


def mapped(array):
    while array is not None and not isinstance(array, np.memmap):
        array = getattr(array, "base", None)
    return array is not None


# -- reading -----------------------------------------------------------------------------------


def test_digits_are_all_there_scaled_and_split_by_class():
    train, test = digits(StreamConfig(test_fraction=0.2))
    assert isinstance(train, Source)
    everything = [source.read(np.arange(len(source))) for source in (train, test)]
    assert everything[0].x.shape[1:] == (1, 8, 8)
    assert everything[0].x.dtype == torch.float32
    assert len(train) + len(test) == 1797
    both = torch.cat([batch.x for batch in everything])
    assert both.min() == 0 and both.max() == 1
    labels = torch.cat([batch.y for batch in everything]).numpy()
    x, y = load_digits(return_X_y=True)
    ours = zip(map(bytes, both.flatten(1).numpy()), labels, strict=True)
    assert sorted(ours) == sorted(zip(map(bytes, (x / 16).astype(np.float32)), y, strict=True))
    np.testing.assert_array_equal(
        torch.bincount(everything[1].y).numpy(), np.rint(0.2 * np.bincount(y))
    )
    again = digits(StreamConfig(test_fraction=0.2))[1]
    assert torch.equal(again.read(np.arange(len(again))).x, everything[1].x)


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        ("uint8", "float32"),
        ("int16", "float32"),
        ("bool", "float32"),
        ("float16", "float32"),
        ("float32", "float32"),
        ("float64", "float64"),
        (">f8", "float64"),
        (">i4", "float32"),
    ],
)
def test_types_on_reading(dtype, expected):
    x = (RNG.random((5, 3)) * 2).astype(dtype)
    batch = ArraySource(x, np.arange(5)).read(np.array([4, 1, 1]))
    want = x[[4, 1, 1]].astype(expected)
    if dtype == "uint8":
        want = want / np.float32(255)
    assert batch.x.numpy().dtype == expected
    np.testing.assert_array_equal(batch.x.numpy(), want)
    assert batch.y.tolist() == [4, 1, 1] and batch.y.dtype == torch.int64
    assert batch.ids.tolist() == [4, 1, 1] and batch.total == 3


def test_a_pytree_keeps_its_shape_and_token_ids():
    x = {
        "image": np.full((3, 2, 2), 51, np.uint8),
        "text": (np.arange(6, dtype=np.int32).reshape(3, 2), np.ones((3, 2), bool)),
    }
    batch = ArraySource(x, [0, 1, 2]).read(np.array([2]))
    assert torch.equal(batch.x["image"], torch.full((1, 2, 2), 0.2))
    tokens, mask = batch.x["text"]
    assert tokens.dtype == torch.int32 and tokens.tolist() == [[4, 5]]
    assert mask.dtype == torch.bool


def test_reading_nothing_gives_trailing_shapes():
    batch = ArraySource(X, Y).read(np.empty(0, dtype=np.int64))
    assert batch.x.shape == (0, 6) and batch.y.shape == (0,) and len(batch) == 0


def test_empty_arrays_are_refused():
    with pytest.raises(DataError, match="mine: there are no samples"):
        ArraySource(X[:0], Y[:0], "mine")
    with pytest.raises(DataError, match=r"mine: samples of shape \(0,\) are empty"):
        ArraySource(X[:, :0], Y, "mine")


@pytest.mark.parametrize("bad", [-1, 20])
def test_an_id_out_of_range_is_named(bad):
    with pytest.raises(DataError, match=rf"mine: there is no sample {bad} \(0…19\)"):
        ArraySource(X, Y, "mine").read(np.array([0, bad]))


def test_holdout_is_stratified_disjoint_and_copies_nothing():
    y = np.repeat([0, 1, 2], [50, 10, 1])
    x = np.arange(61, dtype=np.float32)[:, None]
    train, test = ArraySource(x, y).holdout(0.1)
    rows = [part.read(np.arange(len(part))).x[:, 0].int().tolist() for part in (train, test)]
    assert sorted(rows[0] + rows[1]) == list(range(61))
    assert np.bincount(test.labels, minlength=3).tolist() == [5, 1, 0]
    assert np.array_equal(train.labels, y[rows[0]])
    assert np.shares_memory(train._x, x) and np.shares_memory(test._x, x)
    nested = test.holdout(0.5)[0]
    assert set(nested.read(np.arange(len(nested))).x[:, 0].int().tolist()) < set(rows[1])


# -- files -------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("dtype", ["<f4", ">f8", "u1", "<i2", "?", "<f2"])
@pytest.mark.parametrize("write", [np.savez, np.savez_compressed])
def test_npz_members_equal_what_was_saved(tmp_path, write, dtype, order):
    x = np.asarray((RNG.random((7, 3, 2)) * 9).astype(dtype), order=order)
    write(tmp_path / "a.npz", pad=np.arange(3, dtype=np.int8), x=x, y=np.arange(7))
    found = open_npz(tmp_path / "a.npz", ("x",), ("y", "x_test"))
    assert list(found) == ["x", "y"]
    np.testing.assert_array_equal(found["x"], x)
    assert found["x"].dtype == x.dtype
    assert not mapped(found["x"])


def test_npy_files_are_mapped(tmp_path):
    np.save(tmp_path / "x.npy", X)
    found = open_npy(tmp_path / "x.npy")
    np.testing.assert_array_equal(found, X)
    assert mapped(found)


def test_npy_files_stay_mapped_when_samples_are_held_out(tmp_path):
    np.save(tmp_path / "x.npy", X.reshape(20, 2, 3))
    np.save(tmp_path / "y.npy", Y)
    train, test = arrays(StreamConfig(source="arrays", path=str(tmp_path)))
    assert mapped(train._x) and mapped(test._x)
    assert train.read(np.array([0])).x.shape == (1, 1, 2, 3)


def test_npz_with_a_test_split_and_images(tmp_path):
    images = (RNG.random((9, 4, 5)) * 255).astype(np.uint8)
    np.savez(
        tmp_path / "a.npz", x=images, y=np.arange(9) % 3, x_test=images[:4], y_test=np.arange(4) % 3
    )
    train, test = arrays(StreamConfig(source="arrays", path=str(tmp_path / "a.npz")))
    assert (len(train), len(test)) == (9, 4)
    assert train.read(np.array([8])).x.shape == (1, 1, 4, 5)
    np.testing.assert_array_equal(
        test.read(np.array([3])).x[0, 0].numpy(), images[3] / np.float32(255)
    )


def test_npy_files_with_and_without_a_test_split(tmp_path):
    config = StreamConfig(source="arrays", path=str(tmp_path), test_fraction=0.4)
    for name, array in {"x": X, "y": Y, "x_test": X[:8], "y_test": Y[:8]}.items():
        np.save(tmp_path / f"{name}.npy", array)
    assert [len(part) for part in arrays(config)] == [20, 8]
    (tmp_path / "y_test.npy").unlink()
    with pytest.raises(DataError, match="has 'x_test' but no 'y_test'"):
        arrays(config)
    (tmp_path / "x_test.npy").unlink()
    held_out = arrays(config)
    assert [len(part) for part in held_out] == [12, 8]
    assert held_out[0].read(np.array([0])).x.shape == (1, 6)


# -- bad input ---------------------------------------------------------------------------------


def with_nan():
    x = X.copy()
    x[13, 2] = np.nan
    return x


def with_inf():
    x = X.astype(np.float64)
    x[17, 0] = -np.inf
    return x


BAD_ARRAYS = {
    "nan": ({"x": with_nan(), "y": Y}, "x has a value that is NaN or infinite at row 13"),
    "inf": ({"x": with_inf(), "y": Y}, "x has a value that is NaN or infinite at row 17"),
    "lengths": ({"x": X, "y": Y[:-1]}, "x has 20 samples but y has 19 labels"),
    "negative": ({"x": X, "y": Y - 2}, "label -2 at row 0 is out of range"),
    "huge": ({"x": X, "y": Y + MAX_CLASSES - 3}, f"label {MAX_CLASSES} at row 3 is out of range"),
    "complex labels": ({"x": X, "y": Y * 1j}, "has type '<c16'; numbers are needed"),
    "column": ({"x": X, "y": Y[:, None]}, "labels have shape (20, 1); one per sample"),
    "empty": ({"x": X[:0], "y": Y[:0]}, "'x' has shape (0, 6), no data"),
    "hollow": ({"x": X[:, :0], "y": Y}, "'x' has shape (20, 0), no data"),
    "vector": ({"x": X[:, 0], "y": Y}, "x has shape (20,); [N, D]"),
    "channels last": ({"x": np.zeros((20, 8, 8, 3), "u1"), "y": Y}, "channels last; save np.move"),
    "missing y": ({"x": X, "z": Y}, "has no array 'y'; it has 'x', 'z'"),
    "object": ({"x": np.array([{}] * 20), "y": Y}, "'x' has object dtype; it would have to be unp"),
    "object y": ({"x": X, "y": np.array([{}] * 20)}, "'y' has object dtype"),
    "structured": ({"x": np.zeros(20, "f4,i4"), "y": Y}, "'x' has type 'structured'; numbers"),
    "structured object": ({"x": np.zeros(20, [("a", "O")]), "y": Y}, "'x' has type 'structured'"),
    "text": ({"x": np.full(20, "a"), "y": Y}, "'x' has type '<U1'; numbers are needed"),
    "complex": ({"x": X + 1j, "y": Y}, "'x' has type '<c8'; numbers are needed"),
    "half a test split": ({"x": X, "y": Y, "x_test": X}, "has 'x_test' but no 'y_test'"),
    "bad test split": (
        {"x": X, "y": Y, "x_test": with_nan(), "y_test": Y},
        "(x_test, y_test): x has a value that is NaN or infinite at row 13",
    ),
    "singletons": ({"x": X, "y": np.arange(20)}, "no class has two samples"),
}


@pytest.mark.parametrize("write", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("case", BAD_ARRAYS)
def test_bad_arrays_name_the_file_and_the_row(tmp_path, case, write):
    content, message = BAD_ARRAYS[case]
    path = tmp_path / "data.npz"
    write(path, **content)
    with pytest.raises(DataError, match=re.escape(message)) as caught:
        arrays(StreamConfig(source="arrays", path=str(path)))
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert caught.value.exit_code == 3


TOKENS = RNG.integers(0, 300, (20, 5))


def with_labels(row, *labels):
    y = TOKENS.copy()
    y[row] = labels
    return y


@pytest.mark.parametrize(
    ("y", "message"),
    [
        (with_labels(13, *[-100] * 5), "row 13 has no label but -100, which counts for nothing"),
        (with_labels(13, 1, 2, -7, 3, 4), "label -7 at row 13 is out of range (0…1048575, or -100"),
        (with_labels(13, 1, 2, 1 << 20, 3, 4), "label 1048576 at row 13 is out of range"),
    ],
)
def test_labels_by_position_name_the_row_of_the_file(tmp_path, monkeypatch, y, message):
    """Not that of what is left to train on."""
    monkeypatch.setattr("distcl.data.sources.arrays._CHUNK_BYTES", 3 * 40)
    np.savez(tmp_path / "a.npz", x=TOKENS, y=y)
    with pytest.raises(DataError, match=re.escape(f"a.npz': {message}")):
        arrays(StreamConfig(source="arrays", path=str(tmp_path / "a.npz")))


def test_labels_by_position_are_learned_without_a_read(monkeypatch):
    y = with_labels(4, 1, 2, 3, -100, 700)
    read = ArraySource.read

    def some(self, ids):
        assert len(ids) == 0
        return read(self, ids)

    monkeypatch.setattr(ArraySource, "read", some)
    made = DriftStream(
        ArraySource(TOKENS, y), ArraySource(TOKENS, y), StreamConfig(drift="none"), 0
    )
    assert made.spec.classes == 701 and made.spec.y_shape == (5,) and made.spec.lone == ""


@pytest.mark.parametrize("own", [False, True])
def test_a_sample_without_a_token_to_foretell_is_named(tmp_path, own):
    y = with_labels(13, 7, *[-100] * 4)
    name = "sample 13 of the train source" if own else "'mine': row 13"

    class Own(ArraySource):
        info = SourceInfo()

    source = (Own if own else ArraySource)(TOKENS, y, "'mine'")
    spec = DriftStream(source, source, StreamConfig(drift="none"), 0).spec
    assert judged_by("cross_entropy", spec) == "accuracy"  # one label is enough of one
    with pytest.raises(DataError, match=re.escape(f"{name} has no token to foretell")):
        judged_by("next_token", spec)


@pytest.mark.parametrize("kind", ["u2", "<u4", ">u2", ">i4"])
def test_token_ids_stay_integers_in_whatever_type_they_are_stored(tmp_path, kind):
    np.savez(tmp_path / "a.npz", x=TOKENS.astype(kind), y=TOKENS)
    train, _ = arrays(StreamConfig(source="arrays", path=str(tmp_path / "a.npz")))
    batch = train.read(np.arange(len(train)))
    assert not batch.x.is_floating_point() and torch.equal(batch.x.long(), batch.y)
    images = ArraySource(RNG.integers(0, 999, (3, 1, 4, 4)).astype("u2"), np.zeros((3, 4, 4), int))
    assert images.read(np.arange(3)).x.dtype == torch.float32  # and images become what they did


def test_a_row_in_a_later_chunk_is_named(monkeypatch):
    monkeypatch.setattr("distcl.data.sources.arrays._CHUNK_BYTES", 5 * 24)
    with pytest.raises(DataError, match=r"at row 13$"):
        ArraySource(with_nan(), Y)


def test_bad_files_are_named(tmp_path):
    good, npy = tmp_path / "good.npz", tmp_path / "x.npy"
    np.savez(good, x=X, y=Y)
    np.save(npy, X)
    text = tmp_path / "text.npz"
    text.write_text("x,y\n1,2\n")
    encrypted = tmp_path / "encrypted.npz"
    raw = bytearray(good.read_bytes())
    raw[raw.index(b"PK\x01\x02") + 8] |= 1
    encrypted.write_bytes(raw)
    odd = tmp_path / "odd.npz"
    with zipfile.ZipFile(odd, "w", zipfile.ZIP_BZIP2) as archive:
        archive.writestr("x.npy", npy_bytes(X))
        archive.writestr("y.npy", npy_bytes(Y))
    for path, message in {
        tmp_path / "absent.npz": "does not exist",
        text: "is not an .npz file",
        npy: "is not an .npz file",
        encrypted: "'x' is encrypted",
        odd: "'x' is compressed in a way that numpy does not write",
    }.items():
        with pytest.raises(DataError, match=message) as caught:
            arrays(StreamConfig(source="arrays", path=str(path)))
        assert str(path) in str(caught.value)
    with pytest.raises(DataError, match=r"y\.npy' does not exist"):
        arrays(StreamConfig(source="arrays", path=str(tmp_path)))
    shutil.copy(good, tmp_path / "y.npy")
    with pytest.raises(DataError, match=r"y\.npy' is not an \.npy"):
        arrays(StreamConfig(source="arrays", path=str(tmp_path)))


def test_arrays_need_a_path():
    with pytest.raises(ConfigError, match=r"needs stream\.path: an \.npz, or a folder"):
        arrays(StreamConfig(source="arrays"))


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


@pytest.mark.parametrize("as_npz", [True, False])
def test_a_pickle_is_never_loaded(tmp_path, monkeypatch, as_npz):
    monkeypatch.chdir(tmp_path)
    bombs = np.array([Bomb()] * 3, dtype=object)
    np.savez("a.npz", x=bombs, y=np.arange(3))
    np.save("x.npy", bombs)
    np.save("y.npy", np.arange(3))
    (tmp_path / "raw.npy").write_bytes(pickle.dumps(Bomb()))
    path = "a.npz" if as_npz else "."
    with pytest.raises(DataError, match="unpickled, which is refused"):
        arrays(StreamConfig(source="arrays", path=path))
    with pytest.raises(DataError, match=r"not an \.npy"):
        open_npy(tmp_path / "raw.npy")
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("write", [np.savez, np.savez_compressed])
def test_every_truncation_of_an_npz_is_refused(tmp_path, write):
    write(tmp_path / "whole.npz", x=X, y=Y)
    whole = (tmp_path / "whole.npz").read_bytes()
    part = tmp_path / "part.npz"
    for size in range(0, len(whole), 7):
        part.write_bytes(whole[:size])
        with pytest.raises(DataError, match=r"part\.npz' is (truncated|not an \.npz)"):
            open_npz(part, ("x", "y"), ())


def test_every_truncation_of_an_npy_is_refused(tmp_path):
    whole = npy_bytes(X)
    part = tmp_path / "part.npy"
    for size in range(0, len(whole), 7):
        part.write_bytes(whole[:size])
        with pytest.raises(DataError, match=r"part\.npy'"):
            open_npy(part)


def test_a_bit_that_changed_in_the_data_of_an_npz_is_refused(tmp_path):
    np.savez(tmp_path / "a.npz", x=X, y=Y)
    raw = bytearray((tmp_path / "a.npz").read_bytes())
    raw[raw.index(X.tobytes()) + 5] ^= 1
    (tmp_path / "a.npz").write_bytes(raw)
    with pytest.raises(DataError, match=r"'x' is truncated or damaged \(Bad CRC"):
        open_npz(tmp_path / "a.npz", ("x", "y"), ())


@pytest.mark.parametrize("write", [np.savez, np.savez_compressed])
def test_flipped_bits_give_an_array_or_our_own_error(tmp_path, write):
    write(tmp_path / "whole.npz", x=X, y=Y)
    whole = (tmp_path / "whole.npz").read_bytes()
    rng = np.random.default_rng(5)
    structure = [i for i in range(len(whole)) if i < 200 or i > len(whole) - 200]
    refused = 0
    for _ in range(600):
        raw = bytearray(whole)
        for at in rng.choice(structure, size=rng.integers(1, 4)):
            raw[at] ^= 1 << rng.integers(8)
        (tmp_path / "flipped.npz").write_bytes(raw)
        try:
            found = open_npz(tmp_path / "flipped.npz", ("x", "y"), ())
        except DataError:
            refused += 1
        else:
            assert found["x"].nbytes + found["y"].nbytes <= 1 << 16
    assert refused > 100


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ("(1000000000000, 1000000000000)", "is truncated: 48 of"),
        ("(99999999999999999999,)", "damaged .npy header"),
        ("(1 2)", "damaged .npy header"),
        ("(-1, 2)", "damaged .npy header"),
        (f"({'1, ' * 20})", "damaged .npy header"),
        (f"({'1' * 9000}", "damaged .npy header"),
        ("(100000000000000000, 100000000000000000, 0)", "no data"),
        ("__import__('os').mkdir('exploded')", "damaged .npy header"),
    ],
)
@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_header_that_lies_is_refused(tmp_path, monkeypatch, shape, message, compression):
    monkeypatch.chdir(tmp_path)
    text = f"{{'descr': '<f8', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    raw = b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + bytes(48)
    (tmp_path / "x.npy").write_bytes(raw)
    with zipfile.ZipFile(tmp_path / "a.npz", "w", compression) as archive:
        archive.writestr("x.npy", raw)
    with pytest.raises(DataError, match=message):
        open_npy(tmp_path / "x.npy")
    with pytest.raises(DataError, match=message):
        open_npz(tmp_path / "a.npz", ("x",), ())
    assert not (tmp_path / "exploded").exists()


def test_newer_npy_versions_are_read(tmp_path):
    for version in ((1, 0), (2, 0), (3, 0)):
        with (tmp_path / "x.npy").open("wb") as file:
            np.lib.format.write_array(file, X, version=version)
        np.testing.assert_array_equal(open_npy(tmp_path / "x.npy"), X)


def test_experiences_are_stretches_of_the_rows_in_order(tmp_path):
    x = np.arange(100, dtype=np.float32)[:, None]
    np.savez(tmp_path / "a.npz", x=x, y=np.zeros(100, dtype=np.int64))
    config = StreamConfig(
        source="arrays",
        path=str(tmp_path / "a.npz"),
        drift="none",
        experiences=4,
        options={"experiences": "order"},
    )
    stream = create_stream(config, 0)
    for e, experience in enumerate(stream.experiences):
        rows = stream.read(np.concatenate([experience.train, experience.test])).x
        assert sorted(rows.flatten().tolist()) == list(range(25 * e, 25 * e + 25))
        assert len(experience.test) > 0
    with pytest.raises(ConfigError, match="'time', but source 'arrays' knows 'order' only"):
        arrays(config, experiences="time")
