"""Class folders of images as a source, read straight from the disk."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch.utils._pytree import tree_map

from distcl.config import DataConfig, StreamConfig
from distcl.config.paths import reachable
from distcl.data.ids import checked_rows
from distcl.data.images import IMAGES, decode_image
from distcl.data.sources.grouping import held_out
from distcl.data.transforms import Sample, Stack, Transforms, arrays_of, first_sound
from distcl.errors import ConfigError, DataError
from distcl.registry import checked
from distcl.types import Batch, Ids, SourceInfo

log = logging.getLogger("distcl")

_TEST_FOLDERS = ("test", "val", "valid", "validation")
_MODES = {"rgb": ["to_rgb"], "grey": ["to_grey"], "as stored": []}

Files = list[tuple[Path, int]]
"""Images and their labels."""


class FolderSource:
    """Image files as samples; ids are rows. x is float32 [C, H, W] in [0, 1], y the class.

    ``info`` has the labels. Where it says ``replaces``, the next sound image is read in the place
    of a bad one, else ``read`` raises DataError naming the file.
    """

    def __init__(self, files: Sequence[Path], info: SourceInfo, transforms: Transforms) -> None:
        self._files, self.info, self._transforms = files, info, transforms
        self._labels = info.known_labels()
        self._stack = Stack(info.name, of=lambda id_: f"'{self._files[id_]}'")

    def __len__(self) -> int:
        return len(self._files)

    def __reduce__(self) -> tuple[Any, ...]:
        return FolderSource, (self._files, self.info, self._transforms)

    def part(self, rows: Ids, info: SourceInfo) -> FolderSource:
        """Return a source of some of the images, of which ``info`` holds."""
        return FolderSource([self._files[row] for row in rows], info, self._transforms)

    def read(self, ids: Ids) -> Batch:
        """Read images. Local. Raises DataError, see the class."""
        ids = checked_rows(ids, len(self), self.info.name)
        wanted = ids.tolist() or [0]
        found = [
            first_sound(self._sample, id_, len(self), self.info.replaces, self.info.name)
            for id_ in wanted
        ]
        got = np.array([id_ for id_, _ in found])
        x, y = self._stack([sample for _, sample in found], got)
        x, y, got = tree_map(lambda t: t[: len(ids)], (x, y, got))
        return Batch(torch.from_numpy(got), x, y, len(ids))

    def _sample(self, id_: int) -> Sample:
        assert self._labels is not None
        file = self._files[id_]
        try:
            sample: Sample = {"image": decode_image(file.read_bytes()), "cls": self._labels[id_]}
            return arrays_of(self._transforms(sample, file.name, id_))
        except (DataError, ValueError, OSError) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else error
            raise DataError(f"'{file}': {reason}") from error


@checked("stream")
def folder(
    config: StreamConfig,
    data: DataConfig | None = None,
    mode: Literal["rgb", "grey", "as stored"] = "rgb",
    size: int | list[int] = 0,
) -> tuple[FolderSource, FolderSource]:
    """Return (train, test) of the images in the class folders of ``stream.path``.

    Or of those in its folders ``train`` and ``test`` (or ``val``); without them
    ``stream.test_fraction`` of each class is held out. Classes are numbered in the order of their
    folders' names, which are theirs. png, jpg and webp may be mixed.

    ``mode``: "rgb", three channels; "grey", one; "as stored", which all must share. ``size``:
    images are scaled to ``size`` x ``size`` or [height, width]; 0: as they are, all of one size.

    Raises DataError naming a class without images, or the file of an image that cannot be read or
    is of another shape.
    """
    if not config.path:
        raise ConfigError("stream.source = 'folder' needs stream.path, a folder of class folders")
    path, data = reachable(config.path), data or DataConfig()
    if not path.is_dir():
        raise DataError(f"stream.path: '{path}' is no folder")
    found, names, skipped = image_files(path)
    if skipped:
        log.info(
            "[data] '%s': %d are no images of a class: '%s', …", path, len(skipped), skipped[0]
        )
    own: list[str | dict[str, Any]] = [*_MODES[mode]]
    transforms = Transforms(own + [{"name": "resize", "size": size}] * bool(size) + data.transforms)
    skips = data.on_bad_sample == "skip"
    splits = []
    for split, files in found.items():
        labels = np.array([label for _, label in files])
        columns = {"file": np.array([file.name for file, _ in files], dtype=object)}
        info = SourceInfo(
            f"'{path}' ({split})", labels, class_names=names, columns=columns, replaces=skips,
            transformed=True,
        )  # fmt: skip
        splits.append(FolderSource([file for file, _ in files], info, transforms))
    if len(splits) == 1:
        whole = splits[0]
        *rows, infos = held_out(config, whole.info, len(whole))
        splits = [whole.part(part, info) for part, info in zip(rows, infos, strict=True)]
    return splits[0], splits[1]


def image_files(folder: Path) -> tuple[dict[str, Files], list[str], list[Path]]:
    """Return the images of train, and of test if there are any, the names of the classes, the rest.

    ``folder`` has class folders of images, or folders train and test (or val) of such. Classes are
    numbered in order of their names, those of train. What begins with a dot is passed over; the
    rest is all else that is no image right in a class folder. Raises DataError naming a class
    without images.
    """
    inside = {p.name: p for p in _visible(folder) if p.is_dir()}
    splits, skipped = {"train": folder}, list[Path]()
    if "train" in inside:
        tests = [inside[name] for name in _TEST_FOLDERS if name in inside]
        splits = {"train": inside["train"], **({"test": tests[0]} if tests else {})}
        skipped += [p for p in _visible(folder) if p not in splits.values()]
    found: dict[str, Files] = {}
    classes: list[str] = []
    for split, root in splits.items():
        names = [p.name for p in _visible(root) if p.is_dir()]
        classes = classes or names
        if unknown := set(names) - set(classes):
            raise DataError(f"class '{min(unknown)}' of '{root}' is not among those of train")
        if not names:
            raise DataError(
                f"'{root}' has no class folders with images ({', '.join(IMAGES)}) in them"
            )
        skipped += [p for p in _visible(root) if not p.is_dir()]
        files = found[split] = []
        for name in names:
            entries = _visible(root / name)
            images = [p for p in entries if ext_of(p) in IMAGES and p.is_file()]
            if not images:
                raise DataError(f"class '{root / name}' has no images ({', '.join(IMAGES)}) in it")
            files += [(image, classes.index(name)) for image in images]
            skipped += sorted(set(entries) - set(images))
    return found, classes, skipped


def _visible(folder: Path) -> list[Path]:
    """Return what is in a folder, in order of name, but for what begins with a dot."""
    return [path for path in sorted(folder.iterdir()) if not path.name.startswith(".")]


def ext_of(file: Path) -> str:
    """Return what follows the last dot of a name, in lower case."""
    return file.suffix.lower().removeprefix(".")
