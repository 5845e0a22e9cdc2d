"""Prioritized draws for Hugging Face's Trainer and its subclasses."""

from __future__ import annotations

from collections.abc import Iterator, Sized
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, SupportsIndex

import numpy as np
import torch
from torch.nn import functional as F
from torch.utils.data import Sampler
from transformers import Trainer, TrainerCallback
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from distcl.errors import UsageError
from distcl.priority.signal_table import SignalTable
from distcl.priority.weighting import WeightVector
from distcl.sampling.global_view import GlobalView
from distcl.sampling.sampler import DistributedWeightedSampler
from distcl.types import Ids

if TYPE_CHECKING:
    _Trainer = Any
else:
    _Trainer = object

_CAUSAL = frozenset(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
_FILE = "priorities.pt"
_NOT_OURS = (
    "the training loader does not draw from the plan: get_train_dataloader must take its sampler "
    "from _get_train_sampler, and train_dataset needs a length (no IterableDataset)"
)


@dataclass(frozen=True)
class Priorities:
    """How losses become draws: w = loss^alpha, capped, tempered, with a floor, see METHOD.md."""

    every: int = 10
    """Optimizer steps from one refresh of the weights to the next."""
    alpha: float = 1.0
    cap: float = 0.0
    """The most a weight may be, in means; 0: no cap."""
    min_ess: float = 0.5
    """The least effective sample size, as a share of the dataset."""
    floor: float = 0.1
    """The share of draws that is uniform."""
    draw: str = "systematic"
    """See DistributedWeightedSampler."""

    def __post_init__(self) -> None:
        share = "from 0 to 1"
        for name, fits, limits in (
            (
                "every",
                isinstance(self.every, int) and self.every >= 1,
                "a number of steps, 1 or more",
            ),
            ("alpha", 0 <= self.alpha < np.inf, "0 or more"),
            ("cap", self.cap == 0 or 1 <= self.cap < np.inf, "0 or at least 1"),
            ("min_ess", 0 <= self.min_ess <= 1, share),
            ("floor", 0 <= self.floor <= 1, share),
        ):
            if not fits:
                raise UsageError(f"Priorities: {name} must be {limits}, not {getattr(self, name)}")


class _Ids(Sampler[SupportsIndex]):
    """A plan's ids one by one, which the Trainer's loader cuts into the same parts again.

    It can: in windows, all batches are whole.
    """

    def __init__(self, view: GlobalView, draws: _Draws) -> None:
        self._view = view
        self._draws = draws

    def __len__(self) -> int:
        return len(self._draws.sampler) * int(self._draws.sampler.global_batch_size)

    def __iter__(self) -> Iterator[SupportsIndex]:
        self._draws.read = True
        self._draws.step = self._draws.sampler.first_step
        return chain.from_iterable(self._view)

    def set_epoch(self, epoch: int) -> None:
        self._view.set_epoch(epoch)


class _Draws:
    """What a training draws, and by which losses. The same on every process."""

    def __init__(
        self, how: Priorities, number: int, sampler: DistributedWeightedSampler, each: int
    ) -> None:
        self.how = how
        self._rhythm = {"every": how.every, "gradient_accumulation_steps": each}
        self.sampler = sampler
        self.step = 0
        """Micro-steps of this epoch that were trained on."""
        self.read = False
        """Whether a loader has begun to read it."""
        self.ess = 1.0
        self._ids: Ids = np.arange(number)
        self._table = SignalTable()
        self._table.keep(self._ids)
        self._waiting: list[tuple[Ids, torch.Tensor]] = []
        sampler.set_weights(number)

    def observe(self, losses: torch.Tensor, world: int) -> None:
        """Take the losses [b] of this process's part of a micro-step. Local."""
        if not self.read:
            raise UsageError(_NOT_OURS)
        ids = self.sampler.global_batch(self.step)
        if losses.ndim != 1 or len(losses) * world != len(ids):
            raise UsageError(
                f"a batch of {len(ids) // world} samples has losses {list(losses.shape)}: batches "
                "must keep one row for each sample (padding_free must be off)"
            )
        self.step += 1
        self._waiting.append((ids, losses.detach().float()))

    def gather(self, accelerator: Any) -> None:
        """Put what waits into the table, in the order of the plan. Collective."""
        if not self._waiting:
            return
        ids, losses = zip(*self._waiting, strict=True)
        self._waiting = []
        mine = torch.stack(losses)  # [micro-steps, b]
        every = accelerator.gather(mine).view(-1, *mine.shape).transpose(0, 1)
        scores = every.reshape(-1).double().cpu().numpy()
        good = np.isfinite(scores)
        unknown = np.full(len(scores), -1)
        self._table.write(np.concatenate(ids)[good], scores[good], unknown[good])

    def refresh(self, ahead: int) -> None:
        """Draw by new weights from the first window that is not read: ``ahead`` steps are."""
        how, window = self.how, self.sampler.window
        weights = WeightVector(self._ids, self._table.read(self._ids)).shaped(
            how.alpha, how.cap, how.min_ess, how.floor
        )
        self.ess = weights.ess()
        first = -(-(self.step + ahead) // window) * window
        self.sampler.set_weights(len(self._ids), weights.values, from_step=first)

    def state_dict(self) -> dict[str, Any]:
        """Return all that a resume needs; call :meth:`gather` before."""
        sampler = self.sampler.state_dict(consumed=self.step)
        state = {"sampler": sampler, "table": self._table.state_dict(), "ess": self.ess}
        return state | {"rhythm": self._rhythm}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, saved in state.get("rhythm", {}).items():
            if saved != (now := self._rhythm[name]):
                raise UsageError(f"{_FILE} was saved with {name} = {saved}, not {now}")
        self.sampler.load_state_dict(state["sampler"])
        self._table.load_state_dict(state["table"])
        self.ess = state["ess"]


class _Refresh(TrainerCallback):  # type: ignore[misc]
    """Has the weights made anew every few steps."""

    def __init__(self, trainer: PrioritizedMixin) -> None:
        self._trainer = trainer

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer.refresh(state.global_step)


class PrioritizedMixin(_Trainer):  # type: ignore[misc]
    """Makes a ``transformers.Trainer`` subclass draw its training samples by priority.

    ``class Mine(PrioritizedMixin, SFTTrainer)``, with ``priorities=Priorities(…)`` in place of a
    sampler. A sample's priority is the loss that it had when it was last trained on, computed from
    the logits of that forward; one that was not trained on yet counts as the mean. Every
    ``priorities.every`` optimizer steps the losses are gathered and become weights, which act from
    the first micro-step that no loader has read ahead, rounded up to a multiple of the window:
    ``every`` x ``gradient_accumulation_steps`` micro-steps, or as many as are read ahead. Logs have
    ``effective_sample_size``, a share. Checkpoints have ``priorities.pt``, and a resume in
    mid-epoch goes on exactly; the first ``train()`` and each further one
    begin uniformly.

    An epoch is ``len(train_dataset)`` draws, rounded up to whole global batches. The dataset needs
    a length; its columns and the collator stay as they are. The training loss is untouched.
    """

    def __init__(self, *args: Any, priorities: Priorities | None = None, **kwargs: Any) -> None:
        self.priorities = priorities or Priorities()
        self._draws: _Draws | None = None
        super().__init__(*args, **kwargs)
        self.add_callback(_Refresh(self))

    def sample_losses(self, outputs: Any, labels: torch.Tensor) -> torch.Tensor:
        """Return the loss of each sample, [B], by which it is drawn; override for another score.

        Cross entropy, of language models the mean over a sample's tokens (labels of -100 left out,
        causal models shifted by one; trl's fused heads give ``log_probs`` of tokens, [B, T]);
        squared error for labels that are not integers, or, of several labels a sample, the mean of
        their binary cross entropy. Local, and called without gradients.
        """
        if (told := outputs.get("log_probs")) is not None:
            losses: torch.Tensor = -told.sum(1) / outputs["label_mask"].sum(1).clamp(min=1)
            return losses
        if (logits := outputs.get("logits")) is None:
            raise UsageError(
                f"each sample's loss is taken from logits; the outputs have {', '.join(outputs)}: "
                "override sample_losses"
            )
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        if hasattr(model, "get_base_model"):  # of peft
            model = model.get_base_model()
        config = getattr(model, "config", None)
        if labels.is_floating_point():
            if getattr(config, "problem_type", None) == "multi_label_classification":
                losses = F.binary_cross_entropy_with_logits(logits, labels, reduction="none")
            else:
                losses = (logits.reshape(labels.shape) - labels).square()
            return losses.reshape(len(labels), -1).mean(1)
        causal = any(one.__name__ in _CAUSAL for one in type(model).__mro__) or (
            getattr(model, "loss_type", None) in ("ForCausalLM", "ForConditionalGeneration")
            and not getattr(config, "is_encoder_decoder", False)
        )
        if labels.ndim > 1 and causal:
            prompt = max(logits.shape[1] - labels.shape[1], 0)  # tuned, by peft: without labels
            labels = F.pad(labels, (prompt, 0), value=-100)
            logits, labels = logits[:, :-1], labels[:, 1:]
        flat = logits.reshape(-1, logits.shape[-1]).float()
        losses = F.cross_entropy(flat, labels.reshape(-1), reduction="none").view(len(labels), -1)
        return losses.sum(1) / (labels.reshape(len(labels), -1) != -100).sum(1).clamp(min=1)

    # ------------------------------------------------------------ what the Trainer calls

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[Any]:
        data = self.train_dataset if train_dataset is None else train_dataset
        args, accelerator = self.args, self.accelerator
        if not isinstance(data, Sized):
            raise UsageError("priorities belong to samples: train_dataset needs a length")
        if args.n_gpu > 1:
            raise UsageError("start one process for each GPU: torchrun --nproc-per-node gpu …")
        if (strategy := getattr(args, "train_sampling_strategy", "random")) != "random":
            raise UsageError(
                f"train_sampling_strategy = '{strategy}' and priorities exclude each other: set it "
                "to 'random'"
            )
        size = self._train_batch_size * (
            1 if accelerator.split_batches else accelerator.num_processes
        )
        each = args.gradient_accumulation_steps
        window = self.priorities.every * each
        sampler = DistributedWeightedSampler(
            size,
            window=max(window, self._ahead()),
            seed=args.seed if args.data_seed is None else args.data_seed,
            draw=self.priorities.draw,
        )
        view = GlobalView(sampler, accelerator)
        self._draws = _Draws(self.priorities, len(data), sampler, each)
        return _Ids(view, self._draws)

    def _ahead(self) -> int:
        """How many micro-steps a prepared loader has read beyond what was trained on."""
        workers, prefetch = self.args.dataloader_num_workers, self.args.dataloader_prefetch_factor
        return 1 + int(workers) * (2 if prefetch is None else int(prefetch))

    def _drawing(self) -> _Draws:
        if self._draws is None:
            raise UsageError(_NOT_OURS)
        return self._draws

    def refresh(self, global_step: int) -> None:
        """Make the weights anew, if it is time to. Collective."""
        if global_step % self.priorities.every == 0:
            self._drawing().gather(self.accelerator)
            self._drawing().refresh(self._ahead())

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, *args: Any, **kwargs: Any
    ) -> Any:
        """Return the Trainer's own loss; in training, keep each sample's."""
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, *args, **kwargs)
        labels, told = inputs.get("labels"), []
        with model.register_forward_hook(lambda module, given, outputs: told.append(outputs)):
            result = super().compute_loss(model, inputs, return_outputs, *args, **kwargs)
        if labels is None or not (told and isinstance(told[0], dict)):
            returned = type(told[0]).__name__ if told else "nothing"
            raise UsageError(
                "each sample's loss needs labels and a ModelOutput: the batch has "
                f"{', '.join(inputs)}, the model returned {returned}"
            )
        with torch.no_grad():
            losses = self.sample_losses(told[0], labels)
        self._drawing().observe(losses, self.accelerator.num_processes)
        return result

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log as the Trainer does, with the effective sample size beside the training loss."""
        if "loss" in logs and self._draws is not None:
            logs["effective_sample_size"] = self._draws.ess
        super().log(logs, *args, **kwargs)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Save the state first: a checkpoint that has the Trainer's has it too. Collective."""
        draws = self._drawing()
        draws.gather(self.accelerator)
        if self.args.should_save:
            folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
            folder.mkdir(parents=True, exist_ok=True)
            torch.save(draws.state_dict(), folder / _FILE)
        super()._save_checkpoint(model, trial)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        if self.args.ignore_data_skip:
            raise UsageError(
                "to resume by priority, the Trainer must skip what was trained on: "
                "set ignore_data_skip to False"
            )
        file = Path(checkpoint) / _FILE
        if not file.exists():
            raise UsageError(
                f"'{checkpoint}' has no {_FILE}: it is of a training without "
                "priorities, and cannot be resumed with them"
            )
        self._drawing().load_state_dict(torch.load(file, weights_only=True))


class PrioritizedTrainer(PrioritizedMixin, Trainer):  # type: ignore[misc]
    """``transformers.Trainer`` whose training samples are drawn by priority."""
