"""Drift schedules: what changes from one experience to the next.

A schedule is one subclass of :class:`Drift` that overrides ``apply`` (what a sample looks like),
``members`` (which samples there are), or both. The registry calls its constructor with (severity,
seed, spec, concepts) and, as keywords, what ``stream.drift_options`` holds under its name.
Everything a schedule draws is a function of the seed.

``apply`` must give a sample the same bits in whatever batch and order it comes. So schedules here
use elementwise arithmetic, table look-ups, and ``grid_sample``, whose CPU kernel goes sample by
sample; matrix products are out, since their blocking depends on the batch size.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from distcl.data.ids import GOLDEN, splitmix
from distcl.errors import ConfigError
from distcl.types import DataSpec, Ids, Mask, exact

_DEGREES = 30.0  # of rotation, per experience
_AFFINE_DEGREES, _AFFINE_SHARE = 15.0, 0.1  # of one random map: turn; scale, shear and shift
_NOISE_STD = 0.1  # per experience, in units of x
_BLUR_PIXELS = 0.5  # standard deviation, per experience
# what different schedules draw from one seed is told apart by these
_AFFINE, _PERMUTE, _SPLIT, _LABELS = 1, 2, 3, 5


class Drift:
    """Base of every schedule; by itself nothing drifts.

    ``severity``: strength relative to the schedule's default; ``spec``: of the undrifted samples;
    ``concepts``: how many there are, one for each experience unless concepts recur. A constructor
    raises ConfigError, naming the key, where the schedule does not fit the data.
    """

    def __init__(self, severity: float, seed: int, spec: DataSpec, concepts: int) -> None:
        self.severity = severity
        self.seed = seed
        self.spec = spec
        self.concepts = concepts

    def apply(self, x: torch.Tensor, concept: int, ids: Ids) -> torch.Tensor:
        """Return floating-point x [B, ...] as it looks under ``concept``, same shape and type.

        ``concept`` counts from 0, undrifted. ``ids`` [B] are packed sample ids, for what differs
        from sample to sample. ``x`` itself must not change. Local, in any process.
        """
        return x

    def members(self, labels: Ids, concept: int) -> Mask:
        """Return which samples, bool [N], of those with ``labels`` [N] are there in ``concept``."""
        return np.ones(len(labels), dtype=np.bool_)


class Identity(Drift):
    """No drift."""


class _Warp(Drift, ABC):
    """Moves pixels, bilinearly, zeros from outside of the image."""

    name: str

    def __init__(self, severity: float, seed: int, spec: DataSpec, concepts: int) -> None:
        super().__init__(severity, seed, spec, concepts)
        self._size = _image_size(self.name, spec)
        self._maps = self.maps(*self._size)
        self._grids: dict[int, torch.Tensor] = {}

    @abstractmethod
    def maps(self, height: int, width: int) -> list[npt.NDArray[np.float64]]:
        """Return each concept's map [3, 3] from output to input position.

        In pixels around the image's centre, x before y.
        """

    def apply(self, x: torch.Tensor, concept: int, ids: Ids) -> torch.Tensor:
        """See :meth:`Drift.apply`."""
        if concept == 0:
            return x
        if concept not in self._grids:
            half = np.array([*self._size[::-1], 2.0]) / 2  # affine_grid counts in halves
            theta = torch.from_numpy((self._maps[concept] * half / half[:, None])[:2])
            grid = F.affine_grid(theta[None], [1, 1, *self._size], align_corners=False)
            self._grids[concept] = grid.float()
        grid = self._grids[concept].to(x.dtype).expand(len(x), -1, -1, -1)
        return F.grid_sample(x, grid, mode="bilinear", align_corners=False)


class Rotate(_Warp):
    """Images turned about their centre, counterclockwise, by 30° x severity x concept."""

    name = "rotate"

    def maps(self, height: int, width: int) -> list[npt.NDArray[np.float64]]:
        """See the base class."""
        return [_turn(a) for a in np.radians(_DEGREES * self.severity) * np.arange(self.concepts)]


class Affine(_Warp):
    """The composition of one more random affine map for each concept.

    Each map turns by up to 15°, stretches either axis by up to exp(±0.1), shears by up to 0.1 and
    shifts by up to 0.1 of half the image; all uniform, and times severity.
    """

    name = "affine"

    def maps(self, height: int, width: int) -> list[npt.NDArray[np.float64]]:
        """See the base class."""
        rng = np.random.default_rng([self.seed, _AFFINE])
        maps = [np.eye(3)]
        for _ in range(1, self.concepts):
            turn, *rest = self.severity * rng.uniform(-1, 1, 6)
            stretch_x, stretch_y, shear, dx, dy = _AFFINE_SHARE * np.array(rest)
            x_row = [math.exp(stretch_x), shear, dx * width / 2]
            y_row = [0.0, math.exp(stretch_y), dy * height / 2]
            small = np.array([x_row, y_row, [0.0, 0.0, 1.0]])
            maps.append(maps[-1] @ _turn(math.radians(_AFFINE_DEGREES) * turn) @ small)
        return maps


class Permute(Drift):
    """One fixed permutation of all features for each concept; 0 is the identity.

    Severity below 1 permutes only that share of the features, drawn at random.
    """

    def __init__(self, severity: float, seed: int, spec: DataSpec, concepts: int) -> None:
        super().__init__(severity, seed, spec, concepts)
        self._orders: dict[int, torch.Tensor] = {}

    def apply(self, x: torch.Tensor, concept: int, ids: Ids) -> torch.Tensor:
        """See :meth:`Drift.apply`."""
        if concept == 0:
            return x
        order = self._orders.get(concept)
        if order is None:
            order = self._orders[concept] = self._order(concept)
        return x.flatten(1).index_select(1, order).view_as(x)

    def _order(self, concept: int) -> torch.Tensor:
        rng = np.random.default_rng([self.seed, _PERMUTE, concept])
        features = math.prod(self.spec.x_shape)
        moved = rng.permutation(features)[: round(exact(min(self.severity, 1.0)) * features)]
        order = np.arange(features)
        order[np.sort(moved)] = moved
        return torch.from_numpy(order)


class Noise(Drift):
    """Gaussian noise of standard deviation 0.1 x severity x concept, in units of x.

    A sample's noise is a function of (seed, id): four 16-bit words of a splitmix64 hash at a time,
    each looked up among 65,536 equally likely normal quantiles (Steele, Lea & Flood 2014, "Fast
    splittable pseudorandom number generators").
    """

    def __init__(self, severity: float, seed: int, spec: DataSpec, concepts: int) -> None:
        super().__init__(severity, seed, spec, concepts)
        middles = (torch.arange(1 << 16, dtype=torch.float64) + 0.5) / (1 << 16)
        self._quantiles = torch.special.ndtri(middles).float().numpy()
        self._key = splitmix(np.array([seed], dtype=np.uint64))
        words = -(-math.prod(spec.x_shape) // 4)
        self._counters = np.arange(1, words + 1, dtype=np.uint64) * GOLDEN

    def apply(self, x: torch.Tensor, concept: int, ids: Ids) -> torch.Tensor:
        """See :meth:`Drift.apply`."""
        if concept == 0:
            return x
        keys = splitmix(ids.view(np.uint64) ^ self._key)
        words = splitmix(keys[:, None] + self._counters).view(np.uint16)
        normal = torch.from_numpy(self._quantiles.take(words[:, : math.prod(x.shape[1:])]))
        return x + normal.mul_(_NOISE_STD * self.severity * concept).view_as(x)


class Blur(Drift):
    """Gaussian blur of standard deviation 0.5 pixels x severity x concept; edges are repeated."""

    def __init__(self, severity: float, seed: int, spec: DataSpec, concepts: int) -> None:
        super().__init__(severity, seed, spec, concepts)
        _image_size("blur", spec)

    def apply(self, x: torch.Tensor, concept: int, ids: Ids) -> torch.Tensor:
        """See :meth:`Drift.apply`."""
        sigma = _BLUR_PIXELS * self.severity * concept
        if sigma == 0:
            return x
        radius = math.ceil(3 * exact(_BLUR_PIXELS) * exact(self.severity) * concept)
        kernel = [math.exp(-0.5 * (k / sigma) ** 2) for k in range(radius + 1)]
        total = kernel[0] + 2 * sum(kernel[1:])
        for dim in (-1, -2):  # a sum of shifted images is faster than conv2d on a CPU, and exact
            size = x.shape[dim]
            padded = x.index_select(dim, torch.arange(-radius, size + radius).clamp(0, size - 1))
            x = padded.narrow(dim, radius, size) * (kernel[0] / total)
            for k in range(1, radius + 1):
                pair = padded.narrow(dim, radius - k, size) + padded.narrow(dim, radius + k, size)
                x += pair.mul_(kernel[k] / total)
        return x


class Split(Drift):
    """New classes in each experience: those that occur, in a random order, dealt out evenly.

    A class without training samples is dealt out after them, to be tested on. Severity has no
    meaning here.
    """

    def __init__(self, severity: float, seed: int, spec: DataSpec, concepts: int) -> None:
        super().__init__(severity, seed, spec, concepts)
        require_classes("split", spec)
        if len(spec.labels) < concepts:
            raise ConfigError(
                f"stream.drift = 'split' deals out whole classes, and {concepts} concepts "
                f"(stream.experiences, or stream.recurring) need as many, but the data have "
                f"{len(spec.labels)}"
            )
        order = np.random.default_rng([seed, _SPLIT]).permutation(spec.labels)
        self._concept_of = np.arange(spec.classes) % concepts
        for concept, classes in enumerate(np.array_split(order, concepts)):
            self._concept_of[classes] = concept

    def members(self, labels: Ids, concept: int) -> Mask:
        """See :meth:`Drift.members`."""
        return np.equal(self._concept_of[labels], concept)


class LabelShift(Drift):
    """The same classes in other shares: each concept has a prior, and a class its part of rows.

    Of N_c rows of class c, a share p_c q* / q_c stays, drawn at random, where p is the concept's
    prior, q the data's own, and q* the largest factor for which no share exceeds 1: the largest set
    without repetition that has the prior. Held-out samples have it too.

    Concept 0 is undrifted; the prior of each later one is drawn from a symmetric Dirichlet of
    concentration 1 / severity: every prior is equally likely at severity 1, balanced ones are
    likelier below; at 0 nothing drifts. ``priors`` lists them instead, one for each concept,
    concept 0 included: weights of every class, at least 0, that need not sum to 1.

    Lipton, Wang and Smola, "Detecting and correcting for label shift with black box predictors",
    ICML 2018, whose Dirichlet shift this is.
    """

    def __init__(
        self,
        severity: float,
        seed: int,
        spec: DataSpec,
        concepts: int,
        priors: list[list[float]] | None = None,
    ) -> None:
        super().__init__(severity, seed, spec, concepts)
        require_classes("label_shift", spec)
        self._priors = None if priors is None else _checked_priors(priors, spec.classes, concepts)

    def members(self, labels: Ids, concept: int) -> Mask:
        """See :meth:`Drift.members`."""
        rng = np.random.default_rng([self.seed, _LABELS, concept])
        if self._priors is not None:
            prior = self._priors[concept]
        elif concept == 0 or self.severity == 0:
            return super().members(labels, concept)
        else:
            classes = self.spec.labels
            prior = np.zeros(self.spec.classes)
            prior[classes] = rng.dirichlet(np.full(len(classes), 1 / self.severity))
        counts = np.bincount(labels, minlength=self.spec.classes)
        ratios = np.where(counts > 0, prior / np.maximum(counts, 1), 0.0)
        if not ratios.any():
            raise ConfigError(
                f"stream.drift = 'label_shift': concept {concept} has only classes without samples"
            )
        kept = np.rint(ratios / ratios.max() * counts)
        order = np.lexsort((rng.random(len(labels)), labels))
        place = np.arange(len(labels)) - (counts.cumsum() - counts)[labels[order]]
        mask = np.zeros(len(labels), dtype=np.bool_)
        mask[order] = place < kept[labels[order]]
        return mask


def _checked_priors(priors: Any, classes: int, concepts: int) -> npt.NDArray[np.float64]:
    key = "stream.drift_options.label_shift.priors"
    try:
        table = np.array(priors, dtype=np.float64)
    except (TypeError, ValueError):
        raise ConfigError(f"{key}: must be lists of numbers, one for each concept") from None
    if table.shape != (concepts, classes):
        raise ConfigError(
            f"{key}: must have {concepts} lists (concepts) of {classes} numbers (classes), but has "
            f"shape {list(table.shape)}"
        )
    if not (np.isfinite(table).all() and (table >= 0).all() and table.any(axis=1).all()):
        raise ConfigError(f"{key}: weights must be at least 0, and not all 0 in one concept")
    sums: npt.NDArray[np.float64] = table.sum(axis=1, keepdims=True)
    return table / sums


def _turn(angle: float) -> npt.NDArray[np.float64]:
    """Return the map from output to input of a counterclockwise turn; y points down."""
    c, s = math.cos(angle), math.sin(angle)
    return np.array([[c, -s, 0.0], [s, c, 0.0], [0.0, 0.0, 1.0]])


def require_classes(name: str, spec: DataSpec) -> None:
    """Raise ConfigError naming the schedule if the targets are no class labels, one a sample."""
    if spec.classes == 0 or spec.y_shape:
        have = "several labels a sample" if spec.classes else "floating-point numbers"
        raise ConfigError(
            f"stream.drift = '{name}' needs class labels, but the targets of this stream are {have}"
        )


def _image_size(name: str, spec: DataSpec) -> tuple[int, int]:
    """Return (height, width) of the samples, or raise ConfigError if they are not images."""
    if len(spec.x_shape) != 3:
        raise ConfigError(
            f"stream.drift = '{name}' needs images [C, H, W], but samples have shape "
            f"{list(spec.x_shape)}"
        )
    return spec.x_shape[1], spec.x_shape[2]
