"""What ``distcl shard`` reads: arrays, folders of images, archives, and any registered source."""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils._pytree import tree_flatten_with_path

from distcl import registry
from distcl.config import DataConfig, StreamConfig
from distcl.config.paths import reachable
from distcl.data.images import IMAGES
from distcl.data.shards.decode import decode
from distcl.data.shards.index import archives, is_archive, label_of, split_of
from distcl.data.shards.manifest import known_names
from distcl.data.shards.tar import scan
from distcl.data.shards.writer import Members, Samples
from distcl.data.sources.arrays import ArraySource
from distcl.data.sources.npy import Array, npz_keys, open_npz
from distcl.data.stream import create_sources
from distcl.data.transforms import arrays_of
from distcl.errors import DataError, UsageError
from distcl.types import info_of

_TEST_FOLDERS = ("test", "val", "valid", "validation")
_CHUNK = 256


def open_samples(
    source: str, label: str = "cls", stream: StreamConfig | None = None, skip: bool = False
) -> Samples:
    """Return the samples that SOURCE of ``distcl shard`` names. ``skip``: bad archives may be.

    An .npz file; a folder of archives, or one archive; a Hugging Face dataset on disk; a folder of
    class folders of images. With ``stream``, its source, undrifted. Raises UsageError if it is none
    of these, DataError if it cannot be read.
    """
    if stream is not None:
        return SourceSamples(stream)
    path = reachable(source)
    if path.suffix == ".npz":
        return ArraySamples(path)
    if path.suffix.lower() == ".tar" and not path.is_dir():
        return TarSamples(path, [path], label, skip)
    if path.is_dir():
        if any(map(is_archive, path.iterdir())):
            tars, wrong = archives(path)
            if wrong and not skip:
                raise DataError(wrong[0])
            return TarSamples(path, tars, label, skip, wrong)
        if (path / "dataset_dict.json").exists() or (path / "dataset_info.json").exists():
            return SourceSamples(StreamConfig(source="hf", path=str(path)))
        return ImageSamples(path)
    if path.exists():
        raise UsageError(f"'{source}' is neither an .npz, nor a .tar, nor a folder")
    known = [part.name for part in registry.parts("source")]
    raise UsageError(
        f"'{source}' does not exist, and is no registered source{registry.nearest(source, known)}"
    )


class ArraySamples:
    """x and y (and x_test, y_test) of an .npz: members ``npy``, as saved, and ``cls``."""

    label = "cls"

    def __init__(self, path: Path) -> None:
        self._path = path
        keys = npz_keys(path)
        names = ("x_train", "y_train") if "x_train" in keys and "x" not in keys else ("x", "y")
        found = open_npz(path, names, ("x_test", "y_test"))
        self._splits = {"train": (found[names[0]], found[names[1]])}
        if "x_test" in found and "y_test" in found:
            self._splits["test"] = found["x_test"], found["y_test"]
        elif len(found) > 2:
            raise DataError(f"'{path}' has only one of 'x_test' and 'y_test'")
        for x, y in self._splits.values():
            if y.ndim != 1 or len(x) != len(y) or y.dtype.kind not in "iub":
                raise DataError(
                    f"'{path}': y must be one integer per sample of x [{len(x)}, ...], not "
                    f"{y.dtype} of shape {y.shape}"
                )
        self.sizes = {split: len(y) for split, (_, y) in self._splits.items()}

    def describe(self) -> dict[str, Any]:
        """See :class:`distcl.data.shards.writer.Samples`."""
        return {"npz": str(self._path.resolve())}

    def stamp(self, split: str, begin: int, end: int) -> Any:
        """See :class:`distcl.data.shards.writer.Samples`."""
        return [_stamp(self._path), split, begin, end]

    def read(self, split: str, begin: int, end: int) -> Iterator[Members]:
        """See :class:`data.shards.writer.Samples`. [H, W] becomes [1, H, W], as in ``arrays``."""
        x, y = self._splits[split]
        for row in range(begin, end):
            sample = x[row]
            arrays_of({"npy": sample, "cls": 0})
            yield {
                "npy": npy_bytes(sample[None] if sample.ndim == 2 else sample),
                "cls": str(int(y[row])).encode(),
            }


class TarSamples:
    """The samples of archives, in order of their names, their members as they are."""

    def __init__(
        self,
        source: Path,
        tars: Sequence[Path],
        label: str,
        skip: bool = False,
        problems: Sequence[str] = (),
    ) -> None:
        self.label = label
        self._source = source
        self.problems = list(problems)
        """What is wrong with archives, and passed over because of ``skip``."""
        self._places: dict[str, list[tuple[Path, int]]] = {}
        self.class_names = known_names(tars[0].parent)
        self.sizes: dict[str, int] = {}
        for tar in tars:
            number = self._count(tar, skip)
            split = split_of(tar.name)
            self._places.setdefault(split, []).append((tar, number))
            self.sizes[split] = self.sizes.get(split, 0) + number
        self.sizes = {s: self.sizes[s] for s in ("train", "test") if s in self.sizes}

    def _count(self, tar: Path, skip: bool) -> int:
        number = 0
        try:
            for _ in scan(tar, data=False):
                number += 1
        except DataError as error:
            if not skip:
                raise
            self.problems.append(str(error))
        return number

    def describe(self) -> dict[str, Any]:
        """See :class:`distcl.data.shards.writer.Samples`."""
        return {"label": self.label, "archives": str(self._source.resolve())}

    def stamp(self, split: str, begin: int, end: int) -> Any:
        """See :class:`distcl.data.shards.writer.Samples`."""
        return [(_stamp(tar), first) for tar, first, _ in self._parts(split, begin, end)]

    def _parts(self, split: str, begin: int, end: int) -> Iterator[tuple[Path, int, int]]:
        """Yield (archive, its first sample, its number of samples) of those that have these."""
        first = 0
        for tar, number in self._places[split]:
            if first < end and begin < first + number:
                yield tar, first, number
            first += number

    def read(self, split: str, begin: int, end: int) -> Iterator[Members]:
        """See :class:`distcl.data.shards.writer.Samples`."""
        for tar, first, number in self._parts(split, begin, end):
            wanted = itertools.islice(scan(tar), max(begin - first, 0), min(end - first, number))
            for extent in wanted:
                try:
                    if extent.fault:
                        raise DataError(extent.fault)
                    label_of(extent.members, self.label)
                except DataError as error:
                    where = f"shard '{tar.name}', sample '{extent.key}'"
                    raise DataError(f"{where}: {error}") from error
                yield extent.members


class ImageSamples:
    """A folder of class folders of images (or train and test folders of such): files as they are.

    Classes are numbered in order of their folders' names, those of train. What begins with a dot is
    passed over; ``skipped`` names all else that is no image right in a class folder. Raises
    DataError naming a class without images.
    """

    label = "cls"

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.skipped: list[str] = []
        inside = {p.name: p for p in _visible(folder) if p.is_dir()}
        splits = {"train": folder}
        if "train" in inside:
            tests = [inside[name] for name in _TEST_FOLDERS if name in inside]
            splits = {"train": inside["train"], **({"test": tests[0]} if tests else {})}
            self.skipped += [p.name for p in _visible(folder) if p not in splits.values()]
        self._files: dict[str, list[tuple[Path, int]]] = {}
        self.class_names: list[str] = []
        for split, root in splits.items():
            entries = _visible(root)
            names = [p.name for p in entries if p.is_dir()]
            self.class_names = self.class_names or names
            if unknown := set(names) - set(self.class_names):
                raise DataError(f"class '{min(unknown)}' of '{root}' is not among those of train")
            if not names:
                raise DataError(
                    f"'{root}' has no class folders with images ({', '.join(IMAGES)}) in them"
                )
            self.skipped += [str(p.relative_to(folder)) for p in entries if not p.is_dir()]
            self._files[split] = [
                (file, self.class_names.index(name))
                for name in names
                for file in self._images(folder, root / name)
            ]
        self.sizes = {split: len(files) for split, files in self._files.items()}

    def _images(self, folder: Path, of_class: Path) -> list[Path]:
        entries = _visible(of_class)
        images = [
            file
            for file in entries
            if file.suffix.lower().removeprefix(".") in IMAGES and file.is_file()
        ]
        if not images:
            raise DataError(f"class '{of_class}' has no images ({', '.join(IMAGES)}) in it")
        self.skipped += [str(p.relative_to(folder)) for p in entries if p not in set(images)]
        return images

    def describe(self) -> dict[str, Any]:
        """See :class:`distcl.data.shards.writer.Samples`."""
        return {"folder": str(self._folder.resolve())}

    def stamp(self, split: str, begin: int, end: int) -> Any:
        """See :class:`distcl.data.shards.writer.Samples`."""
        return [(_stamp(file), label) for file, label in self._files[split][begin:end]]

    def read(self, split: str, begin: int, end: int) -> Iterator[Members]:
        """See :class:`data.shards.writer.Samples`. Every image is decoded once, to be sure."""
        for file, label in self._files[split][begin:end]:
            ext = file.suffix.lower().removeprefix(".").replace("jpeg", "jpg")
            try:
                data = file.read_bytes()
                decode(ext, data)
            except (DataError, OSError) as error:
                raise DataError(f"'{file}': {error}") from error
            yield {ext: data, "cls": str(label).encode()}


def _visible(folder: Path) -> list[Path]:
    """Return what is in a folder, in order of name, but for what begins with a dot."""
    return [path for path in sorted(folder.iterdir()) if not path.name.startswith(".")]


class SourceSamples:
    """A registered or a user's source, by a StreamConfig: ``npy`` members of x, and ``cls``."""

    label = "cls"

    def __init__(self, config: StreamConfig) -> None:
        self._config = config
        parts = create_sources(config, DataConfig())
        self._parts = dict(zip(("train", "test"), parts, strict=True))
        self.class_names = list(info_of(parts[0]).class_names)
        self.sizes = {split: len(part) for split, part in self._parts.items()}

    def describe(self) -> dict[str, Any]:
        """See :class:`distcl.data.shards.writer.Samples`."""
        return self._config.model_dump(mode="json")

    def stamp(self, split: str, begin: int, end: int) -> Any:
        """See :class:`distcl.data.shards.writer.Samples`."""
        named = [Path(text) for text in self._config.model_dump().values() if isinstance(text, str)]
        return [[_stamp(path) for path in named if path.is_file()], self.sizes, begin, end]

    def read(self, split: str, begin: int, end: int) -> Iterator[Members]:
        """See :class:`distcl.data.shards.writer.Samples`."""
        part = self._parts[split]
        for start in range(begin, end, _CHUNK):
            ids = np.arange(start, min(start + _CHUNK, end))
            batch = part.read(ids)
            x = part.stored(ids) if isinstance(part, ArraySource) else batch.x
            named = {_ext(path): np.asarray(leaf) for path, leaf in tree_flatten_with_path(x)[0]}
            for k, label in enumerate(batch.y.tolist()):
                members = {ext: npy_bytes(values[k]) for ext, values in named.items()}
                yield members | {"cls": str(label).encode()}


def _ext(path: tuple[Any, ...]) -> str:
    """Return the ext of a leaf of x: npy, or NAME.npy where x has several."""
    names = [str(getattr(key, "key", getattr(key, "idx", key))) for key in path]
    return ".".join([*names, "npy"])


def npy_bytes(array: Array) -> bytes:
    """Return an array as the bytes of an .npy file."""
    out = io.BytesIO()
    np.save(out, np.ascontiguousarray(array), allow_pickle=False)
    return out.getvalue()


def _stamp(path: Path) -> dict[str, Any]:
    """Return what tells a file from another one of its name."""
    stat = path.stat()
    return {"path": str(path.resolve()), "bytes": stat.st_size, "time": stat.st_mtime_ns}
