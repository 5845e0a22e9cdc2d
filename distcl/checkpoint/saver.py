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
from distcl.parallel.sliced_state import SavedSlices
from distcl.training.step_loop import Keeping

Contents = tuple[dict[str, Any], dict[str, Any], dict[str, torch.Tensor], dict[str, Any]]
"""What :meth:`CheckpointStore.save` takes: this rank's state, shared state, model, meta."""

_STOP, _WRITING, _DUE = range(3)


class Keeper(Keeping):
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


class RandomState:
    """Every random number generator of this process. Local."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def state_dict(self) -> dict[str, Any]:
        """Return the state of each."""
        version, words, gauss = random.getstate()
        name, keys, *rest = np.random.get_state()
        numpy = [name, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest]
        state: dict[str, Any] = {
            "torch": torch.get_rng_state(),
            "python": [version, list(words), gauss],
            "numpy": numpy,
        }
        if self._device.type == "cuda":
            state["cuda"] = torch.cuda.get_rng_state(self._device)
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        torch.set_rng_state(state["torch"])
        version, words, gauss = state["python"]
        random.setstate((version, tuple(words), gauss))
        name, keys, *rest = state["numpy"]
        np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
        if "cuda" in state and self._device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda"], self._device)

    def load_slices(self, saved: SavedSlices) -> None:
        """Go on with this rank's own, if there were as many ranks; else leave them alone."""
        if saved.own is not None:
            self.load_state_dict(saved.own)
