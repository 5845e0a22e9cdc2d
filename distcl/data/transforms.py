"""Transforms of samples, by name or as a user gives them, and how samples become batches.

A sample is a dict: numpy arrays, and what else there is to it, by name; its label under ``cls``,
``__key__`` and ``__id__`` its key and its id in the source. A transform takes it and returns it,
changed or new. Afterwards the arrays in it, ``cls`` aside, are x: one alone as it is, several as a
dict by name.

A transform is random if it takes a parameter ``rng``. In training batches that is a numpy Generator
of its own for each (seed, round, epoch, sample), equal in any process; everywhere else (scoring,
evaluation, statistics) it is None, which asks for the plain sample.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from pydantic import NonNegativeInt
from torch.utils._pytree import tree_map

from distcl import registry
from distcl.errors import ConfigError, DataError, DistclError, named, told
from distcl.registry import Count, checked
from distcl.types import Batch, Ids, PyTree, Source, SourceInfo, info_of

Array = npt.NDArray[Any]
Sample = dict[str, Any]
Transform = Callable[..., Sample]

_view: ContextVar[tuple[int, ...] | None] = ContextVar("view", default=None)


@contextmanager
def training_view(view: tuple[int, ...] | None) -> Iterator[None]:
    """Read samples for training inside: random transforms draw by ``view`` and the sample's id.

    ``view``: (seed, round, epoch), each at least 0; None: plain samples, as outside. Local.
    """
    token = _view.set(view)
    try:
        yield
    finally:
        _view.reset(token)


class Transforms:
    """``data.transforms``, in their order: names, or tables of a name and options.

    A built-in's factory is called with the options; of a user's ``package.module:function`` the
    options become keyword arguments of every call. Raises ConfigError naming what is wrong.
    """

    def __init__(self, specs: Sequence[str | dict[str, Any]] = ()) -> None:
        self._specs = list(specs)
        self._steps = [_create(spec) for spec in specs]
        self.random = [name for name, _, random in self._steps if random]
        """Names of those that are random."""

    def __len__(self) -> int:
        return len(self._steps)

    def __reduce__(self) -> tuple[Any, ...]:
        return Transforms, (self._specs,)

    def __call__(self, sample: Sample, key: str, id_: int) -> Sample:
        """Return the sample transformed: uint8 arrays become float32 in [0, 1] before. Local.

        What a user's function raises arrives as DataError with the transform's name.
        """
        view = _view.get() if self.random else None
        rng = None if view is None else np.random.default_rng([*view, id_])
        for name, value in sample.items():
            if name != "cls" and isinstance(value, np.ndarray | torch.Tensor):
                own = np.array(value)  # a copy: a function may write to it
                sample[name] = to_tensor(own, True).numpy()
        sample |= {"__key__": key, "__id__": id_}
        for name, transform, random in self._steps:
            try:
                sample = transform(sample, rng=rng) if random else transform(sample)
                if not isinstance(sample, dict) or "cls" not in sample:
                    raise TypeError("it must return the sample, a dict with a label under 'cls'")
            except DistclError:
                raise
            except Exception as error:  # whatever a user's function raises
                raise DataError(f"transform '{name}': {told(error) or named(error)}") from error
        return sample


def _create(spec: str | dict[str, Any]) -> tuple[str, Transform, bool]:
    """Return the name of a transform, the function, and whether it is random."""
    options = {"name": spec} if isinstance(spec, str) else dict(spec)
    name = options.pop("name", None)
    if not isinstance(name, str):
        raise ConfigError(f"data.transforms: {spec} has no name")
    if ":" not in name:
        function, options = registry.create("transform", name, options=options), {}
    else:
        function = registry.resolve("transform", name)
    known = inspect.signature(function)
    random = "rng" in known.parameters
    try:
        known.bind({}, **options, **({"rng": None} if random else {}))
    except TypeError as error:
        raise ConfigError(f"transform '{name}': {error}") from None
    return name, functools.partial(function, **options), random


# ---------------------------------------------------------------- built in


@checked("transform 'crop'")
def crop(size: Count, pad: NonNegativeInt = 0, random: bool = False) -> Transform:
    """Cut images to ``size`` x ``size``, after ``pad`` zeros on every side: in the centre.

    With ``random``, training batches have it anywhere.
    """

    def cut(image: Array, rng: np.random.Generator | None) -> Array:
        image = np.pad(image, ((0, 0), (pad, pad), (pad, pad)))
        spare = np.array(image.shape[1:]) - size
        if spare.min() < 0:
            raise DataError(
                f"an image of {image.shape[1]} x {image.shape[2]} cannot be cropped to "
                f"{size} x {size}; resize it before"
            )
        down, right = spare // 2 if rng is None else rng.integers(0, spare + 1)
        return image[:, down : down + size, right : right + size]

    if random:
        return lambda sample, rng: _on_images("crop", sample, lambda image: cut(image, rng))
    return lambda sample: _on_images("crop", sample, lambda image: cut(image, None))


def flip() -> Transform:
    """Mirror images left to right, half of those in training batches; random."""

    def mirror(sample: Sample, rng: np.random.Generator | None) -> Sample:
        turned = rng is not None and rng.random() < 0.5
        return _on_images("flip", sample, lambda image: image[:, :, ::-1] if turned else image)

    return mirror


@checked("transform 'normalize'")
def normalize(mean: list[float], std: list[float]) -> Transform:
    """Subtract the mean and divide by the standard deviation of each channel of [C, H, W]."""
    if len(mean) != len(std) or not mean or min(std) <= 0:
        raise ConfigError(
            "transform 'normalize': mean and std need one number per channel, std > 0"
        )
    shift, scale = (np.array(v, dtype=np.float32)[:, None, None] for v in (mean, std))

    def standardize(image: Array) -> Array:
        if len(image) != len(shift):
            raise DataError(f"an image has {len(image)} channels, 'normalize' {len(shift)}")
        return np.asarray((image - shift) / scale, dtype=np.float32)

    return lambda sample: _on_images("normalize", sample, standardize)


def resize(size: int | list[int], keep_aspect: bool = False) -> Transform:
    """Scale images to ``size`` x ``size``, or to [height, width]: bilinear, with antialiasing.

    With ``keep_aspect`` the shorter side becomes ``size``; a crop then makes them equal.
    """
    sides = size if isinstance(size, list) else [size, size]
    if len(sides) != 2 or not all(type(s) is int and s > 0 for s in sides):
        raise ConfigError("transform 'resize': size must be a whole number, or [height, width]")
    if keep_aspect and sides[0] != sides[1]:
        raise ConfigError(
            "transform 'resize': keep_aspect needs one size, that of the shorter side"
        )

    def scale(image: Array) -> Array:
        height, width = sides
        if keep_aspect:
            short = min(image.shape[1:])
            height, width = (round(side * sides[0] / short) for side in image.shape[1:])
        image = image if image.dtype.kind == "f" else image.astype(np.float32)
        given = torch.from_numpy(np.ascontiguousarray(image))[None]
        made = F.interpolate(given, (height, width), mode="bilinear", antialias=True)
        return np.asarray(made[0])

    return lambda sample: _on_images("resize", sample, scale)


def to_rgb() -> Transform:
    """Give images three channels: grey is repeated, transparency (a 2nd or 4th) is left out."""

    def colour(image: Array) -> Array:
        if not 1 <= len(image) <= 4:
            raise DataError(f"an image of {len(image)} channels cannot become RGB")
        return image[:3] if len(image) > 2 else np.repeat(image[:1], 3, axis=0)

    return lambda sample: _on_images("to_rgb", sample, colour)


def to_grey() -> Transform:
    """Give images one channel: of colours their luma (ITU-R 601)."""
    weights = np.array([[[0.299]], [[0.587]], [[0.114]]], dtype=np.float32)

    def grey(image: Array) -> Array:
        if not 1 <= len(image) <= 4:
            raise DataError(f"an image of {len(image)} channels cannot become grey")
        return image[:1] if len(image) < 3 else (image[:3] * weights).sum(0, keepdims=True)

    return lambda sample: _on_images("to_grey", sample, grey)


def _on_images(name: str, sample: Sample, function: Callable[[Array], Array]) -> Sample:
    """Apply ``function`` to every array [C, H, W]; there must be one."""
    arrays = {e: v for e, v in sample.items() if e != "cls" and isinstance(v, np.ndarray)}
    images = [ext for ext, value in arrays.items() if value.ndim == 3]
    if not images:
        shown = ", ".join(f"'{ext}' {list(v.shape)}" for ext, v in arrays.items()) or "no arrays"
        raise ConfigError(f"transform '{name}' needs images [C, H, W], but samples have {shown}")
    return sample | {ext: function(sample[ext]) for ext in images}


# ---------------------------------------------------------------- from samples to batches


def to_tensor(taken: Array, keep_integers: bool = False) -> torch.Tensor:
    """Return numbers as a tensor: uint8 as float32 in [0, 1], float64 as it is, others as float32.

    ``keep_integers``: signed integers and booleans keep their type.
    """
    if taken.dtype == np.uint8:
        taken = np.divide(taken, np.float32(255), dtype=np.float32)
    elif not (keep_integers and taken.dtype.kind in "ib"):
        double = taken.dtype.kind == "f" and taken.dtype.itemsize == 8
        taken = taken.astype(np.float64 if double else np.float32, copy=False)
    else:
        taken = taken.astype(taken.dtype.newbyteorder("="), copy=False)
    return torch.from_numpy(taken if taken.flags.writeable else taken.copy())


def arrays_of(sample: Sample) -> Sample:
    """Return the arrays of x of a sample by name, and ``cls``.

    Raises DataError naming one that holds no numbers, or NaN or infinity.
    """
    found: Sample = {}
    for name, value in sample.items():
        if name != "cls" and isinstance(value, np.ndarray | torch.Tensor):
            array = found[name] = np.asarray(value)
            if array.dtype.kind not in "biuf":
                raise DataError(f"member '{name}' has type {array.dtype}; numbers are needed")
            if array.dtype.kind == "f" and not np.isfinite(array).all():
                raise DataError(f"member '{name}' has a value that is NaN or infinite")
    return found | {"cls": sample["cls"]}


class Stack:
    """Makes batches of samples that are alike: all have the shapes and types of the first ever.

    ``name`` is the source's; ``keep_integers``: see :func:`to_tensor`, for one array alone. ``of``:
    how messages name a sample.
    """

    def __init__(
        self, name: str, keep_integers: bool = False, of: Callable[[int], str] = "sample {}".format
    ) -> None:
        self._name, self._of = name, of
        self._keep = keep_integers
        self._first: tuple[int, dict[str, tuple[Any, ...]]] | None = None  # id; shapes and types

    def __call__(self, samples: Sequence[Sample], ids: Ids) -> tuple[PyTree, torch.Tensor]:
        """Return x and y of samples [B], as :func:`arrays_of` returns them; B is at least 1.

        One array is x, whatever its name is in each sample (.png or .jpg); several are a dict by
        name (NAME for NAME.npy). Raises DataError naming a sample that is not like the first.
        """
        rows = []
        for sample in samples:
            row = {ext: value for ext, value in sample.items() if ext != "cls"}
            rows.append(row if len(row) != 1 else {"": next(iter(row.values()))})
        for id_, row in zip(ids.tolist(), rows, strict=True):
            kinds = {ext: (value.shape, value.dtype) for ext, value in row.items()}
            self._first = self._first or (id_, kinds)
            if kinds != self._first[1]:
                self._refuse(id_, kinds)
        alone = "" in rows[0]
        x = {
            ext.removesuffix(".npy"): to_tensor(
                np.stack([row[ext] for row in rows]), keep_integers=self._keep or not alone
            )
            for ext in sorted(rows[0])
        }
        try:
            targets = np.stack([np.asarray(sample["cls"]) for sample in samples])
        except ValueError as error:
            raise DataError(f"{self._name}: targets differ in shape ({error})") from None
        y = to_tensor(targets if targets.dtype.kind == "f" else targets.astype(np.int64), True)
        return x[""] if alone else x, y

    def _refuse(self, id_: int, kinds: dict[str, tuple[Any, ...]]) -> NoReturn:
        first, like = self._first or (id_, kinds)
        one, other = self._of(id_), self._of(first)
        if ("" in kinds) != ("" in like):
            has = [f"{len(some)} array{'s' * (len(some) > 1)}" for some in (kinds, like)]
            raise DataError(f"{self._name}: {one} has {has[0]}, but {other} {has[1]}")
        ext = min(e for e in kinds.keys() | like.keys() if kinds.get(e) != like.get(e))
        both = kinds.get(ext), like.get(ext)
        told = ["is missing" if k is None else f"has shape {k[0]} and type {k[1]}" for k in both]
        need = "bring them to one shape"
        if both[0] and both[1] and len(both[0][0]) == len(both[1][0]) == 3:
            ways = ["to_rgb"] if both[0][0][0] != both[1][0][0] else []
            ways += ["resize"] if both[0][0][1:] != both[1][0][1:] else []
            need = f"data.transforms has {' and '.join(ways)}" if ways else need
        what = f"'{ext}' of {one}" if ext else one
        raise DataError(f"{self._name}: {what} {told[0]}, but of {other} it {told[1]}; {need}")


def first_sound(
    read: Callable[[int], Sample], id_: int, number: int, replaces: bool, name: str
) -> tuple[int, Sample]:
    """Return (id, sample), of the next of ``number`` that can be read if one may be replaced."""
    for step in range(number):
        other = (id_ + step) % number
        try:
            return other, read(other)
        except DataError:
            if not replaces:
                raise
    raise DataError(f"{name}: not one sample can be read")


class Transformed:
    """A source whose samples are transformed as they are read; in all else it is ``source``.

    For sources whose ``info`` does not say that they do so themselves (``transformed``).
    Samples are one tensor, under the name ``x``, or a dict of them; y is a tensor.
    """

    def __init__(self, source: Source, transforms: Transforms) -> None:
        self._source = source
        self._transforms = transforms
        self._name = info_of(source).name or type(source).__name__
        self._stack = Stack(self._name, keep_integers=True)

    def __len__(self) -> int:
        return len(self._source)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # not there yet, when it is being copied
            raise AttributeError(name)
        return getattr(self._source, name)

    @property
    def info(self) -> SourceInfo:
        """What the source says, but for its labels by position: a transform may change them."""
        own = info_of(self._source)
        return own if own.positions is None else replace(own, positions=None)

    def read(self, ids: Ids) -> Batch:
        """See :meth:`distcl.types.Source.read`; DataError names a sample that cannot be made."""
        ids = np.asarray(ids, dtype=np.int64)
        if len(ids) == 0:
            usable = info_of(self._source).known_usable()
            one = self.read(np.zeros(1, np.int64) if usable is None else np.flatnonzero(usable)[:1])
            return Batch(one.ids[:0], *tree_map(lambda t: t[:0], (one.x, one.y)))
        batch = self._source.read(ids)
        named = isinstance(batch.x, dict)
        x, y = batch.x if named else {"x": batch.x}, batch.y
        if not all(isinstance(leaf, torch.Tensor) for leaf in (*x.values(), y)):
            raise ConfigError(
                f"data.transforms needs samples of one tensor, or of a dict of tensors, and y one "
                f"tensor; {self._name} has others"
            )
        samples = [
            self._sample(id_, {name: _row(t, k) for name, t in x.items()} | {"cls": _row(y, k)})
            for k, id_ in enumerate(batch.ids.tolist())
        ]
        x, y = self._stack(samples, batch.ids.numpy())
        if named and not isinstance(x, dict):
            x = {next(name for name in samples[0] if name != "cls"): x}
        return Batch(batch.ids, x, y, len(ids))

    def _sample(self, id_: int, sample: Sample) -> Sample:
        try:
            return arrays_of(self._transforms(sample, str(id_), id_))
        except DataError as error:
            raise DataError(f"{self._name}, sample {id_}: {error}") from error


def _row(tensor: torch.Tensor, k: int) -> Array:
    row = tensor[k]
    return np.asarray(row.float() if row.dtype == torch.bfloat16 else row)
