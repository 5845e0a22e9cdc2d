"""Runs of one ``distcl`` command after another, each in a folder of its own, kept and gone on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from distcl.reporting.comparison import Start


class Grid:
    """Where and how runs are made: ``given`` overrides hold for all of them."""

    def __init__(
        self,
        start: Start,
        config: Path,
        given: Sequence[str],
        work: Path,
        tell: Callable[[str], None],
        environment: dict[str, str],
    ) -> None:
        self._start = start
        self._config = config
        self._given = given
        self._work = work
        self._environment = environment
        self.tell = tell

    def run(self, command: str, names: Sequence[str], keys: Sequence[str], seed: int) -> Path:
        """Return the folder of a run, made now unless it is there. Raises RuntimeError."""
        parts = [name.replace(",", "").replace(" ", "-") for name in names]
        out = self._work.joinpath(*parts, f"seed-{seed}")
        if (out / "summary.json").exists():
            return out
        words = [w for key in (*self._given, *keys, f"run.seed={seed}") for w in ("--set", key)]
        arguments = [
            command,
            str(self._config),
            "--out",
            str(out),
            *words,
            "--overwrite",
            "--quiet",
        ]
        code, complaint = self._start(arguments, self._environment)
        if code:
            raise RuntimeError(f"{out}: {complaint}")
        return out
