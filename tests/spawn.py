"""Start real ranks for a test: W processes with gloo, each running one function."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from queue import Empty
from typing import Any

_context = multiprocessing.get_context("forkserver")
_preloaded = ["torch", "accelerate", "distcl.job"]
_preloaded += ["torch._dynamo", "torch.distributed.algorithms.ddp_comm_hooks"]  # for DDP
_context.set_forkserver_preload(_preloaded)


def preload(module: str) -> None:
    """Import a module once for all ranks; call it where a test module is imported."""
    if module not in _preloaded:
        _preloaded.append(module)
        _context.set_forkserver_preload(_preloaded)


_numbers = itertools.count(101 * os.getpid())


def free_port() -> int:
    """Return a port that nobody listens at, another one at each call.

    It lies below those that Linux gives to outgoing connections, which could take it at any time.
    """
    for number in itertools.islice(_numbers, 1000):
        with socket.socket() as s, suppress(OSError):
            s.bind(("127.0.0.1", port := 20_000 + number % 12_000))
            return port
    raise RuntimeError("there is no free port")


def rank_environment(rank: int, world: int, port: int) -> dict[str, str]:
    env = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_PORT": port}
    return {k: str(v) for k, v in env.items()} | {
        "MASTER_ADDR": "127.0.0.1",
        "OMP_NUM_THREADS": "1",
    }


def _child(fn: Callable[..., Any], rank: int, env: dict[str, str], args: Any, queue: Any) -> None:
    os.environ.update(env)
    import torch

    torch.set_num_threads(1)
    try:
        queue.put((rank, True, fn(*args)))
    except BaseException:
        queue.put((rank, False, traceback.format_exc()))
        raise


def exit_codes(world: int, fn: Callable[..., Any], *args: Any, timeout: float = 90) -> list[Any]:
    """Run fn(*args) on every rank and return how the processes ended; None: it had to be killed."""
    port, queue = free_port(), _context.Queue()
    processes = [
        _context.Process(target=_child, args=(fn, rank, env, args, queue))
        for rank, env in enumerate(rank_environment(r, world, port) for r in range(world))
    ]
    for process in processes:
        process.start()
    deadline = time.monotonic() + timeout
    for process in processes:
        process.join(max(0.1, deadline - time.monotonic()))
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
        process.join()
    return codes


def run_ranks(world: int, fn: Callable[..., Any], *args: Any, timeout: float = 90) -> list[Any]:
    """Return fn(*args) of every rank, in rank order; ``fn`` is a module-level function.

    Results must be picklable: return numpy arrays or plain values rather than tensors.
    """
    port, queue = free_port(), _context.Queue()
    processes = [
        _context.Process(
            target=_child,
            args=(fn, rank, rank_environment(rank, world, port) if world > 1 else {}, args, queue),
        )
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    results: dict[int, Any] = {}
    try:
        for _ in range(world):
            rank, ok, value = queue.get(timeout=timeout)
            if not ok:
                raise AssertionError(f"rank {rank} failed:\n{value}")
            results[rank] = value
        for process in processes:
            process.join(timeout)
    except Empty:
        raise AssertionError(f"ranks {sorted(set(range(world)) - set(results))} hang") from None
    finally:
        for process in processes:
            process.kill()
            process.join()
    return [results[rank] for rank in range(world)]


def distcl(*args: str, ranks: int = 1, timeout: float = 150, **env: str) -> Any:
    """Run the command line in a real process (torchrun for several ranks); return the result."""
    start = [sys.executable, "-m"]
    if ranks > 1:
        run = ["torch.distributed.run", "--nproc-per-node", str(ranks), "--master-port"]
        start += [*run, str(free_port()), "-m"]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("DISTCL_")}
    return subprocess.run(
        [*start, "distcl", *args],
        env=environment | {"OMP_NUM_THREADS": "1"} | env,
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
