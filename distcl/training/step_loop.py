"""The steps of a round, the losses watched on the way, and who saves the run meanwhile."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from statistics import fmean
from typing import Any

import torch

from distcl.config import Config
from distcl.distributed.memory import FlopCount
from distcl.distributed.runtime import Runtime
from distcl.errors import DivergenceError
from distcl.losses import count_positions
from distcl.parallel.gradients import clip_grads_
from distcl.training.optimizer import rate_factor
from distcl.training.parts import Parts
from distcl.training.stage import Stage
from distcl.types import Batch
from distcl.updaters import Updater
from distcl.updaters.step import StepResult


class Keeping:
    """Who saves the run at poll points: nobody, where a trainer has no run folder.

    See :class:`distcl.checkpoint.saver.Keeper`.
    """

    def flags(self) -> list[float]:
        """Return this rank's word for the next poll. Local."""
        return []

    def act(self, flags: Sequence[float]) -> None:
        """Save, or stop the run, as the flags summed over ranks say. Collective."""

    def poll(self) -> None:
        """Sum the flags and act on them, where no step does it. Collective."""

    def round_ended(self) -> None:
        """Save at the end of a round, if asked. Collective."""


class StepLoop:
    """The steps of one round after another. ``keeper`` saves the run, and may stop it."""

    def __init__(self, parts: Parts, config: Config, keeper: Keeping) -> None:
        self._parts = parts
        self._config = config.optimizer
        self._clip_norm = config.training.clip_norm
        self._poll_steps = config.run.poll_steps
        self._by_token = config.training.normalize == "token"
        self._loss = config.model.loss
        self.keeper = keeper
        self.base_lrs = [float(group["lr"]) for group in parts.optimizer.param_groups]
        self.steps = 0
        """Steps taken in the whole run."""
        self.samples = 0
        """Samples trained on in the whole run."""

    def run(self, stage: Stage) -> None:
        """Take the steps of a round that are left. Losses are looked at only at poll points.

        ``stage.loss`` becomes the global mean loss of the last step. Collective.
        """
        parts, pretraining = self._parts, stage.number == 0
        runtime, updater, optimizer = parts.runtime, parts.updater, parts.optimizer
        fwd_bwd = partial(Updater.fwd_bwd, updater) if pretraining else updater.fwd_bwd
        watch = LossWatch(runtime, stage, updater.partition.owned)
        rate = _Rate(stage.seconds, self.samples)
        parts.progress.round_begins(stage.title, stage.steps)
        parts.model.train()
        for batch, hist_batch in self._batches(stage):
            self._set_rate(stage.done, stage.steps)
            with self._counting(stage):
                updater.update_pre_fwd_bwd()
                result = fwd_bwd(batch, hist_batch)
                runtime.strategy.unscale(optimizer)
                updater.update_post_fwd_bwd()  # the regularizer's gradient
                clip_grads_(updater.partition, runtime, self._clip_norm)
            optimizer.step()
            updater.update_post_optimizer_call()
            parts.average.update()
            optimizer.zero_grad(set_to_none=True)
            stage.done, self.steps = stage.done + 1, self.steps + 1
            self.samples += batch.total
            watch.add(result)
            parts.loader.round.look(stage.done, result.ids, result.losses)
            parts.callbacks.on_step(self.steps, result.losses)
            if stage.done % self._poll_steps == 0 or stage.done == stage.steps:
                self._poll(stage, watch, rate)

    def _poll(self, stage: Stage, watch: LossWatch, rate: _Rate) -> None:
        """Look at the losses since the last poll, tell of them, and save if it is time."""
        losses, flags = watch.poll(self.keeper.flags())
        stage.loss = losses[-1]
        stage.seconds, per_second = rate.now(self.samples)
        values = {"round": stage.number, "loss": fmean(losses), "samples_per_second": per_second}
        self._parts.tracker.log(values, self.steps)
        self._parts.progress.step(stage.done, stage.loss, per_second)
        if stage.done < stage.steps:  # a save of the last step belongs to the round's end
            self.keeper.act(flags)

    @contextmanager
    def _counting(self, stage: Stage) -> Iterator[None]:
        """Note all ranks' operations of the round's first step; None: they cannot be counted."""
        runtime = self._parts.runtime
        if "flops" in stage.report:
            yield
        elif runtime.strategy.name != "ddp":  # other libraries gather weights on the way
            stage.report["flops"] = None
            yield
        else:
            with FlopCount() as count:
                yield
            mine = torch.tensor(count.total, dtype=torch.int64, device=runtime.device)
            stage.report["flops"] = int(runtime.all_reduce(mine))

    def _batches(self, stage: Stage) -> Iterator[tuple[Batch, Batch | None]]:
        try:
            for batch, history in self._parts.loader.batches(stage.steps, stage.done):
                self._parts.runtime.watchdog.beat()
                yield self._normalized(batch, history) if self._by_token else (batch, history)
        except DivergenceError as error:  # of a scoring pass
            step = stage.done + 1
            raise DivergenceError(f"in round {stage.number}, step {step}: {error}") from error

    def _normalized(self, batch: Batch, history: Batch | None) -> tuple[Batch, Batch | None]:
        """Return the batches with the loss weights of ``training.normalize = "token"``. Collective.

        A sample counts as much as it has targets that count, n, times its loss weight c: the sum of
        weighted means over B samples is then B / Σcn times the sum over all targets of the global
        batch, each times c; or of both batches.
        """
        batches = [batch] if history is None else [batch, history]
        mine = [
            count_positions(self._loss, b.y).double() * (1 if b.weights is None else b.weights)
            for b in batches
        ]
        every = self._parts.runtime.all_reduce(torch.stack([m.sum() for m in mine]))
        sizes = [b.total for b in batches]
        if self._parts.updater.joins_batches:
            every, sizes = every.sum().expand(len(batches)), [sum(sizes)] * len(batches)
        dtype = self._parts.runtime.dtype
        found = [
            replace(b, weights=(m * (size / number)).to(dtype))
            for b, m, size, number in zip(batches, mine, sizes, every, strict=True)
        ]
        return found[0], found[1] if history is not None else None

    def _set_rate(self, step: int, steps: int) -> None:
        factor = rate_factor(self._config, step, steps)
        for group, lr in zip(self._parts.optimizer.param_groups, self.base_lrs, strict=True):
            group["lr"] = lr * factor

    def halve_rates(self, times: int) -> None:
        """Halve the learning rates that rounds begin with. Local."""
        self.base_lrs = [lr * 0.5**times for lr in self.base_lrs]

    def state_dict(self) -> dict[str, Any]:
        """Return the learning rates and what was taken so far."""
        return {"lrs": self.base_lrs, "steps": self.steps, "samples": self.samples}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        self.base_lrs, self.steps, self.samples = state["lrs"], state["steps"], state["samples"]


class _Rate:
    """How long a round has taken, and how fast it is since it began here."""

    def __init__(self, seconds: float, samples: int) -> None:
        self._begun = time.perf_counter()
        self._seconds = seconds
        self._samples = samples

    def now(self, samples: int) -> tuple[float, float]:
        """Return the seconds of the round, and the samples per second."""
        elapsed = time.perf_counter() - self._begun
        return self._seconds + elapsed, (samples - self._samples) / elapsed


# Losses of a round, kept on the device and looked at only at poll points.


_NAMED_IDS = 5


class LossWatch:
    """Collects step results; ``poll`` reduces them over ranks and stops a run that diverged.

    ``weights`` returns the slices of the weights that this rank owns.
    """

    def __init__(
        self, runtime: Runtime, stage: Stage, weights: Callable[[], Mapping[str, torch.Tensor]]
    ) -> None:
        self._runtime = runtime
        self._stage = stage
        self._weights = weights
        self._window: list[StepResult] = []

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
            raise DivergenceError(
                f"the gradient was not finite, or too large, {self._step(len(means) - 1)}, "
                f"{self._largest(len(means) - 1)}: it left weights that are not finite; try a "
                "smaller optimizer.lr"
            )
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
            f"the loss became {mean} {self._step(k)}, {where}{why}; try a smaller optimizer.lr"
        )

    def _step(self, k: int) -> str:
        step = self._stage.done - len(self._window) + k + 1
        return f"in round {self._stage.number}, step {step}"

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
