"""From ids to batches on the device: worker processes, datasets as sources, evaluation chunks."""

from __future__ import annotations

import multiprocessing
import os
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np
import torch
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader, Dataset, TensorDataset, default_collate, get_worker_info

from distcl.data.ids import checked_rows
from distcl.data.transforms import training_view
from distcl.errors import DataError, DistclError, UserCodeError, named, told
from distcl.types import Batch, Ids, PyTree, Source, SourceInfo, info_of

T = TypeVar("T")


class BatchPlan(Protocol):
    """What :class:`BatchLoader` needs of a sampler, DistributedWeightedSampler for one."""

    @property
    def first_step(self) -> int:
        """The step at which the next iteration begins."""
        ...

    def __iter__(self) -> Iterator[list[int]]:
        """Yield this rank's ids of one global batch after another; a part may be empty."""
        ...

    def __len__(self) -> int:
        """Return the number of global batches of an epoch."""
        ...

    def total(self, step: int) -> int:
        """Return the size of global batch ``step`` of this epoch."""
        ...


@runtime_checkable
class LanePlan(BatchPlan, Protocol):
    """A plan over lanes, each of which one process is to read, from front to back."""

    @property
    def readers(self) -> int:
        """The number of lanes in which this rank has samples."""
        ...

    def cut(self, step: int, readers: int) -> list[list[int]]:
        """Return this rank's part of a batch as ``readers`` parts, each of its own lanes."""
        ...


class BatchLoader:
    """Yields this rank's part of each global batch, on ``device``; iterate once per epoch. Local.

    ``Batch.total`` is the size of the global batch. A rank without samples in a step gets a batch
    of none, with the trailing shapes of any other. Floating-point tensors are cast to ``dtype``.

    ``workers`` processes read ahead; of a LanePlan each reads lanes of its own, at most as many as
    there are. They keep the copy of ``source`` that they started with, so a source that changes
    needs a new loader. ``pin_memory`` matters with CUDA only. What ``read``
    raises of distcl's own errors arrives as it was, also out of a worker. Random transforms draw by
    (seed, round, epoch) of a plan that tells them by ``view(step)``. Ids in
    whose place another sample was read are added to ``replaced`` of the source's info, here, in the
    main process.
    """

    def __init__(
        self,
        source: Source,
        sampler: BatchPlan,
        *,
        workers: int = 0,
        pin_memory: bool = False,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
    ) -> None:
        self._device = torch.device(device)
        self._dtype = dtype
        self._source = source
        self._readers = 1
        if isinstance(sampler, LanePlan):
            workers = self._readers = min(workers, sampler.readers)
        self._plan = _Steps(sampler, max(1, self._readers))
        info = info_of(source)
        self._replaced = info.replaced if info.replaces else None
        self._reads = _Reads(source)
        self._loader: DataLoader[Any] | None = None
        pinned = pin_memory and self._device.type == "cuda"
        if workers or pinned:
            # how many is the user's decision, and torch would say so again at every round
            warnings.filterwarnings("ignore", "This DataLoader will create", UserWarning)
            self._loader = DataLoader(
                self._reads,
                batch_size=None,
                sampler=self._plan,
                num_workers=workers,
                persistent_workers=workers > 0,
                pin_memory=pinned,
                collate_fn=_unchanged,
                worker_init_fn=_end_with_parent if workers else None,
                generator=torch.Generator(),  # else each epoch would take from the model's numbers
            )

    def __len__(self) -> int:
        return len(self._plan)

    def __iter__(self) -> Iterator[Batch]:
        reads: Iterator[Any]
        if self._loader is None:  # a DataLoader without workers would only cost time at each step
            reads = map(self._reads.__getitem__, self._plan)
        else:
            reads = iter(self._loader)
        for read in reads:
            batch, total = self._batch(read)
            for _ in range(1, self._readers):  # of other lanes of the same step
                more, _ = self._batch(next(reads))
                batch = batch.joined(more) if batch and more else batch or more
            if batch is None:
                batch = self._source.read(np.empty(0, dtype=np.int64))
            yield replace(batch, total=total).to(self._device, self._dtype)

    def _batch(self, read: Any) -> tuple[Batch | None, int]:
        """Return what was read, None if it is nothing, and the size of the global batch."""
        if isinstance(read, DistclError):
            try:
                raise read
            finally:
                del read  # else the traceback is in a cycle, and workers take seconds to end
        if isinstance(read, int):
            return None, read
        batch, asked = Batch(*read[:-1]), read[-1]
        if self._replaced is not None and not torch.equal(asked, batch.ids):
            self._replaced.update(asked[asked != batch.ids].tolist())
        return batch, batch.total


_Step = tuple[list[int], int, bool, tuple[int, ...] | None]


class _Steps:
    """The plan's steps as (ids, size of the global batch, whether that is all of my part, view)."""

    def __init__(self, plan: BatchPlan, readers: int) -> None:
        self._plan = plan
        self._readers = readers

    def __len__(self) -> int:
        return len(self._plan)

    def __iter__(self) -> Iterator[_Step]:
        view_of = getattr(self._plan, "view", lambda _: None)
        for step, ids in enumerate(self._plan, self._plan.first_step):
            total, view = self._plan.total(step), view_of(step)
            if self._readers == 1 or not isinstance(self._plan, LanePlan):
                yield ids, total, True, view
                continue
            for part in self._plan.cut(step, self._readers):  # worker k gets each k-th
                yield part, total, False, view


class _Reads(Dataset[Any]):
    """Reads whole batches, or parts. Returns errors: DataLoader rewrites those that are raised."""

    def __init__(self, source: Source) -> None:
        self._source = source

    def __getitem__(
        self, step: _Step
    ) -> tuple[torch.Tensor, PyTree, PyTree, int, torch.Tensor] | DistclError | int:
        ids, total, whole = np.asarray(step[0], dtype=np.int64), step[1], step[2]
        if not whole and len(ids) == 0:
            return total
        try:
            with training_view(step[3]):
                batch = self._source.read(ids)
        except DistclError as error:
            return error
        except (Exception, SystemExit) as error:  # whatever a user's source raises
            if get_worker_info() is None or (text := told(error)) is None:
                raise
            return UserCodeError(text)  # the traceback does not leave the worker
        # a tuple, which DataLoader knows how to pin; the ids asked for, in case others were read
        return batch.ids, batch.x, batch.y, total, torch.from_numpy(ids)


def _end_with_parent(_: int) -> None:
    """End this worker when the process that it reads for is killed.

    torch's own watch is on the parent by ``getppid``, which under ``forkserver`` is the server.
    """

    def wait() -> None:
        if (parent := multiprocessing.parent_process()) is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _unchanged(read: T) -> T:
    return read


def iterate_chunks(source: Source, ids: Ids, size: int) -> Iterator[Batch]:
    """Yield batches of ``size`` ids, in order, the last one smaller. Local."""
    for start in range(0, len(ids), size):
        yield source.read(ids[start : start + size])


def as_source(data: Source | Dataset[Any]) -> Source:
    """Return ``data`` if it is a source, else a source over a map-style dataset of (x, y) pairs.

    Ids are then positions; tensors keep their types. An attribute ``groups`` [N] of a dataset is
    the concept of each sample, ``classes`` the names of the classes, if they are texts. A
    TensorDataset is read by index, any other dataset sample by sample. Raises DataError if ``data``
    is neither, or has no samples.
    """
    return data if isinstance(data, Source) else DatasetSource(data)


class DatasetSource:
    """A source over a map-style dataset, see :func:`as_source`; ``info``: what is known of it.

    What the dataset raises becomes UserCodeError naming the sample; a sample that is no pair, or of
    another shape than the first, DataError.
    """

    def __init__(self, dataset: Dataset[Any], info: SourceInfo | None = None) -> None:
        name = type(dataset).__name__
        if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
            raise DataError(f"{name} is neither a Source nor a map-style dataset of (x, y) pairs")
        self._dataset = dataset
        if info is None:
            names, columns = getattr(dataset, "classes", ()), getattr(dataset, "columns", {})
            texts = isinstance(names, list | tuple) and all(isinstance(n, str) for n in names)
            groups = getattr(dataset, "groups", None)
            info = SourceInfo(
                name,
                class_names=names if texts else (),
                groups=groups if groups is None else np.asarray(groups),
                columns=columns if isinstance(columns, Mapping) else {},
            )
        self.info = info
        self._rows: Ids | None = None  # position in the dataset of each id; None: the same
        self._shapes = ""  # of the first sample that was read
        self._size = len(dataset)
        if self._size == 0:
            raise DataError(f"{name} has no samples")

    def __len__(self) -> int:
        return self._size if self._rows is None else len(self._rows)

    def part(self, rows: Ids, info: SourceInfo) -> DatasetSource:
        """Return a source of some of the samples, of which ``info`` holds."""
        part = DatasetSource(self._dataset, info)
        part._rows, part._shapes = rows, self._shapes
        return part

    def read(self, ids: Ids) -> Batch:
        """See :meth:`distcl.types.Source.read`."""
        ids = checked_rows(ids, len(self), self.info.name)
        if len(ids) == 0:
            one = self.read(np.zeros(1, dtype=np.int64))
            x, y = tree_map(lambda t: t[:0], (one.x, one.y))
            return Batch(torch.from_numpy(ids), x, y)
        x, y = self._pair(ids if self._rows is None else self._rows[ids])
        return Batch(torch.from_numpy(ids), x, y, len(ids))

    def _pair(self, rows: Ids) -> tuple[PyTree, PyTree]:
        if isinstance(self._dataset, TensorDataset):
            pair = self._dataset[torch.from_numpy(rows)]
            if len(pair) != 2:
                raise DataError(f"{self.info.name}: a sample must be a pair (x, y)")
            return pair[0], pair[1]
        samples = [self._sample(row) for row in rows.tolist()]
        try:
            x, y = default_collate(samples)
        except (TypeError, RuntimeError, KeyError, ValueError) as error:
            with suppress(TypeError):  # of what cannot be a batch by itself either
                for row, sample in zip(rows.tolist(), samples, strict=True):
                    self._check(row, default_collate([sample]))
            raise DataError(
                f"{self.info.name}: samples {rows.tolist()[:8]} do not make a batch ({error})"
            ) from error
        self._check(rows[0], (x, y))
        return x, y

    def _check(self, row: int, batch: tuple[PyTree, PyTree]) -> None:
        """Raise DataError naming the sample if a batch is not of the shapes of the first ever."""
        x, y = tree_map(lambda t: list(t.shape[1:]) if hasattr(t, "shape") else t, tuple(batch))
        found = f"x {x}, y {y}"
        self._shapes = self._shapes or found
        if found != self._shapes:
            raise DataError(
                f"{self.info.name}: sample {row} has shapes {found}, but others {self._shapes}"
            )

    def _sample(self, row: int) -> Any:
        try:
            sample = self._dataset[row]
        except DistclError:
            raise
        except Exception as error:  # whatever a user's dataset raises
            text = told(error) or named(error)
            raise UserCodeError(f"{self.info.name}, sample {row}: {text}") from error
        if not isinstance(sample, list | tuple) or len(sample) != 2:
            raise DataError(f"{self.info.name}: a sample must be a pair (x, y), see sample {row}")
        return sample
