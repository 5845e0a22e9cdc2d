"""Whole weights, gradients and optimizer state on every rank (DDP), or one process alone."""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from distcl.config import ParallelConfig, RunConfig
from distcl.strategies.base import MakeOptimizer, Strategy, trainable

_MIXED = {"fp32": "no", "fp64": "no", "bf16": "bf16", "fp16": "fp16"}


class DDP(Strategy):
    """``ddp``: under bf16 and fp16, float32 weights and torch's autocast."""

    def __init__(self, run: RunConfig, parallel: ParallelConfig) -> None:
        super().__init__(run, parallel)
        self.accelerator = Accelerator(
            cpu=not torch.cuda.is_available(),
            mixed_precision=_MIXED[run.precision],
            kwargs_handlers=[
                InitProcessGroupKwargs(timeout=self.timeout),
                DistributedDataParallelKwargs(broadcast_buffers=False),
            ],
        )

    def prepare(
        self, model: nn.Module, make_optimizer: MakeOptimizer | None
    ) -> tuple[nn.Module, torch.optim.Optimizer | None]:
        """See the base class."""
        dtype = torch.float64 if self.precision == "fp64" else torch.float32
        model = model.to(self.accelerator.device, dtype)
        with warnings.catch_warnings():  # accelerate has no word for DDP's newer option yet
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated")
            model = self.accelerator.prepare(model)
        if make_optimizer is None:
            return model, None
        optimizer = make_optimizer(trainable(model))
        if self.precision == "fp16":  # otherwise a wrapper only costs time at each step
            optimizer = self.accelerator.prepare(optimizer)
        return model, optimizer

    def unwrap(self, model: nn.Module) -> nn.Module:
        """See the base class."""
        return model.module if isinstance(model, DistributedDataParallel) else model

    def autocast(self) -> AbstractContextManager[Any]:
        """See the base class."""
        if self.precision in ("bf16", "fp16"):
            dtype = torch.bfloat16 if self.precision == "bf16" else torch.float16
            return torch.autocast(self.accelerator.device.type, dtype=dtype)
        return nullcontext()

    def backward(self, loss: torch.Tensor) -> None:
        """See the base class."""
        if self.precision == "fp16":
            self.accelerator.backward(loss)
        else:
            loss.backward()  # type: ignore[no-untyped-call]

    def accumulating(self, model: nn.Module, last: bool) -> AbstractContextManager[Any]:
        """See the base class."""
        if isinstance(model, DistributedDataParallel) and not last:
            return model.no_sync()
        return nullcontext()

    def unscale(self, optimizer: torch.optim.Optimizer) -> None:
        """See the base class."""
        if self.precision == "fp16":
            self.accelerator.unscale_gradients(optimizer)
