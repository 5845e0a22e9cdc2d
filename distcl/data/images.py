"""The one decoder of images, for every source: by Pillow, to uint8 [C, H, W]."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from distcl.errors import ConfigError

if TYPE_CHECKING:
    from PIL.Image import Image

IMAGES = ("png", "jpg", "jpeg", "webp")
"""Extensions of files that are images."""


def decode_image(data: bytes) -> npt.NDArray[np.uint8]:
    """Return an image file's first picture as :func:`pixels` does. Raises ValueError, as it does.

    Raises ConfigError if Pillow is not installed.
    """
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError:
        raise ConfigError("images need Pillow: pip install 'distcl[data]'") from None
    try:
        with Image.open(io.BytesIO(data)) as image:
            return pixels(image)
    except UnidentifiedImageError:  # its own words name an address in memory
        raise ValueError("it is no image that Pillow knows") from None
    except Exception as error:  # Pillow raises of all kinds on bytes that are not a sound image
        raise ValueError(str(error) or type(error).__name__) from error


def pixels(image: Image) -> npt.NDArray[np.uint8]:
    """Return an image as uint8 [C, H, W]: C is 1 for the grey modes (1, L, LA, I, F), else 3.

    Upright, as its EXIF orientation says. Colours of all modes become RGB, palettes too, whatever
    colours they hold; transparency is left out, colours under it are as stored. 1-bit is 0 and 255.
    16-bit grey (I;16, I) is scaled, 65535 to 255; floating-point grey (F) is of [0, 1].
    Raises ValueError for values beyond, and what Pillow raises for bytes that are not sound.
    """
    from PIL import ImageOps

    coding = [str(tile[3]) for tile in getattr(image, "tile", ())]  # none once it is read
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode == "RGBA" and "LA;16B" in coding:  # 16-bit grey with alpha, made colours
        image = image.convert("LA")
    mode = image.mode
    if mode.startswith("I"):
        grey = _within(np.asarray(image).astype(np.int64), 65535, "16-bit")
        return np.asarray((grey + 128) // 257, dtype=np.uint8)[None]
    if mode == "F":
        grey = np.rint(_within(np.asarray(image), 1, "floating-point") * 255)
        return np.asarray(grey, dtype=np.uint8)[None]
    if mode in ("P", "PA", "RGBa", "La"):  # which Pillow turns into others by way of these only
        image = image.convert("LA" if mode == "La" else "RGBA")
    if mode in ("1", "L", "LA", "La"):
        return np.asarray(image.convert("L"), dtype=np.uint8)[None]
    colours = np.asarray(image.convert("RGB"), dtype=np.uint8)
    return np.ascontiguousarray(np.moveaxis(colours, -1, 0))


def _within(grey: npt.NDArray[Any], most: int, kind: str) -> npt.NDArray[Any]:
    if not ((grey >= 0) & (grey <= most)).all():
        raise ValueError(
            f"a {kind} grey image must have values from 0 to {most}, but has {grey.min()} to "
            f"{grey.max()}; save it as npy"
        )
    return grey
