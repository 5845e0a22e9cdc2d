"""What may differ between a checkpoint and the run that goes on from it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from distcl.checkpoint.saver import RandomState
from distcl.checkpoint.store import read_manifest
from distcl.config import Config
from distcl.data.fingerprint import changes, data_fingerprint
from distcl.data.stream import DriftStream
from distcl.distributed.runtime import Runtime
from distcl.errors import ConfigError, DataError, UsageError
from distcl.registry import nearest

HARMLESS = (
    "run.out",
    "run.poll_steps",
    "run.timeout_seconds",
    "run.max_minutes",
    "run.report",
    "training.max_rollbacks",
    "training.accumulate",
    "parallel.",
    "data.workers",
    "data.pin_memory",
    "checkpoint.",
    "tracking.",
)
"""Keys, and sections, that may change between a checkpoint and its resumption."""

_KEPT = {  # what a matrix and its baselines are of
    "model.score": "its scores",
    "model.score_options": "its scores",
    "stream.experiences": "its experiences",
}
_SWITCHES = dict.fromkeys(("training.ema", "training.swa"), "a mean of the weights, or none")

Say = Callable[[str], None]
"""Shows one line to the user, on rank 0."""


def check_config(
    path: Path, saved: dict[str, Any], config: Config, allowed: frozenset[str], say: Say
) -> None:
    """Compare a checkpoint's configuration with the one in force, key by key. Local.

    Raises ConfigError naming every changed key that could change results, unless allowed.
    """
    known = {f"{s}.{key}" for s, keys in config.model_dump().items() for key in keys} | {"data"}
    for name in sorted(allowed - known):
        raise UsageError(f"--allow-changed {name}: there is no such key{nearest(name, known)}")
    refused = []
    for section, keys in config.model_dump(mode="json").items():
        for key, now in keys.items():
            name = f"{section}.{key}"
            before = saved.get(section, {}).get(key, now)
            if before == now:
                continue
            change = f"{name}: {before!r} -> {now!r}"
            switched = bool(before) != bool(now)
            kept = _KEPT.get(name) or (_SWITCHES.get(name) if switched else None)
            if kept:
                raise ConfigError(f"'{path}': {change}: a run keeps {kept}; begin anew")
            if name in allowed or name.startswith(HARMLESS):
                say(f"[resume] changed since the checkpoint: {change}")
            else:
                refused.append(change)
    if refused:
        names = " ".join(f"--allow-changed {change.partition(':')[0]}" for change in refused)
        raise ConfigError(
            f"the configuration differs from that of '{path}': {'; '.join(refused)}\n"
            f"go on all the same with: {names}"
        )


def check_data(
    path: Path | None,
    stream: DriftStream,
    runtime: Runtime,
    grows: bool,
    allowed: bool,
    say: Say,
) -> Callable[[], dict[str, Any]]:
    """Return what tells the fingerprint of the data, {} but on rank 0, which alone looks.

    Collective; what is returned is local. Raises DataError if they are others than those of the
    checkpoint at ``path``, unless allowed. ``grows``: there may be more by now.
    """
    random = RandomState(runtime.device)

    def fingerprint(like: dict[str, Any] | None = None) -> dict[str, Any]:
        before = random.state_dict()
        try:
            return data_fingerprint(stream, like)
        finally:
            random.load_state_dict(before)

    fault = ""
    found = fingerprint() if runtime.is_main else {}
    if runtime.is_main and path is not None:
        saved = read_manifest(path).get("data", {})
        different = list(changes(saved, fingerprint(saved) if grows and saved else found))
        fault = "; ".join(different[:4])
        fault += f" and {len(different) - 4} more" if len(different) > 4 else ""
        if fault and allowed:
            say(f"[resume] the data changed since the checkpoint: {fault}")
    if (fault := runtime.broadcast(fault)) and not allowed:
        raise DataError(
            f"the data differ from those of '{path}': {fault}\n"
            "go on all the same with: --allow-changed data"
        )
    live = runtime.is_main and stream.info.live_seconds > 0
    return lambda: fingerprint() if live else found
