"""Who I am among the processes, what I run on, how ranks talk and fail together."""

from __future__ import annotations

import atexit
import os
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from distcl.config import ParallelConfig, RunConfig, TrainingConfig
from distcl.distributed.environment import adopt, check_launch, check_launcher
from distcl.distributed.failure import (
    Cause,
    FailureRelay,
    PeerFailure,
    cause_of,
    is_connection_loss,
)
from distcl.distributed.memory import keep_freed_memory
from distcl.distributed.rendezvous import first_line, introduce, must_meet, tell_stderr
from distcl.distributed.watchdog import Watchdog
from distcl.errors import DistclError, Preempted, UsageError

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

    from distcl.parallel.strategy import MakeOptimizer, Strategy

T = TypeVar("T")

_STRATEGIES = {
    "ddp": "distcl.parallel.ddp:DDP",
    "fsdp2": "distcl.parallel.fsdp2:FSDP2",
    **dict.fromkeys(("zero1", "zero2", "zero3"), "distcl.parallel.zero:Zero"),
}
"""Layouts stand above this module, which names the one that is to join the process group."""

_GATHERED = 1 << 16  # rows of a rank that are gathered together

_AGREE_SECONDS = 5.0
_left: list[Any] = []
"""Process groups that were left. A model wrapped by DDP holds its group too; were that the last
reference, freeing the model could wait for ever for the group's threads (torch 2.13, gloo)."""


def was_in_a_group() -> bool:
    """Tell whether this process is, or was, one of several. Local."""
    return bool(_left) or dist.is_initialized()


class Runtime:
    """This process among its peers. Making one is collective: every rank makes exactly one.

    Attributes: ``rank``, ``world_size``, ``device``, ``dtype`` (of the model's weights: float64
    under ``fp64``, else float32), ``peers`` (every process, in rank order), ``about`` (one line:
    what started the run, which rank is where), ``strategy`` (of ``parallel.strategy``: what trains
    and spreads the model).

    Raises UsageError if fewer processes exist than were asked for, if they cannot work together
    (see ``distributed.rendezvous``), or on a strategy or precision that this machine cannot run.
    """

    def __init__(
        self,
        run: RunConfig | None = None,
        parallel: ParallelConfig | None = None,
        training: TrainingConfig | None = None,
    ) -> None:
        run, parallel = run or RunConfig(), parallel or ParallelConfig()
        launch = adopt(os.environ)
        started = check_launch(os.environ, parallel.processes)
        if started > 1 and _left:
            raise UsageError(
                f"the {started} processes of this launch have had their run, and their group is "
                "gone: start them anew for each further run, prediction or evaluation"
            )
        training = training or TrainingConfig()
        check_launcher(run, parallel, training)
        if run.precision == "fp16" and not torch.cuda.is_available():
            raise UsageError("run.precision = 'fp16' needs a GPU; on a CPU use 'bf16' or 'fp32'")
        self.precision = run.precision
        self.dtype = torch.float64 if run.precision == "fp64" else torch.float32
        with must_meet(launch, run.timeout_seconds):
            make = resolve_name(_STRATEGIES[parallel.strategy])
            self.strategy: Strategy = make(run, parallel, training)
        joined = self.strategy.accelerator
        self.rank: int = joined.process_index
        self.world_size: int = joined.num_processes
        self.device: torch.device = joined.device
        if self.device.type == "cpu":
            keep_freed_memory()
        if self.world_size != started:
            raise UsageError(
                f"{started} processes were started but they see {self.world_size}; "
                f"type: torchrun --nproc-per-node {started} -m distcl …"
            )
        self._raised = 0
        store: Store | None = None
        if self.world_size > 1:  # torch has no public name for it
            store = dist.distributed_c10d._get_default_store()
        self._store = store
        with must_meet(launch, run.timeout_seconds):
            self.peers = introduce(store, self.device, launch)
        self.about = first_line(launch, self.peers)
        self.watchdog = Watchdog(self.rank, self.world_size, run.timeout_seconds, store)
        self.relay: FailureRelay | None = None
        if store is not None:
            self.relay = FailureRelay(
                store, self.rank, tell_stderr, self.world_size, run.timeout_seconds
            )
            atexit.register(self.relay.close)  # a thread in the store would abort the exit

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, the only one that prints and writes shared files."""
        return self.rank == 0

    # -- the model ---------------------------------------------------------------------------

    def prepare(self, model: nn.Module) -> nn.Module:
        """Move a model to the device and wrap it; its optimizer is yours (ddp, fsdp2). Collective.

        Raises UsageError where the strategy needs the optimizer too (zero1, zero2, zero3).
        """
        return self.strategy.prepare(model, None)[0]

    def prepare_training(
        self, model: nn.Module, make_optimizer: MakeOptimizer, unused: Collection[str] = ()
    ) -> tuple[nn.Module, torch.optim.Optimizer]:
        """Return a model, wrapped for training, and its optimizer. Collective.

        ``make_optimizer`` is called with the parameters that take gradients, once they are where
        the strategy wants them. ``unused``: those that get none in some forwards, as far as known.
        """
        return self.strategy.prepare_training(model, make_optimizer, unused)

    # -- collectives -------------------------------------------------------------------------

    def share(self, n: int) -> tuple[int, int]:
        """Return this rank's contiguous part [start, stop) of n items: ceil(n/W) each. Local."""
        each = -(-n // self.world_size)
        return min(self.rank * each, n), min((self.rank + 1) * each, n)

    def all_gather(self, mine: torch.Tensor, n: int, each: int = 0) -> torch.Tensor:
        """Gather contiguous slices into [n, ...] on every rank. Collective.

        ``each`` rows lie on every rank but the last ones, which may hold fewer or none; by default
        ceil(n/W), as :meth:`share` cuts them.
        """
        self.watchdog.beat()
        if self.world_size == 1:
            return mine
        each = each or -(-n // self.world_size)
        if each <= _GATHERED:
            return _gathered(mine, each, self.world_size)[:n]
        out = mine.new_empty((n, *mine.shape[1:]))
        for start in range(0, each, _GATHERED):  # only the result is to be large
            size = min(_GATHERED, each - start)
            every = _gathered(mine[start : start + size], size, self.world_size)
            for rank in range(self.world_size):
                begin, end = (min(rank * each + at, n) for at in (start, start + size))
                out[begin:end] = every[rank * size : rank * size + end - begin]
        return out

    def all_reduce(self, tensor: torch.Tensor, op: str = "sum") -> torch.Tensor:
        """Reduce in place over ranks, ``op`` = sum, max or min; return the tensor. Collective."""
        self.watchdog.beat()
        if self.world_size > 1:
            dist.all_reduce(tensor, getattr(dist.ReduceOp, op.upper()))
        return tensor

    def reduce(self, tensor: torch.Tensor, to: int) -> torch.Tensor:
        """Sum over ranks into the tensor of rank ``to``; other ranks' are spoilt. Collective."""
        if self.world_size > 1:
            dist.reduce(tensor, to)
        return tensor

    def broadcast(self, value: T) -> T:
        """Return rank 0's value (any picklable object) on every rank. Collective."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def gather_objects(self, value: T) -> list[T]:
        """Return every rank's value (any picklable object) on every rank. Collective."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        """Wait for every rank. Collective."""
        self.watchdog.beat()
        if self.world_size > 1:
            dist.barrier()

    def all_raised(self) -> bool:
        """Tell whether all ranks are handling an exception, within seconds; never blocks for good.

        Call it once while handling one. Afterwards ranks may talk only if the answer was yes.
        """
        store = self._store
        if store is None:
            return True
        self._raised += 1
        key = f"distcl/raised/{self._raised}"
        count, deadline = store.add(key, 1), time.monotonic() + _AGREE_SECONDS
        while count < self.world_size and time.monotonic() < deadline:
            time.sleep(0.05)
            count = store.add(key, 0)
        return count >= self.world_size

    # -- the end -----------------------------------------------------------------------------

    def on_failure(self, tell: Callable[[Cause], None], note: Callable[[Cause], None]) -> None:
        """Set who is told, on this rank, that another failed, and who notes it first. Local."""
        if self.relay is not None:
            self.relay.tell, self.relay.note = tell, note

    @contextmanager
    def guard(self) -> Iterator[None]:
        """Run the body such that an exception on any rank ends all ranks with its cause.

        On rank 0 the exception that leaves this is the first cause, even if rank 0 itself only saw
        a broken connection. The process group is gone afterwards. Inside, a watchdog names ranks
        that hang. Collective.
        """
        try:
            with self.watchdog:
                yield
        except Preempted:  # raised on all ranks together
            self.close()
            raise
        except BaseException as error:
            if self.relay is not None:
                own = cause_of(error, self.rank)
                lost = is_connection_loss(error)
                if lost:
                    verdict = self.watchdog.verdict()
                    told = f"{verdict}; log.txt has its stack" if verdict else self.relay.missing()
                    own = Cause(self.rank, 1, f"{own.message}; {told}" if told else own.message)
                first = self.relay.report(own)
                if first.message != own.message or lost:
                    raise PeerFailure(first) from error
            raise
        self.close()

    def close(self) -> None:
        """Leave the process group; call it once, at the end. Collective."""
        if self.relay is not None:
            self.barrier()
            self.relay.close()
            self.relay = None
            self.barrier()
        if dist.is_initialized():
            _left.append(dist.group.WORLD)
            dist.destroy_process_group()


def _gathered(mine: torch.Tensor, each: int, world_size: int) -> torch.Tensor:
    """Return [each · W, ...]: every rank's rows, zeros after those that it has not. Collective."""
    padded = mine.new_zeros((each, *mine.shape[1:]))
    padded[: len(mine)] = mine
    out = mine.new_empty((each * world_size, *mine.shape[1:]))
    dist.all_gather_single(out, padded)
    return out


def raise_together(runtime: Runtime, error: DistclError | None) -> None:
    """Raise on every rank what the first rank that has one found wrong; None: nothing. Collective.

    A run that rolls back does so on all ranks, so all must raise.
    """
    for found in runtime.gather_objects(error):
        if found is not None:
            raise found
