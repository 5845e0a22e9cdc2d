"""Two hosts on one machine: network namespaces, joined by a cable (veth). Root only."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[2]
ADDRESSES = ("10.213.0.1", "10.213.0.2")
PORT = "29500"  # each namespace has all ports to itself
CABLE = "eth0"


def unavailable() -> str:
    """Say why there cannot be two hosts here; "" if there can."""
    if os.getuid() != 0:
        return "needs root, to make network namespaces"
    if not shutil.which("ip", path=f"{os.environ['PATH']}:/usr/sbin:/sbin"):
        return "not installed: ip (Debian's iproute2)"
    probe = f"distcl-probe-{os.getpid()}"
    done = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True)
    if done.returncode:
        return f"network namespaces are not allowed here: {done.stderr.strip()}"
    _ip("netns", "del", probe)
    return ""


def _ip(*command: str) -> None:
    subprocess.run(["ip", *command], check=True, capture_output=True, text=True)


class Hosts:
    """Host 0 and host 1."""

    def __init__(self) -> None:
        self.names = [f"distcl-{os.getpid()}-{i}" for i in (0, 1)]

    @contextmanager
    def up(self) -> Iterator[Hosts]:
        for name in self.names:
            _ip("netns", "add", name)
        try:
            ends = [("dev", CABLE, "netns", name) for name in self.names]
            _ip("link", "add", *ends[0][1:], "type", "veth", "peer", *ends[1][1:])
            for name, address in zip(self.names, ADDRESSES, strict=True):
                _ip("-n", name, "address", "add", f"{address}/24", "dev", CABLE)
                for device in ("lo", CABLE):
                    _ip("-n", name, "link", "set", device, "up")
            yield self
        finally:
            for name in self.names:
                _ip("netns", "del", name)

    def cable(self, state: str) -> None:
        """Plug the cable in (``up``) or out (``down``), at host 0's end."""
        _ip("-n", self.names[0], "link", "set", CABLE, state)

    def start(self, host: int, *command: str, **environ: str) -> subprocess.Popen[str]:
        """Start ``python COMMAND`` on a host, which is called hostA or hostB there."""
        inside = f'hostname host{"AB"[host]} && exec "$@"'
        return subprocess.Popen(
            [
                "ip",
                "netns",
                "exec",
                self.names[host],
                "unshare",
                "--uts",
                "sh",
                "-c",
                inside,
                "sh",
                sys.executable,
                *command,
            ],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": CABLE} | environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
