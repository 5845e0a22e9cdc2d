"""The one wrapper of Accelerate: who I am, what I run on, how ranks talk and fail together."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from distcl.config import ParallelConfig, RunConfig
from distcl.errors import DistclError, Preempted, UsageError
from distcl.failure import Cause, FailureRelay
from distcl.launchers import adopt
from distcl.peers import first_line, introduce

T = TypeVar("T")

_MIXED = {"fp32": "no", "fp64": "no", "bf16": "bf16", "fp16": "fp16"}


def check_launch(environ: Mapping[str, str], processes: int = 0) -> int:
    """Return how many processes the launcher started; raise UsageError if they cannot be real.

    ``processes``: how many there must be (0: as many as were started). Launchers that were asked
    for several processes and silently started one are found by what they leave in ``environ``.
    """
    world = int(environ.get("WORLD_SIZE", "1"))
    if "WORLD_SIZE" in environ and "RANK" not in environ:
        raise UsageError(
            "WORLD_SIZE is set but RANK is not; start with "
            f"'torchrun --nproc-per-node {world} -m distcl …', or unset WORLD_SIZE"
        )
    by_accelerate = "ACCELERATE_MIXED_PRECISION" in environ and "MASTER_ADDR" in environ
    if by_accelerate and "WORLD_SIZE" not in environ:
        count = processes or "N"
        raise UsageError(
            "accelerate launch was asked for several processes but started one (it does so with "
            f"--cpu); type: torchrun --nproc-per-node {count} -m distcl …"
        )
    if processes and world != processes:
        raise UsageError(
            f"parallel.processes asks for {processes} processes but {world} "
            f"{'was' if world == 1 else 'were'} started; "
            f"type: torchrun --nproc-per-node {processes} -m distcl …"
        )
    return world


def _tell_stderr(cause: Cause) -> None:
    print(f"distcl: rank {cause.rank}: {cause.message}", file=sys.stderr, flush=True)


class Runtime:
    """This process among its peers. Making one is collective: every rank makes exactly one.

    Attributes: ``rank``, ``world_size``, ``device``, ``dtype`` (of the model's weights: float64
    under ``fp64``, else float32), ``peers`` (every process, in rank order), ``about`` (one line:
    what started the run, which rank is where).

    Raises UsageError if fewer processes exist than were asked for, if they cannot work together
    (see ``distcl.peers``), or on a strategy or precision that this machine cannot run.
    """

    def __init__(
        self, run: RunConfig | None = None, parallel: ParallelConfig | None = None
    ) -> None:
        run, parallel = run or RunConfig(), parallel or ParallelConfig()
        launch = adopt(os.environ)
        started = check_launch(os.environ, parallel.processes)
        cpu = not torch.cuda.is_available()
        if run.precision == "fp16" and cpu:
            raise UsageError("run.precision = 'fp16' needs a GPU; on a CPU use 'bf16' or 'fp32'")
        self.precision = run.precision
        self.dtype = torch.float64 if run.precision == "fp64" else torch.float32
        self.accelerator = Accelerator(
            cpu=cpu,
            mixed_precision=_MIXED[run.precision],
            kwargs_handlers=[
                InitProcessGroupKwargs(timeout=timedelta(seconds=run.timeout_seconds)),
                DistributedDataParallelKwargs(broadcast_buffers=False),
            ],
        )
        self.rank = self.accelerator.process_index
        self.world_size = self.accelerator.num_processes
        self.device = self.accelerator.device
        if self.world_size != started:
            raise UsageError(
                f"{started} processes were started but they see {self.world_size}; "
                f"type: torchrun --nproc-per-node {started} -m distcl …"
            )
        store = None
        if self.world_size > 1:
            store = dist.distributed_c10d._get_default_store()
        self.peers = introduce(store, self.device, launch)
        self.about = first_line(launch, self.peers)
        self.relay: FailureRelay | None = None
        if store is not None:
            self.relay = FailureRelay(store, self.rank, _tell_stderr)

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, the only one that prints and writes shared files."""
        return bool(self.rank == 0)

    # -- the model ---------------------------------------------------------------------------

    def prepare(self, model: nn.Module) -> nn.Module:
        """Move a model to the device and wrap it for training. Collective."""
        model = model.to(self.device, self.dtype)
        with warnings.catch_warnings():  # accelerate has no word for DDP's newer option yet
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated")
            return self.accelerator.prepare(model)  # type: ignore[no-any-return]

    def prepare_optimizer(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """Wrap an optimizer, such that loss scaling (fp16) is handled. Local."""
        return self.accelerator.prepare(optimizer)  # type: ignore[no-any-return]

    def unscale(self, optimizer: torch.optim.Optimizer) -> None:
        """Take the loss scale (fp16) out of the gradients, once, before they are changed. Local."""
        self.accelerator.unscale_gradients(optimizer)

    def unwrap(self, model: nn.Module) -> nn.Module:
        """Return the module inside the wrapper; forwards of it do not communicate."""
        return model.module if isinstance(model, DistributedDataParallel) else model

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the context in which forwards run outside the wrapper (scoring, evaluation)."""
        if self.precision in ("bf16", "fp16"):
            dtype = torch.bfloat16 if self.precision == "bf16" else torch.float16
            return torch.autocast(self.device.type, dtype=dtype)
        return nullcontext()

    def backward(self, loss: torch.Tensor) -> None:
        """Backward of a loss; gradients are averaged over ranks. Collective."""
        self.accelerator.backward(loss)

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
        if self.world_size == 1:
            return mine
        each = each or -(-n // self.world_size)
        padded = mine.new_zeros((each, *mine.shape[1:]))
        padded[: len(mine)] = mine
        out = mine.new_empty((each * self.world_size, *mine.shape[1:]))
        dist.all_gather_single(out, padded)
        return out[:n]

    def all_reduce(self, tensor: torch.Tensor, op: str = "sum") -> torch.Tensor:
        """Reduce in place over ranks, ``op`` = sum, max or min; return the tensor. Collective."""
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
        if self.world_size > 1:
            dist.barrier()

    # -- the end -----------------------------------------------------------------------------

    @contextmanager
    def guard(self) -> Iterator[None]:
        """Run the body such that an exception on any rank ends all ranks with its cause.

        On rank 0 the exception that leaves this is the first cause, even if rank 0 itself only saw
        a broken connection. The process group is gone afterwards. Collective.
        """
        try:
            yield
        except Preempted:  # raised on all ranks together
            self.close()
            raise
        except BaseException as error:
            if self.relay is not None:
                own = describe(error, self.rank)
                first = self.relay.report(own)
                if first.message != own.message or is_connection_loss(error):
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
            dist.destroy_process_group()


class PeerFailure(DistclError):
    """Another rank failed first, or is gone; message and exit code are the first cause's."""

    def __init__(self, cause: Cause) -> None:
        super().__init__(f"rank {cause.rank}: {cause.message}")
        self.exit_code = cause.exit_code


def describe(error: BaseException, rank: int) -> Cause:
    """Return what to tell of an exception: our own errors as they are, others with their type."""
    if isinstance(error, DistclError):
        return Cause(rank, error.exit_code, str(error))
    if isinstance(error, KeyboardInterrupt):
        return Cause(rank, 130, "interrupted from the keyboard")
    text = str(error).strip().splitlines()
    first = text[0] if text else ""
    if is_connection_loss(error):
        return Cause(rank, 1, f"lost contact with another rank, which is gone or hangs ({first})")
    return Cause(rank, 1, f"{type(error).__name__}: {first}")


def is_connection_loss(error: BaseException) -> bool:
    """Tell whether an exception is a backend's word for a peer that is gone or hangs."""
    signs = ("closed by peer", "onnection reset", "imed out", "Broken pipe", "NCCL", "refused")
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)
