"""The one decoder of images: every mode, upright, and the same from every source."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from distcl.config import DataConfig, StreamConfig
from distcl.data.images import decode_image, pixels
from distcl.data.shards.inputs import open_samples
from distcl.data.shards.open import shards
from distcl.data.shards.writer import write_shards
from distcl.data.sources.huggingface import HFSource
from distcl.data.stream import create_sources
from distcl.data.transforms import Transforms

RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 256, (6, 9)).astype(np.uint8)
RGB = RNG.integers(0, 256, (6, 9, 3)).astype(np.uint8)
ALPHA = RNG.integers(0, 256, (6, 9, 1)).astype(np.uint8)


def first(colours: np.ndarray) -> np.ndarray:
    return np.moveaxis(colours, -1, 0)


def encoded(image: Image.Image, kind: str = "png", **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def palette(mode: str = "P") -> Image.Image:
    """Nine colours, which differ from their numbers; 54 pixels."""
    image = Image.frombytes("P", (9, 6), bytes(range(9)) * 6)
    image.putpalette(RGB[0].tobytes())
    return image.convert(mode) if mode != "P" else image


COLOURS = first(np.tile(RGB[0][None], (6, 1, 1)))
FILES = {
    "L": (Image.fromarray(GREY), "png", GREY[None]),
    "LA": (Image.fromarray(np.dstack([GREY, ALPHA[..., 0]]), "LA"), "png", GREY[None]),
    "1": (Image.fromarray(GREY > 127), "png", np.where(GREY > 127, 255, 0)[None]),
    "I;16": (Image.fromarray(GREY.astype(np.uint16) * 257), "png", GREY[None]),
    "I;16B": (Image.fromarray((GREY.astype(np.uint16) * 257).astype(">u2")), "tiff", GREY[None]),
    "I": (Image.fromarray(GREY.astype(np.int32) * 257), "tiff", GREY[None]),
    "F": (Image.fromarray(GREY / np.float32(255)), "tiff", GREY[None]),
    "RGB": (Image.fromarray(RGB), "png", first(RGB)),
    "RGBA": (Image.fromarray(np.dstack([RGB, ALPHA])), "png", first(RGB)),
    "RGBX": (Image.fromarray(np.dstack([RGB, ALPHA]), "RGBX"), "tiff", first(RGB)),
    "P": (palette(), "png", COLOURS),
    "PA": (palette("PA"), None, COLOURS),
    "YCbCr": (Image.fromarray(RGB).convert("YCbCr"), "tiff", None),
    "HSV": (Image.fromarray(RGB).convert("HSV"), None, None),
    "LAB": (Image.fromarray(RGB).convert("LAB"), "tiff", None),
    "CMYK": (Image.fromarray(RGB).convert("CMYK"), "tiff", first(RGB)),
}


@pytest.mark.parametrize("mode", FILES)
def test_an_image_is_the_same_in_every_mode(mode):
    image, kind, expected = FILES[mode]
    assert image.mode == mode
    found = pixels(image.copy()) if kind is None else decode_image(encoded(image, kind))
    assert found.dtype == np.uint8 and found.flags.c_contiguous
    if expected is not None:
        np.testing.assert_array_equal(found, expected)
    else:  # those that round, and are not one to one
        assert found.shape == (3, 6, 9)
        assert np.abs(found.astype(int) - first(RGB)).mean() < 12


def test_premultiplied_and_transparent_images():
    opaque = np.dstack([RGB, np.full_like(ALPHA, 255)])
    np.testing.assert_array_equal(pixels(Image.fromarray(opaque).convert("RGBa")), first(RGB))
    data = encoded(palette(), transparency=bytes(range(0, 250, 30)))
    np.testing.assert_array_equal(decode_image(data), COLOURS)
    data = encoded(Image.fromarray(GREY), transparency=int(GREY[0, 0]))
    np.testing.assert_array_equal(decode_image(data), GREY[None])
    clear = np.dstack([RGB, np.zeros_like(ALPHA)])
    np.testing.assert_array_equal(decode_image(encoded(Image.fromarray(clear))), first(RGB))


def test_a_16_bit_ramp_is_scaled():
    ramp = np.arange(0, 1 << 16, 16).astype(np.uint16).reshape(64, 64)
    found = decode_image(encoded(Image.fromarray(ramp)))
    np.testing.assert_allclose(found[0] / 255, ramp / 65535, atol=0.5 / 255 + 1e-9)
    assert (found == 255).mean() < 0.004


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.array([[0, 70_000]], np.int32), "16-bit grey image must have values from 0 to 65535"),
        (np.array([[-1, 7]], np.int32), "but has -1 to 7; save it as npy"),
        (
            np.array([[0, 1.5]], np.float32),
            "floating-point grey image must have values from 0 to 1",
        ),
        (np.array([[0, np.nan]], np.float32), "must have values from 0 to 1"),
    ],
)
def test_values_that_have_no_scale_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        decode_image(encoded(Image.fromarray(values), "tiff"))


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp", "tiff"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_upright(kind, orientation):
    corner = np.zeros((16, 8), np.uint8)
    corner[:4, :4] = 255
    shown = np.asarray(Image.fromarray(corner).convert("RGB"))
    undo = {2: 2, 3: 3, 4: 4, 5: 5, 6: 8, 7: 7, 8: 6}.get(orientation)
    stored = shown
    if undo:  # what a camera held that way writes
        methods = [None, None, *[Image.Transpose(k) for k in (0, 3, 1, 5, 4, 6, 2)]]
        stored = np.asarray(Image.fromarray(shown).transpose(methods[undo]))
    image = Image.fromarray(stored)
    exif = image.getexif()
    exif[0x0112] = orientation
    found = decode_image(encoded(image, kind, exif=exif))
    assert found.shape == (3, 16, 8)
    assert np.abs(first(shown).astype(int) - found).mean() < 5


@pytest.mark.parametrize("data", [b"", b"\x89PNG\r\n\x1a\n", b"no image", encoded(palette())[:60]])
def test_what_is_no_image_raises_valueerror(data):
    with pytest.raises(ValueError, match=r".+"):
        decode_image(data)


def test_shards_of_a_folder_and_hf_read_the_same(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets", reason="the extra 'data' is not installed")
    datasets.disable_progress_bars()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    exif = Image.Exif()
    exif[0x0112] = 6
    images = tmp_path / "images"
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            (images / split / name).mkdir(parents=True)
    for k, mode in enumerate(["L", "LA", "1", "I;16", "RGB", "RGBA", "P"]):
        for split in ("train", "test"):
            FILES[mode][0].save(images / split / ("cat", "dog")[k % 2] / f"{k}.png", exif=exif)
    FILES["RGB"][0].save(images / "train" / "cat" / "9.jpg", exif=exif)
    write_shards(open_samples(str(images)), tmp_path / "s")
    data = DataConfig(transforms=["to_rgb"])
    ours, _ = shards(StreamConfig(path=str(tmp_path / "s")), data)
    theirs, _ = create_sources(StreamConfig(source="hf", path=str(images)), data)
    raw = datasets.load_dataset(str(images))["train"].cast_column(
        "image", datasets.Image(decode=False)
    )
    as_bytes = HFSource(raw, "image", "label", "raw", Transforms(["to_rgb"])).read(np.arange(8))
    assert (as_bytes.x == theirs.read(np.arange(8)).x).all()
    assert ours.info.class_names == theirs.info.class_names == ["cat", "dog"]
    a, b = (source.read(np.arange(8)) for source in (ours, theirs))
    assert a.x.shape == (8, 3, 9, 6)
    order = np.argsort(theirs.labels, kind="stable")  # hf sorts files its own way
    assert sorted(a.y.tolist()) == b.y[order].tolist()
    assert {(y, x.numpy().tobytes()) for x, y in zip(a.x, a.y.tolist(), strict=True)} == {
        (y, x.numpy().tobytes()) for x, y in zip(b.x, b.y.tolist(), strict=True)
    }


def png16(colours: np.ndarray, kind: int) -> bytes:
    """A 16-bit PNG [H, W, C], which Pillow cannot write; ``kind``: 4 of grey with alpha."""

    def chunk(name: bytes, data: bytes) -> bytes:
        checksum = zlib.crc32(name + data).to_bytes(4, "big")
        return len(data).to_bytes(4, "big") + name + data + checksum

    height, width = colours.shape[:2]
    head = struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in colours)
    parts = chunk(b"IHDR", head), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def test_16_bit_with_alpha_is_grey_or_colours_as_the_file_says():
    grey = np.dstack([GREY, ALPHA]).astype(np.uint16) * 257
    assert np.array_equal(decode_image(png16(grey, 4)), GREY[None])
    colours = np.dstack([RGB, ALPHA]).astype(np.uint16) * 257
    assert np.array_equal(decode_image(png16(colours, 6)), first(RGB))


def test_what_is_no_image_is_said_in_the_same_words_each_time():
    with pytest.raises(ValueError, match=r"^it is no image that Pillow knows$"):
        decode_image(b"\x89PNG\r\n\x1a\nbroken")
