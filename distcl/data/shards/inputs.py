"""What ``distcl shard`` reads: arrays, folders of images, archives, and any registered source.

Arrays and images have readers of their own beside the sources ``arrays`` and ``hf``: they leave out
a bad sample where a source refuses the whole, and image files stay as they are.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils._pytree import tree_flatten_with_path

from distcl import registry
from distcl.config import DataConfig, StreamConfig
from distcl.config.files import file_stamp
from distcl.config.paths import reachable
from distcl.data.shards.decode import decode, label_of, npy_bytes
from distcl.data.shards.index import archives, is_archive, split_of
from distcl.data.shards.manifest import known_manifest
from distcl.data.shards.tar import scan
from distcl.data.shards.texts import texts_of, token_members
from distcl.data.shards.writer import Members, Samples
from distcl.data.sources.arrays import ArraySource, npz_splits
from distcl.data.sources.folder import ext_of, image_files
from distcl.data.sources.tokens import TokenSource
from distcl.data.stream import create_sources
from distcl.data.transforms import arrays_of
from distcl.errors import ConfigError, DataError, UsageError
from distcl.types import info_of

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


class ArraySamples(Samples):
    """x and y (and x_test, y_test) of an .npz: members ``npy``, as saved, and ``cls``."""

    def __init__(self, path: Path) -> None:
        super().__init__({"npz": str(path.resolve())})
        self._path = path
        splits = npz_splits(path)
        for x, y, _ in splits:
            if y.ndim != 1 or len(x) != len(y) or y.dtype.kind not in "iub":
                raise DataError(
                    f"'{path}': y must be one integer per sample of x [{len(x)}, ...], not "
                    f"{y.dtype} of shape {y.shape}"
                )
        self._splits = dict(zip(("train", "test"), splits, strict=False))
        self.sizes = {split: len(y) for split, (_, y, _) in self._splits.items()}

    def stamp(self, split: str, begin: int, end: int) -> Any:
        """See :class:`distcl.data.shards.writer.Samples`."""
        return [file_stamp(self._path), split, begin, end]

    def read(self, split: str, begin: int, end: int) -> Iterator[Members]:
        """See :class:`data.shards.writer.Samples`. [H, W] becomes [1, H, W], as in ``arrays``."""
        x, y, _ = self._splits[split]
        for row in range(begin, end):
            sample = x[row]
            arrays_of({"npy": sample, "cls": 0})
            yield {
                "npy": npy_bytes(sample[None] if sample.ndim == 2 else sample),
                "cls": b"%d" % int(y[row]),
            }


class TarSamples(Samples):
    """The samples of archives, in order of their names, their members as they are."""

    def __init__(
        self,
        source: Path,
        tars: Sequence[Path],
        label: str,
        skip: bool = False,
        problems: Sequence[str] = (),
    ) -> None:
        known = known_manifest(tars[0].parent, label)
        label = known.label if known.texts else label
        super().__init__({"label": label, "archives": str(source.resolve())}, label)
        self.problems += problems
        self.class_names, self.texts = known.class_names, known.texts
        self._places: dict[str, list[tuple[Path, int, int]]] = {"train": [], "test": []}
        """Of each split the archives, with the numbers of their first samples and of the next."""
        for tar in tars:
            places = self._places[split_of(tar.name)]
            first = end = places[-1][2] if places else 0
            try:
                for _ in scan(tar, data=False):
                    end += 1
            except DataError as error:
                if not skip:
                    raise
                self.problems.append(str(error))
            places.append((tar, first, end))
        self.sizes = {split: places[-1][2] for split, places in self._places.items() if places}

    def stamp(self, split: str, begin: int, end: int) -> Any:
        """See :class:`distcl.data.shards.writer.Samples`."""
        return [(file_stamp(tar), first) for tar, first, _ in self._parts(split, begin, end)]

    def _parts(self, split: str, begin: int, end: int) -> list[tuple[Path, int, int]]:
        return [p for p in self._places[split] if p[1] < end and begin < p[2]]

    def read(self, split: str, begin: int, end: int) -> Iterator[Members]:
        """See :class:`distcl.data.shards.writer.Samples`."""
        for tar, first, following in self._parts(split, begin, end):
            wanted = max(begin - first, 0), min(end, following) - first
            for extent in itertools.islice(scan(tar), *wanted):
                try:
                    if extent.fault:
                        raise DataError(extent.fault)
                    label_of(extent.members, self.label)
                except DataError as error:
                    where = f"shard '{tar.name}', sample '{extent.key}'"
                    raise DataError(f"{where}: {error}") from error
                yield extent.members


class ImageSamples(Samples):
    """A folder of class folders of images (or train and test folders of such): files as they are.

    Classes are numbered in order of their folders' names, those of train. What begins with a dot is
    passed over; ``skipped`` names all else that is no image right in a class folder. Raises
    DataError naming a class without images.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__({"folder": str(folder.resolve())})
        self._files, self.class_names, skipped = image_files(folder)
        self.skipped += [str(path.relative_to(folder)) for path in skipped]
        self.sizes = {split: len(files) for split, files in self._files.items()}

    def stamp(self, split: str, begin: int, end: int) -> Any:
        """See :class:`distcl.data.shards.writer.Samples`."""
        return [(file_stamp(file), label) for file, label in self._files[split][begin:end]]

    def read(self, split: str, begin: int, end: int) -> Iterator[Members]:
        """See :class:`data.shards.writer.Samples`. Every image is decoded once, to be sure."""
        for file, label in self._files[split][begin:end]:
            ext = ext_of(file).replace("jpeg", "jpg")
            try:
                data = file.read_bytes()
                decode(ext, data)
            except (DataError, OSError) as error:
                raise DataError(f"'{file}': {error}") from error
            yield {ext: data, "cls": b"%d" % label}


class SourceSamples(Samples):
    """A registered or a user's source, by a StreamConfig: ``npy`` members of x, and ``cls``.

    Of texts: :func:`distcl.data.shards.texts.token_members`.
    """

    def __init__(self, config: StreamConfig) -> None:
        super().__init__(config.model_dump(mode="json"))
        parts = create_sources(config, DataConfig())
        self._parts = dict(zip(("train", "test"), parts, strict=True))
        self.class_names = list(info_of(parts[0]).class_names)
        self.sizes = {split: len(part) for split, part in self._parts.items()}
        texts = [part for part in parts if isinstance(part, TokenSource)]
        if len(texts) == len(parts):
            self.texts = texts_of(*texts)
            self.label = self.texts.label
        elif config.listed and info_of(parts[0]).tokens:
            raise ConfigError(
                "stream.experiences lists several sources of texts, which cannot be written as "
                "one: write the shards of each by itself"
            )

    def stamp(self, split: str, begin: int, end: int) -> Any:
        """See :class:`distcl.data.shards.writer.Samples`."""
        if self.texts:
            digest = hashlib.sha256()
            for members in self.read(split, begin, end):
                digest.update(b"".join(members.values()))
            return digest.hexdigest()
        paths = [Path(text) for text in self.origin.values() if isinstance(text, str)]
        return [[file_stamp(path) for path in paths if path.is_file()], self.sizes, begin, end]

    def read(self, split: str, begin: int, end: int) -> Iterator[Members]:
        """See :class:`distcl.data.shards.writer.Samples`."""
        part = self._parts[split]
        if self.texts:
            yield from (token_members(part, row, self.texts) for row in range(begin, end))
            return
        for start in range(begin, end, _CHUNK):
            ids = np.arange(start, min(start + _CHUNK, end))
            batch = part.read(ids)
            x = part.stored(ids) if isinstance(part, ArraySource) else batch.x
            named = {_name(path): np.asarray(leaf) for path, leaf in tree_flatten_with_path(x)[0]}
            for k, label in enumerate(batch.y.tolist()):
                members = {ext: npy_bytes(values[k]) for ext, values in named.items()}
                yield members | {"cls": str(label).encode()}


def _name(path: tuple[Any, ...]) -> str:
    """Return the ext of a leaf of x: npy, or NAME.npy where x has several."""
    names = [str(getattr(key, "key", getattr(key, "idx", key))) for key in path]
    return ".".join([*names, "npy"])
