"""What a run takes of the machine: floating-point operations of a step, memory."""

from __future__ import annotations

import ctypes
import os
import resource
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class FlopCount(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the floating-point operations of what runs inside, in ``total``. Local.

    By the formulas of torch's FlopCounterMode: matrix products, convolutions and attention, a
    multiplication and an addition as two; all else is nothing beside them. Results do not change.
    FlopCounterMode itself also follows modules by hooks, which end ``torch.autograd.grad`` with an
    error.
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


_TRIM, _MMAP = -1, -3  # glibc's M_TRIM_THRESHOLD and M_MMAP_THRESHOLD
_KEPT, _LARGE = 32 << 20, 1 << 20


def _mallopt(environ: Mapping[str, str]) -> Callable[[int, int], int] | None:
    """Return what sets glibc's allocator, unless there is none or the environment has done so."""
    if sys.platform != "linux" or any(k.startswith(("MALLOC_", "GLIBC_")) for k in environ):
        return None
    return getattr(ctypes.CDLL(None), "mallopt", None)


def keep_freed_memory(environ: Mapping[str, str] = os.environ) -> None:
    """Let this process keep up to 1 GiB of freed memory, for use again. Local.

    A step on the CPU frees its activations and asks for as many at once; given back to the system
    in between, they cost thousands of page faults a step. Does nothing without glibc, or where the
    environment says how its allocator is to behave.
    """
    mallopt = _mallopt(environ)
    if mallopt is not None:
        mallopt(_TRIM, 1 << 30)
        mallopt(_MMAP, _KEPT)


_of_this_process = cache(lambda: _mallopt(os.environ))


@contextmanager
def large_arrays() -> Iterator[None]:
    """Inside, give arrays of a MiB and more memory of their own, returned when they are freed.

    For arrays of all samples, which would leave holes that the next ones do not fit into. Not for
    what comes and goes with each batch. Local.
    """
    mallopt = _of_this_process()
    if mallopt is None:
        yield
        return
    mallopt(_MMAP, _LARGE)
    try:
        yield
    finally:
        mallopt(_MMAP, _KEPT)


def peak_memory(device: torch.device) -> int:
    """Return the most bytes that this process has held so far. Local.

    On a GPU what torch had allocated there; else resident memory.
    """
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def give_back() -> None:
    """Let the C library return freed memory to the system, where it can (glibc). Local.

    It keeps up to tens of MiB otherwise, in holes between what lives on. Takes milliseconds.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
