"""Experiences under drift over any source, and how a configuration becomes such a stream."""

from __future__ import annotations

import inspect
from dataclasses import replace

import numpy as np
import torch
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from distcl import registry
from distcl.config import DataConfig, StreamConfig
from distcl.data.drift import Drift, require_classes
from distcl.data.general import General
from distcl.data.ids import BLOCK, blocks, in_runs
from distcl.data.labels import SourceSplit, data_spec, groups_in
from distcl.data.loader import as_source
from distcl.data.sources.grouping import regrouped
from distcl.data.sources.joined import join_sources
from distcl.data.sources.npy import check_files
from distcl.data.transforms import Transformed, Transforms
from distcl.errors import ConfigError, DataError
from distcl.types import (
    Batch,
    DataSpec,
    Experience,
    Ids,
    Mask,
    PyTree,
    Source,
    SourceInfo,
    exact,
    frozen,
    info_of,
    pack_ids,
    unpack_ids,
)

_ORDER = 4  # tells the stream's own draws from those of the drifts


def create_stream(config: StreamConfig, seed: int, data: DataConfig | None = None) -> DriftStream:
    """Return the stream that ``[stream]`` describes. Local. Raises ConfigError or DataError."""
    data = data or DataConfig()
    general = config.general_data
    more = () if general is None else create_sources(general, data)[:1]
    return DriftStream(*create_sources(config, data), config, seed, *more)


def create_sources(config: StreamConfig, data: DataConfig) -> tuple[Source, Source]:
    """Return the sources, (train, test), that ``[stream]`` names, without any drift. Local.

    The source's factory, built in or the user's own, takes the StreamConfig and, as keywords,
    ``stream.options`` and, if it has a parameter ``data``, the DataConfig; see
    :class:`distcl.types.Source` for what it returns. Files in ``stream.sha256`` are checked first.
    ``data.transforms`` apply to every source. Raises ConfigError or DataError.
    """
    if config.listed:
        trains, tests = zip(*(create_sources(each, data) for each in config.listed), strict=True)
        return join_sources(config, trains), join_sources(config, tests)
    transforms = Transforms(data.transforms)
    check_files(config)
    options = dict(config.options)
    if "data" in inspect.signature(registry.resolve("source", config.source)).parameters:
        options["data"] = data
    made = registry.create("source", config.source, config, options=options)
    if not isinstance(made, tuple) or len(made) != 2:
        raise ConfigError(
            f"stream.source = '{config.source}' must return two sources, (train, test)"
        )
    train, test = (
        source if not transforms or info_of(source).transformed else Transformed(source, transforms)
        for source in map(as_source, made)
    )
    return train, test


class DriftStream:
    """A stream (:class:`distcl.types.Stream`): its experiences are views of (train, test).

    An id packs the experience and the row of the base source, and alone determines its sample:
    ``read`` gives the same bits for it in whatever batch it comes, but for random transforms. Ids
    of an experience's training samples are unique and in stream order (a shuffle by seed); held-out
    ids are in row order.

    Experience e has concept e, or e mod K under ``recurring = K``: the drift is that of an earlier
    experience, the ids are not.

    Along the first ``transition_fraction`` of the stream order, samples still come from the concept
    before, with a probability that falls from 1 to 0 linearly: rows that the older concept has and
    the experience does not use yet, under the older drift.

    What the sources say of themselves (:class:`distcl.types.SourceInfo`) says which samples an
    experience takes, and in which order. With floating-point y the stream is one for regression
    (``spec.classes`` is 0), and schedules that choose samples by class do not fit. In the place of
    a bad sample another one may be read, by its id; ``info.replaced`` remembers the ids asked for.
    Ids of training samples of a sequential source are kept in runs (:class:`data.ids.IdRuns`) if
    these are long.

    Raises ConfigError naming the key that does not fit the data, DataError on bad data.
    """

    def __init__(
        self,
        train: Source,
        test: Source,
        config: StreamConfig,
        seed: int,
        general: Source | None = None,
    ) -> None:
        self._train, self._test = self.sources = as_source(train), as_source(test)
        splits = SourceSplit(self._train, "train"), SourceSplit(self._test, "test")
        infos = regrouped(config, [s.info for s in splits], [len(s.source) for s in splits])
        for split, info in zip(splits, infos, strict=True):
            split.info = info
        self.spec = data_spec(*splits)
        self._concepts = groups_in(splits, config)
        count = config.stated or self._concepts
        self._config = config = config.model_copy(update={"experiences": count})
        self._seed = seed
        drifts = self._create_drifts()
        if any(type(d).members is not Drift.members for d in drifts):
            for split in splits:
                split.learn()
            there = splits[0].occurring(self.spec.classes)
            if there != self.spec.occurring:  # known only now, of a stream
                self.spec = replace(self.spec, occurring=there)
                drifts = self._create_drifts()
        self._promises = [isinstance(s.labels, int) and not s.y_shape for s in splits]
        self._members = [d.members for d in drifts if type(d).members is not Drift.members]
        self._apply = [d.apply for d in drifts if type(d).apply is not Drift.apply]
        gradual = config.transition_fraction > 0
        self._older = np.zeros((count if gradual else 0, len(self._train)), np.bool_)
        """Whether a row of an experience still comes from the concept before."""
        self._sorted: tuple[object, Ids] = (None, np.empty(0, dtype=np.int64))  # of one experience
        own = splits[0].info
        self.general, every = None, [split.info for split in splits]
        if general is not None:
            every.append(info_of(general))
            self.general = General(general, splits[0], self.spec)
            self.spec = self.general.spec
        self.info = SourceInfo(
            sequential=own.sequential,
            live_seconds=own.live_seconds,
            replaces=any(split.info.replaces for split in splits),
            varies=any(info.varies for info in every),
            unusable=sum(int((~s.usable).sum()) for s in splits if s.usable is not None),
            general=None if self.general is None else self.general.ids,
        )
        self.experiences = [self._experience(e, *splits) for e in range(count)]

    def _create_drifts(self) -> list[Drift]:
        config = self._config
        return [
            _create_drift(name, config, self._seed, self.spec, self._concepts, self._train)
            for name in config.drifts
        ]

    def __len__(self) -> int:
        return sum(len(e.train) for e in self.experiences)

    def read(self, ids: Ids) -> Batch:
        """Read samples by id, in the order asked. Local. Raises DataError naming a bad id.

        In the place of a bad one that may be replaced comes the next sound one of its experience
        and split, by row, under its own id; DataError if there is none.
        """
        if self.general is not None and self.general.holds(ids).any():
            return self.general.read(ids, self)
        batch = self._read(ids)
        sound = batch.ids.numpy()
        return batch if np.array_equal(sound, ids) else self._read(sound)

    def _read(self, ids: Ids) -> Batch:
        """Read samples; where one is bad, only the id is that of the sample to read instead."""
        ids = np.array(ids, dtype=np.int64)
        rows, concept, test = self.locate(ids)
        group = concept * 2 + test if self._apply else test.astype(np.int64)
        if len(ids) == 0 or (group == group[0]).all():
            x, y = self._read_group(ids, rows, slice(None), int(group[0]) if len(ids) else 0)
            return Batch(torch.from_numpy(ids), x, y, len(ids))
        places = [np.flatnonzero(group == g) for g in np.unique(group)]
        parts = [self._read_group(ids, rows, p, int(group[p[0]])) for p in places]
        back = torch.from_numpy(np.argsort(np.concatenate(places)))
        x, y = tree_map(lambda *some: torch.cat(some).index_select(0, back), *parts)
        return Batch(torch.from_numpy(ids), x, y, len(ids))

    def arrived(self) -> int:
        """Return how many training samples have come since the last look. Local; live streams."""
        return int(self._train.arrived())  # type: ignore[attr-defined]

    def grow(self, more: int) -> Ids:
        """Take in ``more`` training samples that have come; return their ids. Local.

        Raises DataError naming a sample of a class that the stream had not at its start.
        """
        before = self._train.grow(more)  # type: ignore[attr-defined]
        rows, info = np.arange(before, len(self._train)), info_of(self._train)
        labels, usable = info.known_labels(), info.known_usable()
        if labels is not None and labels[rows].max() >= self.spec.classes:
            row = int(rows[labels[rows].argmax()])
            raise DataError(
                f"sample {row}, new in the stream, has label {labels[row]}; the stream began with "
                f"labels below {self.spec.classes}"
            )
        if labels is None and info.classes > self.spec.classes > 0:
            raise DataError(
                f"among samples {before} to {len(self._train) - 1}, new in the stream, is a label "
                f"above {self.spec.classes - 1}; the stream began with labels below "
                f"{self.spec.classes}"
            )
        if usable is not None:
            bad = int((~usable[rows]).sum())
            self.info = replace(self.info, unusable=self.info.unusable + bad)
            rows = rows[usable[rows]]
        return pack_ids(0, rows)

    def lanes_of(self, ids: Ids, lanes: int) -> Ids:
        """Return which of ``lanes`` equal runs of shards each training sample is in, [N]. Local.

        For sequential sources only.
        """
        shard, shards = self._train.shards_of(unpack_ids(ids)[1])  # type: ignore[attr-defined]
        lane: Ids = shard * lanes // shards
        return lane

    def locate(self, ids: Ids) -> tuple[Ids, Ids, Mask]:
        """Return (base row [B], concept [B], is_test [B]) of ids; DataError if one is unknown."""
        experience, rows, test = unpack_ids(ids)
        sizes = np.where(test, len(self._test), len(self._train))
        bad = (ids < 0) | (experience >= len(self.experiences)) | (rows >= sizes)
        if bad.any():
            i = int(bad.argmax())
            raise DataError(
                f"sample {ids[i]} is not in the stream: experience {experience[i] + 1} of "
                f"{len(self.experiences)}, {'test' if test[i] else 'train'} row {rows[i]} of "
                f"{sizes[i]}"
            )
        if len(self._older):
            experience = experience - (self._older[experience, np.where(test, 0, rows)] & ~test)
        return rows, experience % self._concepts, test

    def _read_group(
        self, ids: Ids, rows: Ids, places: Ids | slice, group: int
    ) -> tuple[PyTree, PyTree]:
        """Read the samples at ``places``, of one split and concept, and let them drift.

        Where one is bad, the id of the sample to read instead is put into ``ids``.
        """
        concept, test = divmod(group, 2)
        source = self._test if test else self._train
        base = source.read(rows[places])
        classes, y = self.spec.classes, base.y
        if self._promises[test] and isinstance(y, torch.Tensor) and (y >= classes).any():
            raise DataError(
                f"row {int(base.ids[y.argmax()])} of the {'test' if test else 'train'} source has "
                f"label {int(y.max())}, but the source says that there are {classes} classes"
            )
        if self.info.replaces:
            shift = base.ids.numpy() - rows[places]
            self.info.replaced.update(ids[places][shift != 0].tolist())
            for k in np.arange(len(ids))[places][shift != 0]:
                ids[k] = self._stand_in(int(ids[k]), source)
        ids = ids[places]
        if not self._apply or len(ids) == 0:
            return base.x, base.y
        (x,), tree = tree_flatten(base.x)
        shape = x.shape
        for apply in self._apply:
            x = apply(x, concept, ids)
            if x.shape != shape:
                raise ConfigError(
                    f"stream.drift = {self._config.drift!r} turned x {list(shape)} into "
                    f"{list(x.shape)}"
                )
        return tree_unflatten([x], tree), base.y

    def _stand_in(self, id_: int, source: Source) -> int:
        """Return the next sound sample of a bad one's experience and split, by row."""
        (e,), _, (test,) = unpack_ids(np.array([id_]))
        experience = self.experiences[e]
        if self._sorted[0] != (e, test):
            self._sorted = (e, test), np.sort(experience.test if test else experience.train)
        held, k = self._sorted[1], 0
        first, n = int(np.searchsorted(held, id_, "right")), len(held)
        while k < n:  # those behind it, then those before it
            other = held[(first + k) % n]
            row = unpack_ids(np.array([other]))[1]
            found = source.read(row).ids.numpy()
            if found == row:
                return int(other)
            # none is sound from there to what was found; it is of another experience
            to = (int(np.searchsorted(held, pack_ids(e, found, test=test))[0]) - first) % n
            k = to if to > k else n
        raise DataError(
            f"experience {e + 1} has {len(held)} {'held-out' if test else 'training'} samples, and "
            "not one of them can be read"
        )

    def _experience(self, e: int, train: SourceSplit, test: SourceSplit) -> Experience:
        chosen = self._members or len(self._older) or self._config.samples_per_experience
        if self.info.sequential and not chosen:
            parts = (slice(at, at + BLOCK) for at in range(0, len(self._train), BLOCK))
            ids = in_runs(  # in the source's own order, never all at once
                pack_ids(e, part.start + np.flatnonzero(self._members_of(train, e, part)))
                for part in parts
            )
        else:
            ids = self._shuffled(e, train)
        held_out = np.flatnonzero(self._members_of(test, e))
        if len(ids) == 0 or len(held_out) == 0:
            part = "training" if len(ids) == 0 else "test"
            raise DataError(f"experience {e + 1} has no {part} samples")
        names = train.info.group_names
        name = names[e % self._concepts] if names else f"{'+'.join(self._config.drifts)} {e}"
        return Experience(e, ids, frozen(pack_ids(e, held_out, test=True)), name)

    def _shuffled(self, e: int, train: SourceSplit) -> Ids:
        """Return the ids of an experience in stream order."""
        rng = np.random.default_rng([self._seed, _ORDER, e])
        rows = np.flatnonzero(self._members_of(train, e))
        rng.shuffle(rows)
        wanted = self._config.samples_per_experience
        if wanted > len(rows):
            raise ConfigError(
                f"stream.samples_per_experience = {wanted}, but experience {e + 1} has {len(rows)}"
            )
        rows = rows[:wanted].copy() if wanted else rows
        if self.info.sequential or self.info.live_seconds:
            rows.sort()
        if e > 0 and len(self._older) and self._concepts > 1:
            self._blend(e, rows, self._members_of(train, e - 1), rng)
        rows |= pack_ids(e, 0)  # in place: there may be very many
        return in_runs(blocks(rows)) if self.info.sequential else frozen(rows)

    def _members_of(self, split: SourceSplit, e: int, rows: slice | None = None) -> Mask:
        """Return which rows, of all or of a slice, the concept of experience e has."""
        usable, groups, labels = split.usable, split.info.groups, split.labels
        n = len(split.source)
        rows = slice(0, n) if rows is None else rows
        mask = np.ones(min(rows.stop, n) - rows.start, dtype=np.bool_)
        if usable is not None:
            mask &= usable[rows]
        if groups is not None:
            mask &= groups[rows] == e % self._concepts
        for members in self._members:
            assert isinstance(labels, np.ndarray)  # what chooses by class is refused without any
            if usable is None:
                mask &= members(labels, e % self._concepts)[rows]
            else:  # a bad sample has no class
                chosen = np.zeros(len(labels), dtype=np.bool_)
                chosen[usable] = members(labels[usable], e % self._concepts)
                mask &= chosen[rows]
        return mask

    def _blend(self, e: int, rows: Ids, before: Mask, rng: np.random.Generator) -> None:
        """Let early places of the stream order ``rows`` come from the concept before, in place."""
        n = -int(-exact(self._config.transition_fraction) * len(rows) // 1)  # rounded up
        older = np.pad(rng.random(n) < 1 - np.arange(n) / n, (0, len(rows) - n))
        unused = before.copy()
        unused[rows[~older]] = False
        pool = rng.permutation(np.flatnonzero(unused))[: older.sum()]
        if len(pool) < older.sum():
            raise ConfigError(
                f"stream.transition_fraction = {self._config.transition_fraction} asks for "
                f"{older.sum()} samples of experience {e} in experience {e + 1}, but there are "
                f"{len(pool)}"
            )
        rows[older] = pool
        self._older[e, pool] = True


def _create_drift(
    name: str, config: StreamConfig, seed: int, spec: DataSpec, concepts: int, source: Source
) -> Drift:
    options = config.drift_options.get(name, {})
    drift = registry.create("drift", name, config.severity, seed, spec, concepts, options=options)
    if not isinstance(drift, Drift):
        raise ConfigError(f"stream.drift = '{name}' is not a distcl.data.drift.Drift")
    if type(drift).members is not Drift.members:
        require_classes(name, spec)
    if type(drift).apply is not Drift.apply:
        leaves = tree_leaves(source.read(np.empty(0, dtype=np.int64)).x)
        if len(leaves) != 1:
            raise ConfigError(
                f"stream.drift = '{name}' changes one tensor, but samples have {len(leaves)}"
            )
        if not leaves[0].is_floating_point():
            raise ConfigError(
                f"stream.drift = '{name}' needs floating-point samples, not {leaves[0].dtype}"
            )
    return drift
