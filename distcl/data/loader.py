"""From ids to batches on the device: worker processes, datasets as sources, evaluation chunks."""

from __future__ import annotations

import multiprocessing
import os
import threading
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np
import torch
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader, Dataset, TensorDataset, default_collate, get_worker_info

from distcl.data.ids import checked_rows
from distcl.data.transforms import training_view
from distcl.errors import DataError, DistclError, UserCodeError, told
from distcl.types import Batch, Ids, PyTree, Source, info_of

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

    Ids are then positions; tensors keep their types. A TensorDataset is read by index, any other
    dataset sample by sample. Raises DataError if ``data`` is neither, or has no samples.
    """
    return data if isinstance(data, Source) else _DatasetSource(data)


class _DatasetSource:
    def __init__(self, dataset: Dataset[Any]) -> None:
        self._name = type(dataset).__name__
        if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
            raise DataError(
                f"{self._name} is neither a Source nor a map-style dataset of (x, y) pairs"
            )
        self._dataset = dataset
        self._len = len(dataset)
        if self._len == 0:
            raise DataError(f"{self._name} has no samples")

    def __len__(self) -> int:
        return self._len

    def read(self, ids: Ids) -> Batch:
        """See :meth:`distcl.types.Source.read`."""
        ids = checked_rows(ids, self._len, self._name)
        if len(ids) == 0:
            one = self.read(np.zeros(1, dtype=np.int64))
            x, y = tree_map(lambda t: t[:0], (one.x, one.y))
            return Batch(torch.from_numpy(ids), x, y)
        pair = self._pair(ids)
        if not isinstance(pair, Sequence) or len(pair) != 2:
            raise DataError(f"{self._name}: a sample must be a pair (x, y)")
        return Batch(torch.from_numpy(ids), pair[0], pair[1], len(ids))

    def _pair(self, ids: Ids) -> Any:
        if isinstance(self._dataset, TensorDataset):
            return self._dataset[torch.from_numpy(ids)]
        samples = [self._dataset[i] for i in ids.tolist()]
        try:
            return default_collate(samples)
        except (TypeError, RuntimeError) as error:
            raise DataError(
                f"{self._name}: samples {ids.tolist()[:8]} do not make a batch ({error})"
            ) from error
