"""What a run takes of the machine: floating-point operations of a step, memory."""

from __future__ import annotations

import ctypes
import os
import resource
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class FlopCount(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the floating-point operations of what runs inside, in ``total``. Local.

    By the formulas of torch's FlopCounterMode: matrix products, convolutions and attention, a
    multiplication and an addition as two; all else is nothing beside them. Results do not change.
    FlopCounterMode itself also follows modules by hooks, which end ``torch.autograd.grad`` with an
    error, and so ``jvp_penalty``.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        from torch.utils.flop_counter import flop_registry

        self._formulas: Mapping[Any, Callable[..., Any]] = flop_registry
        self.total = 0

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run an operation and count it."""
        kwargs = kwargs or {}
        formula = self._formulas.get(func.overloadpacket)
        if formula is None and torch.is_inference_mode_enabled():
            with self:  # there, layers come as they are, not as their products
                inner = func.decompose(*args, **kwargs)
            if inner is not NotImplemented:
                return inner
        out = func(*args, **kwargs)
        if formula is not None:
            self.total += int(formula(*args, **kwargs, out_val=out))
        return out


_TRIM, _MMAP = (-1, 1 << 30), (-3, 32 << 20)
"""glibc's M_TRIM_THRESHOLD and M_MMAP_THRESHOLD, and what they are set to, in bytes."""


def keep_freed_memory(environ: Mapping[str, str] = os.environ) -> None:
    """Let this process keep up to 1 GiB of freed memory, for use again. Local.

    A step on the CPU frees its activations and asks for as many at once; given back to the system
    in between, they cost thousands of page faults a step. Does nothing without glibc, or where the
    environment says how its allocator is to behave.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None or any(name.startswith(("MALLOC_", "GLIBC_")) for name in environ):
        return
    for parameter, value in (_TRIM, _MMAP):
        mallopt(parameter, value)


def peak_memory(device: torch.device) -> int:
    """Return the most bytes that this process has held so far. Local.

    On a GPU what torch had allocated there; else resident memory.
    """
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
