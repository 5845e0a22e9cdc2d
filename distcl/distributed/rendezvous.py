"""What the processes of a run tell each other before anything else, and what they refuse.

They meet in the process group's store, not in a collective, so that a wrong start is told in words
before NCCL fails over it.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import platform
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from distcl import __version__
from distcl.distributed.environment import Launch
from distcl.distributed.failure import Cause
from distcl.errors import DistclError, UsageError

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

MOST_SKEW = 2.0
"""Seconds by which clocks of two ranks may provably differ."""

_KEY = "distcl/peers"
_READ_SECONDS = 10.0
_GRACE_SECONDS = 2.0
"""What a request may take beyond its own timeout, before this process ends over it."""


@dataclass(frozen=True, slots=True)
class Peer:
    """One process: where it runs, and on what.

    ``gpu``: a name of its GPU that no other GPU has, or "" on a CPU. ``clock``: Unix seconds when
    it introduced itself. ``code``: the versions that must agree.
    """

    rank: int
    node: str
    device: str
    gpu: str
    clock: float
    code: str


def myself(rank: int, device: torch.device) -> Peer:
    """Describe this process. Local."""
    gpu = ""
    if device.type == "cuda":
        gpu = str(torch.cuda.get_device_properties(device).uuid)
    place = str(device) if gpu else device.type
    return Peer(rank, socket.gethostname(), place, gpu, time.time(), code_version())


@functools.cache
def code_version() -> str:
    """Return the versions of distcl (with a digest of its files), torch and Python. Local."""
    digest = hashlib.sha256()
    root = Path(__file__).parents[1]
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return (
        f"distcl {__version__} ({digest.hexdigest()[:8]}), torch {torch.__version__}, "
        f"Python {platform.python_version()}"
    )


def tell_stderr(cause: Cause) -> None:
    """Tell the user why this process ends."""
    print(f"distcl: rank {cause.rank}: {cause.message}", file=sys.stderr, flush=True)


@contextmanager
def must_meet(launch: Launch, seconds: float) -> Iterator[None]:
    """End this process, and tell why, if the body takes longer, or loses the others.

    A request to a store whose process is stopped may block for ever, whatever its timeout.
    """
    where = f"{os.environ.get('MASTER_ADDR', '')}:{os.environ.get('MASTER_PORT', '')}"
    lost = Cause(
        launch.rank,
        1,
        f"the {launch.world_size} processes have not met at {where} within {seconds:.0f} s: rank "
        "0, or another one, is stopped, hangs, or is out of reach",
    )

    def give_up() -> None:
        tell_stderr(lost)
        os._exit(lost.exit_code)

    timer = threading.Timer(seconds + _GRACE_SECONDS, give_up)
    timer.daemon = True
    if launch.world_size > 1:
        timer.start()
    try:
        yield
    except RuntimeError as error:  # of the store, or of a backend
        if not any(sign in str(error) for sign in ("imed out", "imeout", "onnection", "recv")):
            raise
        if launch.rank != 0:
            tell_stderr(lost)
        first = str(error).strip().partition("\n")[0]
        raise DistclError(f"{lost.message} ({first})") from error
    finally:
        timer.cancel()


def introduce(store: Store | None, device: torch.device, launch: Launch) -> list[Peer]:
    """Return every process of the run, in rank order, the same list on every rank. Collective.

    ``store``: of the process group; None for a process on its own. Raises UsageError on all ranks
    if two processes share a GPU, or if code versions or clocks of two ranks differ.
    """
    if store is None:
        return [myself(launch.rank, device)]
    if launch.rank != 0:
        store.get(f"{_KEY}/go")
        store.set(f"{_KEY}/{launch.rank}", json.dumps(asdict(myself(launch.rank, device))))
        verdict = json.loads(store.get(f"{_KEY}/all"))
        store.add(f"{_KEY}/read", 1)
    else:
        first = myself(0, device)
        store.set(f"{_KEY}/go", "")
        peers, skews = [first], [0.0]
        for rank in range(1, launch.world_size):
            try:
                peer = Peer(**json.loads(store.get(f"{_KEY}/{rank}")))
            except RuntimeError as error:
                said = str(error).strip().partition("\n")[0]
                raise DistclError(
                    f"rank {rank} has joined and then said nothing: it is stopped, hangs, or its "
                    f"node is out of reach ({said})"
                ) from error
            peers.append(peer)
            skews.append(proven_skew(first.clock, peer.clock, time.time()))
        verdict = {"refused": refusal(peers, skews), "peers": [asdict(peer) for peer in peers]}
        store.set(f"{_KEY}/all", json.dumps(verdict))
    if verdict["refused"]:
        if launch.rank == 0:  # whose end is the store's: let the others read why
            deadline = time.monotonic() + _READ_SECONDS
            while store.add(f"{_KEY}/read", 0) < launch.world_size - 1:
                if time.monotonic() > deadline:
                    break
                time.sleep(0.05)
        raise UsageError(verdict["refused"])
    return [Peer(**peer) for peer in verdict["peers"]]


def proven_skew(before: float, theirs: float, after: float) -> float:
    """Return the least error of another's clock, in seconds: it ought to lie between two of mine.

    A slow start widens the interval and proves nothing; it is never mistaken for a wrong clock.
    """
    return max(theirs - after, 0.0) - max(before - theirs, 0.0)


def refusal(peers: Sequence[Peer], skews: Sequence[float]) -> str:
    """Return why these processes cannot work together, naming two of them; "" if they can."""
    holders: dict[str, Peer] = {}
    for peer, skew in zip(peers, skews, strict=True):
        first = peers[0]
        if peer.gpu and peer.gpu in holders:
            return (
                f"ranks {holders[peer.gpu].rank} and {peer.rank} are on one GPU, {peer.device} of "
                f"{peer.node}; start one process per GPU, and let each see its own or all of them"
            )
        holders[peer.gpu] = peer
        if peer.code != first.code:
            return (
                f"rank {peer.rank} on {peer.node} runs {peer.code}, but rank 0 on {first.node} "
                f"runs {first.code}; install the same on every node"
            )
        if abs(skew) > MOST_SKEW:
            return (
                f"the clock of rank {peer.rank} on {peer.node} is {abs(skew):.0f} s "
                f"{'ahead of' if skew > 0 else 'behind'} rank 0's on {first.node}; "
                "set the clocks of the nodes (NTP)"
            )
    return ""


def first_line(launch: Launch, peers: Sequence[Peer]) -> str:
    """Return one line that tells what started the run and which rank runs where."""
    places = []
    nodes = [list(group) for _, group in groupby(peers, key=lambda peer: peer.node)]
    for group in nodes:
        ranks = _span([str(peer.rank) for peer in group])
        devices = _span(list(dict.fromkeys(peer.device for peer in group)))
        plural = "s" if len(group) > 1 else ""
        places.append(f"{group[0].node}: rank{plural} {ranks} on {devices}")
    count = f"{len(peers)} process{'es' if len(peers) > 1 else ''}"
    count += f" on {len(nodes)} nodes" if len(nodes) > 1 else ""
    return f"started by {launch}: {count}; {'; '.join(places)}; {peers[0].code}"


def _span(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}"
