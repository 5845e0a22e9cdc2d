"""A job that is watched from outside: how far it is, and what it drew."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.spawn import distcl

JOB = "tests/slurm/job.toml"


def read(out: Path, name: str) -> str:
    try:
        return (out / name).read_text(encoding="utf-8")
    except FileNotFoundError:
        return ""


def status(out: Path) -> dict[str, Any]:
    return dict(json.loads(read(out, "status.json") or "{}"))


def draws(out: Path) -> list[str]:
    return [r["draws_sha256"] for r in json.loads(read(out, "summary.json"))["rounds"]]


def uninterrupted(folder: Path, *overrides: str) -> list[str]:
    """The draws of every round of JOB, by one process that nobody disturbs."""
    done = distcl("train", JOB, *overrides, "--out", str(folder / "run"), "--quiet")
    assert done.returncode == 0, done.stderr
    return draws(folder / "run")


def wait_for(true: Callable[[], Any], what: str, seconds: float = 120) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := true()):
        assert time.monotonic() < deadline, f"not within {seconds:.0f} s: {what}"
        time.sleep(0.1)
    return found


def wait_for_round_2(out: Path, seconds: float = 120) -> None:
    """Until the run is in the middle of its second round."""
    wait_for(lambda: "after round 1:" in read(out, "log.txt"), f"round 2 in {out}", seconds)
