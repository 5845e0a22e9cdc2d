"""The global batches of a sampler, as ``accelerator.prepare`` takes and cuts them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol, SupportsIndex

from torch.utils.data import Sampler

from distcl.data.ids import part_of
from distcl.errors import UsageError
from distcl.sampling.sampler import DistributedWeightedSampler


class _Settings(Protocol):
    """What is asked of an ``accelerate.Accelerator``."""

    num_processes: int
    split_batches: bool
    dispatch_batches: bool | None
    torch_device_mesh: Any


class _Consumed:
    """Stands for an id of a batch that was trained on before the sampler's state was saved."""

    def __index__(self) -> int:
        raise UsageError(
            "this batch was trained on before the sampler's state was saved: begin with "
            "accelerate.skip_first_batches(loader, state['step'])"
        )


_CONSUMED = _Consumed()


class GlobalView(Sampler[list[SupportsIndex]]):
    """A sampler's global batches for ``accelerator.prepare``, which deals them to the processes.

    ``accelerator.prepare(DataLoader(dataset, batch_sampler=GlobalView(sampler, accelerator)))``
    gives each process its part of the sampler's own batches, at any number of processes, as a
    sampler with ``rank`` and ``world_size`` does in a loader that is not prepared. Local, and every
    process makes one, with equal weights.

    It yields the parts of each batch one after another, or, where the accelerator has
    ``split_batches``, whole batches; so ``even_batches`` finds nothing to add. Sizes of parts
    differ by at most one, of the last batch too. What cannot be so is refused with UsageError: a
    last batch with fewer samples than processes; with ``split_batches``, any smaller last batch,
    and a batch size that the processes do not divide; ``dispatch_batches``; tensor, context and
    sequence parallelism.

    Prepared loaders read one batch ahead, and workers ``num_workers * prefetch_factor`` more:
    after n batches, weights may change from step n + 1, or so much later, on (``from_step``).
    They count epochs from 0 on (``loader.iteration``), and lose ``set_epoch`` where batches are
    skipped: going back to an epoch, or through one twice, is refused. To resume, load the sampler's
    state, set ``loader.iteration = sampler.epoch``, and skip what was trained on, state["step"],
    by ``skip_first_batches`` or a StatefulDataLoader's own state.

    Args:
        sampler: of global batches: made without ``rank`` and ``world_size``.
        accelerator: the ``accelerate.Accelerator`` that prepares the loader.
    """

    drop_last = False  # the sampler has done it

    def __init__(self, sampler: DistributedWeightedSampler, accelerator: _Settings) -> None:
        if sampler.world_size > 1:
            raise UsageError(
                "GlobalView takes a sampler of global batches: make it without rank and world_size"
            )
        if accelerator.dispatch_batches:
            raise UsageError(
                "dispatch_batches has one process read every batch and pads the last: set it to "
                "False in DataLoaderConfiguration"
            )
        mesh = accelerator.torch_device_mesh
        for name in ("tp", "cp", "sp"):
            if mesh is not None and name in mesh.mesh_dim_names and mesh[name].size() > 1:
                raise UsageError(
                    f"GlobalView cuts batches for data parallelism; the accelerator has a "
                    f"'{name}' dimension of {mesh[name].size()}"
                )
        self._plan = sampler
        self._world = accelerator.num_processes
        self._whole = accelerator.split_batches
        self._ended: tuple[int, int] | None = None
        size = sampler.global_batch_size
        if size < self._world or (self._whole and size % self._world):
            raise UsageError(
                f"batches of {size} samples cannot be split over {self._world} processes"
                + (" by split_batches: set it to False" if size >= self._world else "")
            )

    @property
    def sampler(self) -> GlobalView:
        """Itself: Accelerate looks here for ``set_epoch``."""
        return self

    @property
    def batch_size(self) -> int:
        """The global batch size, where batches are whole; else AttributeError, as if absent."""
        if not self._whole:
            raise AttributeError("parts of batches have no one size")
        size: int = self._plan.global_batch_size
        return size

    def __len__(self) -> int:
        """Return the number of lists that an epoch has: of whole batches, or of parts."""
        return len(self._plan) * (1 if self._whole else self._world)

    def set_epoch(self, epoch: int) -> None:
        """Begin another epoch. Raises UsageError for one before the sampler's own."""
        if epoch < self._plan.epoch:
            raise UsageError(
                f"the loader begins epoch {epoch}, but its sampler is in epoch {self._plan.epoch}: "
                f"set loader.iteration = {self._plan.epoch} (or the sampler's epoch)"
            )
        self._plan.set_epoch(epoch)

    def __iter__(self) -> Iterator[list[SupportsIndex]]:
        """Yield each batch, or its parts in order of rank; of batches consumed, what raises."""
        plan, now = self._plan, (self._plan.round_index, self._plan.epoch)
        if self._ended == now:
            raise UsageError(
                f"epoch {now[1]} was drawn to its end: call loader.set_epoch({now[1] + 1}) before "
                "the next (after skip_first_batches, the loader it was given has not counted it)"
            )
        last = plan.total(len(plan) - 1) if len(plan) else plan.global_batch_size
        if last < (plan.global_batch_size if self._whole and self._world > 1 else self._world):
            raise UsageError(
                f"the last batch of {last} samples cannot be split over {self._world} processes"
                f"{' by split_batches' * self._whole}: make the sampler with drop_last=True"
            )
        for step in range(plan.first_step):
            yield from self._cut([_CONSUMED] * plan.total(step))
        for batch in plan:
            yield from self._cut(batch)
        self._ended = now

    def _cut(self, batch: list[Any]) -> Iterator[list[SupportsIndex]]:
        if self._whole:
            yield batch
            return
        for rank in range(self._world):
            first, end = part_of(len(batch), rank, self._world)
            yield batch[first:end]
