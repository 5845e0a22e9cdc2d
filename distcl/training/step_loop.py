"""The steps of a round, and what must be known to go on with a round that was interrupted."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from distcl.config import OptimizerConfig
from distcl.data.ids import ids_tensor, tensor_ids
from distcl.distributed.memory import FlopCount
from distcl.distributed.runtime import Runtime
from distcl.errors import DivergenceError
from distcl.parallel.partition import clip_grads_
from distcl.sampling.round_loader import RoundLoader
from distcl.tracking.tracker import Tracker
from distcl.training.optimizer import decay_factor, warmup_factor
from distcl.types import Batch, Experience, Progress
from distcl.updaters import Updater
from distcl.updaters.step import StepResult


class Keeping(Protocol):
    """Who saves the run at poll points; see :class:`distcl.checkpoint.saver.Keeper`."""

    def flags(self) -> list[float]:
        """Return this rank's word for the next poll. Local."""
        ...

    def act(self, flags: Sequence[float]) -> None:
        """Save, or stop the run, as the flags summed over ranks say. Collective."""
        ...

    def poll(self) -> None:
        """Sum the flags and act on them, where no step does it. Collective."""
        ...

    def round_ended(self) -> None:
        """Save at the end of a round, if asked. Collective."""
        ...


class KeepNothing:
    """Saves nothing and never stops a run: a trainer without a run folder."""

    def flags(self) -> list[float]:
        """Return no flags."""
        return []

    def act(self, flags: Sequence[float]) -> None:
        """Do nothing."""

    def poll(self) -> None:
        """Do nothing."""

    def round_ended(self) -> None:
        """Do nothing."""


@dataclass
class Stage:
    """A round in progress; number 0 is pretraining. ``report`` is what is known of it so far."""

    number: int
    trigger: str
    experience: Experience
    steps: int
    done: int = 0
    loss: float = float("nan")
    seconds: float = 0.0
    report: dict[str, Any] = field(default_factory=dict)

    def state_dict(self) -> dict[str, Any]:
        """Return everything as tensors and plain values."""
        plain = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return plain | {"experience": pack_experience(self.experience)}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Stage:
        """Return the stage that ``state_dict`` was called on."""
        return cls(**{**state, "experience": unpack_experience(state["experience"])})


def pack_experience(e: Experience) -> dict[str, Any]:
    """Return an experience as tensors and plain values."""
    train, test = ids_tensor(e.train), ids_tensor(e.test)
    return {"index": e.index, "train": train, "test": test, "name": e.name}


def unpack_experience(state: dict[str, Any]) -> Experience:
    """Return the experience that was packed."""
    train, test = tensor_ids(state["train"]), tensor_ids(state["test"])
    return Experience(state["index"], train, test, state["name"])


class StepLoop:
    """Forward, backward, the updater's regularizer, the optimizer: the steps of one round."""

    def __init__(
        self,
        runtime: Runtime,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        updater: Updater,
        loader: RoundLoader,
        tracker: Tracker,
        progress: Progress,
        config: OptimizerConfig,
        clip_norm: float,
        poll_steps: int,
    ) -> None:
        self._runtime = runtime
        self._model = model
        self._optimizer = optimizer
        self._updater = updater
        self._loader = loader
        self._tracker = tracker
        self._progress = progress
        self._warmup_steps = config.warmup_steps
        self._decay = config.decay
        self._clip_norm = clip_norm
        self._poll_steps = poll_steps
        self.base_lrs = [float(group["lr"]) for group in optimizer.param_groups]
        self.keeper: Keeping = KeepNothing()
        self.steps = 0
        """Steps taken in the whole run."""
        self.samples = 0
        """Samples trained on in the whole run."""

    def run(self, stage: Stage, title: str) -> None:
        """Take the steps of a round that are left. Losses are looked at only at poll points.

        ``stage.loss`` becomes the global mean loss of the last step. Collective.
        """
        weights = self._updater.partition.owned
        watch = LossWatch(self._runtime, stage.number, weights, stage.done)
        self._progress.round_begins(title, stage.steps)
        self._model.train()
        begun, before, samples = time.perf_counter(), stage.seconds, 0
        for batch, hist_batch in self._batches(stage):
            self._runtime.watchdog.beat()
            self._set_rate(stage.done, stage.steps)
            if "flops" in stage.report:
                result = self._gradients(stage, batch, hist_batch)
            else:
                result = self._counted(stage, batch, hist_batch)
            self._optimizer.step()
            self._updater.update_post_optimizer_call()
            self._optimizer.zero_grad(set_to_none=True)
            watch.add(result)
            stage.done += 1
            self._loader.round.look(stage.done, result.ids, result.losses)
            self.steps += 1
            samples += batch.total
            self.samples += batch.total
            if stage.done % self._poll_steps == 0 or stage.done == stage.steps:
                losses, flags = watch.poll(self.keeper.flags())
                stage.loss = losses[-1]
                elapsed = time.perf_counter() - begun
                stage.seconds = before + elapsed
                self._tell(stage, float(np.mean(losses)), samples / elapsed)
                if stage.done < stage.steps:  # a save of the last step belongs to the round's end
                    self.keeper.act(flags)

    def _gradients(self, stage: Stage, batch: Batch, hist_batch: Batch | None) -> StepResult:
        """Forward, backward, the updater's regularizer, clipping. Collective."""
        self._updater.update_pre_fwd_bwd()
        if stage.number == 0:
            result = Updater.fwd_bwd(self._updater, batch, None)
        else:
            result = self._updater.fwd_bwd(batch, hist_batch)
        self._runtime.strategy.unscale(self._optimizer)
        self._updater.update_post_fwd_bwd()
        clip_grads_(self._updater.partition, self._runtime, self._clip_norm)
        return result

    def _counted(self, stage: Stage, batch: Batch, hist_batch: Batch | None) -> StepResult:
        """As :meth:`_gradients`; note all ranks' operations, None where they cannot be counted."""
        if self._runtime.strategy.name != "ddp":  # other libraries gather weights on the way
            stage.report["flops"] = None
            return self._gradients(stage, batch, hist_batch)
        with FlopCount() as count:
            result = self._gradients(stage, batch, hist_batch)
        mine = torch.tensor(count.total, dtype=torch.int64, device=self._runtime.device)
        stage.report["flops"] = int(self._runtime.all_reduce(mine))
        return result

    def _batches(self, stage: Stage) -> Iterator[tuple[Batch, Batch | None]]:
        try:
            yield from self._loader.batches(stage.steps, stage.done)
        except DivergenceError as error:  # of a scoring pass
            where = f"in round {stage.number}, step {stage.done + 1}"
            raise DivergenceError(f"{where}: {error}") from error

    def _tell(self, stage: Stage, loss: float, rate: float) -> None:
        values = {"round": stage.number, "loss": loss, "samples_per_second": rate}
        self._tracker.log(values, self.steps)
        self._progress.step(stage.done, stage.loss, rate)

    def _set_rate(self, step: int, steps: int) -> None:
        factor = warmup_factor(step, self._warmup_steps) * decay_factor(self._decay, step, steps)
        for group, lr in zip(self._optimizer.param_groups, self.base_lrs, strict=True):
            group["lr"] = lr * factor


# Losses of a round, kept on the device and looked at only at poll points.


_NAMED_IDS = 5


class LossWatch:
    """Collects step results; ``poll`` reduces them over ranks and stops a run that diverged.

    ``weights`` returns the slices of the weights that this rank owns.
    """

    def __init__(
        self,
        runtime: Runtime,
        round_index: int,
        weights: Callable[[], Mapping[str, torch.Tensor]],
        steps: int = 0,
    ) -> None:
        self._runtime = runtime
        self._round = round_index
        self._weights = weights
        self._window: list[StepResult] = []
        self._steps = steps  # of the round, before the window

    def add(self, result: StepResult) -> None:
        """Take one step's losses. No host synchronization."""
        self._window.append(result)

    def poll(self, flags: Sequence[float] = ()) -> tuple[list[float], list[float]]:
        """Return the global mean loss of every step since the last poll, and summed flags.

        ``flags``: numbers of this rank that are summed over ranks on the way. Collective.

        Raises DivergenceError, the same on every rank, naming round, step (from 1), rank and
        sample ids, if a loss is not finite, or if a step has left weights that are not: its
        gradient was not finite, or too large.
        """
        sums = [r.losses.sum(dtype=torch.float64) / r.total for r in self._window]
        bad = _count_bad(self._weights().values(), self._runtime.device)
        words = torch.tensor(flags, dtype=torch.float64, device=self._runtime.device)
        together = torch.cat([torch.stack([*sums, bad]), words])
        values: list[float] = self._runtime.all_reduce(together).tolist()
        means, words_sum = values[: len(sums)], values[len(sums) + 1 :]
        for k, mean in enumerate(means):
            if not math.isfinite(mean):
                self._diverged(k, mean)
        if values[len(sums)]:
            self._gradient_diverged()
        self._steps += len(self._window)
        self._window.clear()
        return means, words_sum

    def _diverged(self, k: int, mean: float) -> None:
        result = self._window[k]
        bad = ~torch.isfinite(result.losses)
        every = int(self._runtime.all_reduce(bad.sum())) == result.total
        rank, named = self._shared(result.ids[bad.cpu()], float(-self._runtime.rank))
        where = f"on rank {rank} (sample ids: {named})" if named else "over all ranks together"
        why = ""
        if k and every:
            why = f"; every sample's did: the step before, {self._largest(k - 1)}, was too large, "
            why += "or its gradient was not finite"
        raise DivergenceError(
            f"the loss became {mean} in round {self._round}, step {self._steps + k + 1}, "
            f"{where}{why}; try a smaller optimizer.lr"
        )

    def _gradient_diverged(self) -> None:
        k = len(self._window) - 1
        raise DivergenceError(
            f"the gradient was not finite, or too large, in round {self._round}, step "
            f"{self._steps + k + 1}, {self._largest(k)}: it left weights that are not finite; try "
            "a smaller optimizer.lr"
        )

    def _largest(self, k: int) -> str:
        """Return which samples had the largest losses of a step, in words. Collective."""
        result = self._window[k]
        order = torch.argsort(result.losses, descending=True)
        most = float(result.losses[order[0]]) if len(order) else 0.0
        rank, named = self._shared(result.ids[order.cpu()], most)
        return f"whose largest losses are on rank {rank} (sample ids: {named})"

    def _shared(self, ids: torch.Tensor, rating: float) -> tuple[int, str]:
        """Return the rank with ids of the highest rating, and the first of them. Collective."""
        mine = (rating, ids[:_NAMED_IDS].tolist())
        every = self._runtime.gather_objects(mine if len(ids) else (float("-inf"), []))
        rank = max(range(len(every)), key=lambda r: every[r][0])
        return rank, ", ".join(map(str, every[rank][1]))


def _count_bad(tensors: Iterable[torch.Tensor], device: torch.device) -> torch.Tensor:
    """Return how many of the tensors hold a NaN or an infinity. No host synchronization."""
    found = [~torch.isfinite(t).all() for t in tensors if t.is_floating_point()]
    count = torch.zeros((), dtype=torch.float64, device=device)
    return count + torch.stack([f.to(device) for f in found]).sum() if found else count
