"""The values that travel between the parts, and the small protocols that parts implement."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from distcl.errors import ConfigError

if TYPE_CHECKING:
    import torch

Ids = npt.NDArray[np.int64]
"""Sample ids, int64 [N]."""

Mask = npt.NDArray[np.bool_]

PyTree = Any
"""A tensor, or a dict, list or tuple of them; every leaf has the batch as its first dimension."""

IGNORED = -100
"""A target of this value counts for nothing, in training and in scores."""

ROW_BITS = 40
_TEST_BIT = 62
GENERAL = (1 << (_TEST_BIT - ROW_BITS)) - 1
"""The experience of which ids of general data are: the last that there can be."""


def pack_ids(experience: int, rows: npt.ArrayLike, *, test: bool = False) -> Ids:
    """Pack (experience, row) into ids, int64 [N].

    The same row under another experience's drift is another sample, so it has another id; so has
    a row of the test split. ``rows`` are below 2**40, ``experience`` below 2**22.
    """
    base = (experience << ROW_BITS) | (int(test) << _TEST_BIT)
    return np.asarray(rows, dtype=np.int64) | np.int64(base)


def exact(share: float) -> Fraction:
    """Return the decimal number that was written: 57/100 for 0.57, which as a float is less.

    Every count that is a share of something is made from it: floor(exact(0.57) * 100) is 57, while
    int(0.57 * 100) is 56.
    """
    return Fraction(repr(float(share)))


def frozen(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return a view of an array that cannot be written to: what holds it need not copy it.

    The caller promises that nobody else writes to the array from now on.
    """
    view = array.view()
    view.flags.writeable = False
    return view


def as_tensor(array: npt.NDArray[Any] | None) -> torch.Tensor | None:
    """Return an array as a tensor over the same memory, not to be written to; None stays None."""
    import torch

    if array is None:
        return None
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return torch.from_numpy(array)


def as_array(tensor: torch.Tensor | None) -> Any:
    """Return what :func:`as_tensor` was given."""
    return None if tensor is None else tensor.numpy()


def unpack_ids(ids: Ids) -> tuple[Ids, Ids, npt.NDArray[np.bool_]]:
    """Return (experience [N], row [N], is_test [N]) of packed ids."""
    ids = np.asarray(ids, dtype=np.int64)
    test = (ids >> _TEST_BIT) & 1 == 1
    experience = (ids >> ROW_BITS) & ((1 << (_TEST_BIT - ROW_BITS)) - 1)
    return experience, ids & ((1 << ROW_BITS) - 1), test


@dataclass(frozen=True, slots=True)
class Batch:
    """This rank's part of one global batch.

    ids: int64 [B] (a CPU tensor); x, y: a tensor [B, ...] or a pytree of them. ``total`` is the
    size of the global batch that this is a part of; it equals B on a single rank. B may be 0.
    ``weights``: loss weights [B] (``priority.correction``), or None for 1.
    """

    ids: torch.Tensor
    x: PyTree
    y: PyTree
    total: int = 0
    weights: torch.Tensor | None = None

    def __len__(self) -> int:
        return int(self.ids.shape[0])

    def part(self, k: int, parts: int) -> Batch:
        """Return part ``k`` of ``parts`` (sizes within one), of the same global batch."""
        if parts == 1:
            return self
        from torch.utils._pytree import tree_map

        lo, hi = len(self) * k // parts, len(self) * (k + 1) // parts
        ids, x, y = tree_map(lambda t: t[lo:hi], (self.ids, self.x, self.y))
        weights = None if self.weights is None else self.weights[lo:hi]
        return Batch(ids, x, y, self.total, weights)

    def joined(self, other: Batch) -> Batch:
        """Return both as one batch: these samples, then the other's; ``total`` is of both.

        Samples of unequal lengths are padded on the right: x, a dict with an ``attention_mask``,
        with 0, and labels with ``IGNORED``. Raises ConfigError on other samples of unequal shapes.
        """
        import torch
        from torch.utils._pytree import tree_map

        ids = torch.cat([self.ids, other.ids])
        masked = isinstance(self.x, Mapping) and "attention_mask" in self.x
        x = tree_map(lambda *some: _joined(some, 0 if masked else None), self.x, other.x)
        y = tree_map(
            lambda *some: _joined(some, None if some[0].is_floating_point() else IGNORED),
            *(self.y, other.y),
        )
        weights = None
        like = other.weights if self.weights is None else self.weights
        if like is not None:
            both = ((b.weights, len(b)) for b in (self, other))
            weights = torch.cat([like.new_ones(n) if w is None else w for w, n in both])
        return Batch(ids, x, y, self.total + other.total, weights)

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> Batch:
        """Move x and y to ``device``; floating-point x (and y) are cast to ``dtype`` if given."""
        import torch
        from torch.utils._pytree import tree_map_only

        def move(t: torch.Tensor) -> torch.Tensor:
            cast = dtype if dtype is not None and t.is_floating_point() else None
            return t.to(device=device, dtype=cast, non_blocking=True)

        def moved(tree: PyTree) -> PyTree:  # most are a tensor: trees cost tens of microseconds
            whole = isinstance(tree, torch.Tensor)
            return move(tree) if whole else tree_map_only(torch.Tensor, move, tree)

        return Batch(self.ids, moved(self.x), moved(self.y), self.total, self.weights)


def _joined(some: Sequence[torch.Tensor], fill: int | None) -> torch.Tensor:
    """Join tensors [B, ...] along the batch, [B, T, ...] of unequal T padded with ``fill``."""
    import torch

    shapes = [t.shape[1:] for t in some]
    if shapes[:1] * len(shapes) == shapes:
        return torch.cat(list(some))
    if fill is None or not all(s and s[1:] == shapes[0][1:] for s in shapes):
        raise ConfigError(
            f"samples of shapes {' and '.join(str(list(s)) for s in shapes)} cannot be one batch; "
            "only what is beside an attention_mask, and labels of positions, may be unequally long"
        )
    width = max(s[0] for s in shapes)
    padded = (t.new_full((len(t), width - t.shape[1], *t.shape[2:]), fill) for t in some)
    return torch.cat([torch.cat(pair, 1) for pair in zip(some, padded, strict=True)])


@dataclass(frozen=True, slots=True)
class DataSpec:
    """What a model must accept: shape of one sample and the number of classes.

    ``classes`` is one more than the largest label, 0 for regression. ``y_shape`` is the shape of
    one target: of several numbers, or of several labels (token ids), else (). ``occurring``: the
    classes that training samples have, ascending; empty if that is every one, or not known.
    ``class_names``: by label, where the source has them.
    """

    x_shape: tuple[int, ...]
    classes: int
    y_shape: tuple[int, ...] = ()
    occurring: tuple[int, ...] = field(default=(), compare=False)
    class_names: tuple[str, ...] = field(default=(), compare=False)
    tokens: int = field(default=0, compare=False)
    """Inputs are token ids below this; 0: they are none, or it is not known."""
    longest: int = field(default=0, compare=False)
    """How many tokens the longest sample has, where the source says it."""
    lone: str = field(default="", compare=False)
    """A sample with no label but its first, of several; see :class:`SourceInfo`."""

    @property
    def outputs(self) -> int:
        """How many numbers a model returns: scores of the classes, or values of one target."""
        return self.classes or math.prod(self.y_shape)

    @property
    def labels(self) -> Ids:
        """The classes that occur, as far as is known, int64 [C]."""
        return np.array(self.occurring or range(self.classes), dtype=np.int64)


@dataclass(frozen=True, slots=True)
class Experience:
    """The data of one round: ids of training and held-out samples, readable from the stream."""

    index: int
    train: Ids
    test: Ids
    name: str = ""


@dataclass(frozen=True)
class SourceInfo:
    """What a source, or a stream, says of itself before anything is read; nothing of it must be.

    ``labels``: the classes, int64 [N]; or else ``classes``, their number, which is enough unless
    the drift chooses samples by class. Where neither is there, every sample is read once to learn
    the labels. ``class_names``: by label.

    ``usable``: bool [N], leaves bad samples out of all experiences. ``groups``: int64 [N], or what
    can be indexed as such an array: the concept that each sample belongs to; None: to all.
    ``group_names``: by concept. Labels and ``usable`` may also be functions that return them.
    ``columns``: by name, values [N], or functions that return them, by which ``stream.experiences``
    may go; ``grouped``: its value, if ``groups`` are by it.
    ``sequential``: it is best read from front to back, and that is the stream order;
    ``shards_of(ids)`` then returns the part [B] of each, and how many parts can be read side by
    side. ``live_seconds``: how long to wait for more samples at its end; ``arrived()`` then returns
    how many have come, and ``grow(n)`` takes in n of them and returns the length before.

    ``tokens``: x are token ids below this, of ``tokenizer`` ("": not known); ``longest``: how many
    the longest sample has. ``varies``: samples, as texts, are of unequal lengths. ``features``: the
    names of the columns of x. ``positions``: of several labels a sample, one more than the largest,
    and a sample that has none but its first, as messages name it, or ""; without it, every sample
    is read to learn these. ``replaces``: ``read`` may put its next sound sample in the place of a
    bad one, and tells so by the batch's ids. ``transformed``: it applies transforms itself.
    """

    name: str = ""
    labels: Ids | Callable[[], Ids | None] | None = None
    classes: int = 0
    class_names: Sequence[str] = ()
    usable: Mask | Callable[[], Mask | None] | None = None
    groups: Any = None
    group_names: Sequence[str] = ()
    columns: Mapping[str, Any] = field(default_factory=dict)
    grouped: str = ""
    sequential: bool = False
    live_seconds: float = 0.0
    replaces: bool = False
    tokens: int = 0
    tokenizer: str = ""
    longest: int = 0
    varies: bool = False
    features: tuple[str, ...] = ()
    positions: tuple[int, str] | None = None
    transformed: bool = False
    unusable: int = 0
    """Of a stream: how many samples are left out, known to be bad from the start."""
    general: Ids | None = None
    """Of a stream: ids of samples that no experience has, replayed from the first round on."""
    replaced: set[int] = field(default_factory=set)
    """Of a stream: ids that were asked for and turned out bad, in this process."""

    def known_labels(self) -> Ids | None:
        """Return the labels [N], if they are there."""
        return self.labels() if callable(self.labels) else self.labels

    def known_usable(self) -> Mask | None:
        """Return which samples are not known to be bad, [N]; None: all."""
        return self.usable() if callable(self.usable) else self.usable


_OF_INFO = ("groups", "usable", "sequential", "live_seconds", "replaces", "transformed")


def info_of(source: Source) -> SourceInfo:
    """Return what a source says of itself, by its attribute ``info`` if it has one."""
    own = [name for name in _OF_INFO if not hasattr(source, "info") and hasattr(source, name)]
    if own:
        raise ConfigError(
            f"{type(source).__name__} has '{own[0]}' as an attribute, which nobody reads: it "
            f"belongs into info = SourceInfo({own[0]}=...), see distcl.types.SourceInfo"
        )
    info = getattr(source, "info", SourceInfo())
    if not isinstance(info, SourceInfo):
        raise ConfigError(f"{type(source).__name__}.info is no distcl.types.SourceInfo")
    return info


@runtime_checkable
class Source(Protocol):
    """Random access by id. Local: any rank reads what it likes, no communication.

    It may have an attribute ``info``, a :class:`SourceInfo`.
    """

    def __len__(self) -> int:
        """Return the number of samples."""
        ...

    def read(self, ids: Ids) -> Batch:
        """Read samples by id, in the order asked; raises DataError naming a bad sample."""
        ...


class Stream(Source, Protocol):
    """A source of experiences under drift; ids are packed (experience, row)."""

    spec: DataSpec
    experiences: list[Experience]


@dataclass(frozen=True, slots=True)
class Outputs:
    """What a model says of a batch: ``loss`` [B] unreduced, ``logits`` [B, ...] or None.

    ``older``: of theta_star's outputs, those under the anchors before it, newest first, for a
    signal whose attribute ``anchors`` is above 1.
    """

    loss: torch.Tensor
    logits: PyTree = None
    older: tuple[Outputs, ...] = ()


class PrioritySignal(Protocol):
    """What is scored.

    ``needs_anchor``: theta_star runs too; ``needs_logits``: and its logits are kept. An attribute
    ``anchors`` = K > 1 asks for the last K anchors; the first is theta_star. ``needs_inputs`` =
    False says that ``batch.x`` is not looked at, so that under source ``online``, where it is then
    None, several batches can be scored at once.
    """

    needs_anchor: bool
    needs_logits: bool

    def score(self, batch: Batch, now: Outputs, anchor: Outputs | None) -> torch.Tensor:
        """Return scores [B] >= 0 of the samples of ``batch``; larger is drawn more often."""
        ...


class Stateful(Protocol):
    """What must survive a restart: tensors and plain values, the same on every rank."""

    def state_dict(self) -> Any:
        """Return the state. Called on every rank."""
        ...

    def load_state_dict(self, state: Any) -> None:
        """Restore what ``state_dict`` returned, at any number of ranks. Called on every rank."""
        ...


class Detector(Stateful, Protocol):
    """Drift detection on one value at a time. Runs on rank 0; the verdict is broadcast.

    Its state consists of JSON-serializable values.
    """

    def update(self, value: float) -> bool:
        """Take the next value of the metric; True when drift is detected."""
        ...

    def reset(self) -> None:
        """Forget everything seen."""
        ...


UnreducedLoss = Callable[[Any, Any], "torch.Tensor"]
"""(outputs, y) -> loss of each sample, [B]."""


WATCHING = "watching the stream"
"""Title of the part of a run in which the monitor goes through the stream."""
GROWING = "watching the stream, which may grow"
WAITING = "waiting for more samples"
"""Titles of these parts where more samples may come: nobody knows how far such a run is."""


class Progress(Protocol):
    """Where a run shows that it is alive. Called on rank 0 only, at poll points."""

    def round_begins(self, title: str, steps: int, metric: str = "loss") -> None:
        """Announce a part of the run that takes ``steps`` steps, and what ``step`` will tell."""
        ...

    def step(self, done: int, value: float, samples_per_second: float) -> None:
        """Say how far the part has come: steps done, the metric's mean, rate (0: none)."""
        ...

    def message(self, text: str) -> None:
        """Show one line."""
        ...
