"""Nothing is lost: when the run is saved, when it stops early, and how it goes on.

Signals only set a flag. Ranks put their flags together at poll points, so that all of them save at
the same step.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from distcl.checkpoint.preemption import Preemption
from distcl.checkpoint.store import CheckpointStore
from distcl.config import CheckpointConfig
from distcl.distributed.runtime import Runtime
from distcl.errors import CheckpointError, Preempted

Contents = tuple[dict[str, Any], dict[str, Any], dict[str, torch.Tensor], dict[str, Any]]
"""What :meth:`CheckpointStore.save` takes: this rank's state, shared state, model, meta."""

_STOP, _WRITING, _DUE = range(3)


class Keeper:
    """Saves a run. ``contents`` collects what is to be saved; it is collective."""

    def __init__(
        self,
        runtime: Runtime,
        store: CheckpointStore,
        config: CheckpointConfig,
        preemption: Preemption,
        contents: Callable[[], Contents],
        steps: Callable[[], int],
    ) -> None:
        self.preemption = preemption
        self._runtime = runtime
        self._store = store
        self._config = config
        self._contents = contents
        self._steps = steps
        self._saved_at = time.monotonic()
        self._saved_step = -1

    def flags(self) -> list[float]:
        """Return [wants to stop, still writes, a save is due (rank 0's word)]. Local."""
        due = False
        if self._runtime.is_main:
            minutes, steps = self._config.every_minutes, self._config.every_steps
            due = bool(minutes) and time.monotonic() - self._saved_at > minutes * 60
            due = due or (bool(steps) and self._steps() - max(self._saved_step, 0) >= steps)
        return [float(self.preemption.asked), float(not self._store.written), float(due)]

    def act(self, flags: Sequence[float]) -> None:
        """Do what the flags, summed over ranks, say. Collective.

        Raises Preempted when any rank wants to stop, after everything is on disk.
        """
        if flags[_STOP]:
            self._stop()
        if self._store.pending and not flags[_WRITING]:
            self._store.finish()
        if flags[_DUE]:
            self.save()

    def poll(self) -> None:
        """Put the flags together and act on them, where no step does it. Collective."""
        flags = torch.tensor(self.flags(), dtype=torch.float64, device=self._runtime.device)
        self.act(self._runtime.all_reduce(flags).tolist())

    def save(self) -> None:
        """Begin to write a checkpoint of the run as it is now. Collective."""
        self._store.save(self._steps(), *self._contents())
        self._saved_at, self._saved_step = time.monotonic(), self._steps()

    def round_ended(self) -> None:
        """Save at the end of a round, if asked. Collective."""
        if self._config.every_round:
            self.save()
        self.poll()

    def finish(self) -> None:
        """Wait for what is being written. Collective."""
        self._store.finish()

    def _stop(self) -> None:
        self._store.finish()
        self.save()
        reasons = self._runtime.gather_objects(self.preemption.reason)
        reason = next((f"rank {r}: {why}" for r, why in enumerate(reasons) if why), "asked to stop")
        if not self._store.finish():
            raise CheckpointError(
                f"{reason}, but the state could not be saved ({self._store.failure}); the last "
                "good checkpoint stays"
            )
        raise Preempted(f"{reason}; the state is saved, go on with --resume auto")


def random_state(runtime: Runtime) -> dict[str, Any]:
    """Return the state of every random number generator of this process. Local."""
    version, words, gauss = random.getstate()
    name, keys, pos, has_gauss, cached = np.random.get_state()
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "python": [version, list(words), gauss],
        "numpy": [
            name,
            torch.from_numpy(np.asarray(keys).astype(np.int64)),
            pos,
            has_gauss,
            cached,
        ],
    }
    if runtime.device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(runtime.device)
    return state


def set_random_state(state: dict[str, Any], runtime: Runtime) -> None:
    """Restore what :func:`random_state` returned. Local."""
    torch.set_rng_state(state["torch"])
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, pos, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), pos, has_gauss, cached))
    if "cuda" in state and runtime.device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], runtime.device)
