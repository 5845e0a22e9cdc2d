"""PrioritizedTrainer: what it draws, by which weights, and that a resume goes on exactly."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import Dataset

pytest.importorskip("transformers")

from transformers import (
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    TrainerCallback,
    TrainingArguments,
)

from distcl.errors import UsageError
from distcl.integrations import transformers
from distcl.integrations.transformers import Priorities, PrioritizedTrainer
from distcl.priority.weighting import WeightVector
from distcl.sampling.sampler import DistributedWeightedSampler
from tests.spawn import preload, run_ranks

preload("distcl.integrations.transformers")
preload("transformers.models.gpt2.modeling_gpt2")

N, EVERY, EACH, EPOCHS = 41, 2, 2, 2
HOW = Priorities(every=EVERY, min_ess=0.3, floor=0.1)


class Rows(Dataset[dict[str, torch.Tensor]]):
    """Token 0 of a row is its id."""

    def __init__(self) -> None:
        g = torch.Generator().manual_seed(0)
        self.x = torch.randint(N, 64, (N, 8), generator=g)
        self.x[:, 0] = torch.arange(N)

    def __len__(self) -> int:
        return N

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        labels = self.x[index].clone()
        labels[4 + index % 4 :] = -100
        return {"input_ids": self.x[index], "labels": labels}


class Recorded(PrioritizedTrainer):
    stop = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.seen: list[tuple[list[int], list[float]]] = []
        self.ids: list[int] = []

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        self.ids = inputs["input_ids"][:, 0].tolist()
        return super().compute_loss(model, inputs, *args, **kwargs)

    def sample_losses(self, outputs: Any, labels: torch.Tensor) -> torch.Tensor:
        losses = super().sample_losses(outputs, labels)
        self.seen.append((self.ids, losses.tolist()))
        return losses

    def refresh(self, global_step: int) -> None:
        super().refresh(global_step)
        if global_step == self.stop:
            self.control.should_training_stop = True


def make(folder: Path, each: int, stop: int = 0, **changed: Any) -> Recorded:
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "n_positions": 8, "n_embd": 16, "n_layer": 1, "n_head": 2, "bos_token_id": 0, "eos_token_id": 0}
    model = GPT2LMHeadModel(GPT2Config(**sizes))
    model.loss_type = "ForCausalLM"
    options: dict[str, Any] = {
        "per_device_train_batch_size": each,
        "gradient_accumulation_steps": EACH,
        "num_train_epochs": EPOCHS,
        "learning_rate": 0.02,
        "use_cpu": True,
        "report_to": [],
        "save_steps": 1,
        "save_total_limit": 2,
        "logging_steps": 1,
        "disable_tqdm": True,
    }
    trainer = Recorded(
        model=model,
        args=TrainingArguments(str(folder), **options | changed),
        train_dataset=Rows(),
        priorities=HOW,
    )
    trainer.stop = stop
    return trainer


def digest(trainer: Recorded) -> list[float]:
    return [p.double().sum().item() for p in trainer.model.parameters()]


def work(folder: Path, each: int) -> dict[str, Any]:
    """Train to the end; and again, stopped after an odd number of steps of epoch 1, and resumed."""
    full = make(folder / "full", each, save_strategy="no")
    full.train()
    steps = full.state.global_step
    at = steps // 2 + 3  # in epoch 1, between two refreshes
    assert at % EVERY
    stopped = make(folder / "stopped", each, at)
    stopped.train()
    resumed = make(folder / "stopped", each)
    resumed.train(resume_from_checkpoint=True)
    logs = [log["effective_sample_size"] for log in resumed.state.log_history if "loss" in log]
    assert stopped.seen + resumed.seen == full.seen
    assert len(stopped.seen) == 13
    assert digest(resumed) == digest(full)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return {"seen": full.seen, "steps": steps, "ess": logs}


@pytest.mark.parametrize(("world", "each"), [(1, 6), (2, 3), (3, 2)])
def test_draws_follow_the_losses_and_a_resume_is_exact(
    world: int, each: int, tmp_path: Path
) -> None:
    """The reference: losses by id, the last counts, as weights of a plain sampler."""
    ranks = run_ranks(world, work, tmp_path, each) if world > 1 else [work(tmp_path, each)]
    size, window = world * each, EVERY * EACH
    ids = np.arange(N)
    sampler = DistributedWeightedSampler(size, window=window, seed=42, draw=HOW.draw)
    sampler.set_weights(N)
    known = np.full(N, np.nan)
    micro, step, batches = 0, 0, []
    seen = [list(zip(*(rank["seen"][k] for rank in ranks), strict=True)) for k in range(len(ranks[0]["seen"]))]
    for epoch in range(EPOCHS):
        sampler.set_epoch(epoch)
        for k in range(len(sampler)):
            parts, losses = seen[micro]
            assert sum(parts, []) == sampler.global_batch(k).tolist(), (epoch, k)
            batches.append(sum(parts, []))
            for part, values in zip(parts, losses, strict=True):
                for i, loss in zip(part, values, strict=True):
                    known[i] = loss
            micro += 1
            if (k + 1) % EACH and k + 1 < len(sampler):
                continue
            step += 1
            if step % EVERY == 0:
                scores = np.where(np.isnan(known), np.nanmean(known), known)
                weights = WeightVector(ids, scores).shaped(min_ess=0.3, floor=0.1)
                first = -(-(k + 2) // window) * window
                sampler.set_weights(N, weights.values, from_step=first)
    assert micro == len(seen) and step == ranks[0]["steps"]
    assert len({tuple(batch) for batch in batches}) == len(batches)  # no epoch came twice
    assert 0.3 <= ranks[0]["ess"][-1] < 0.999


class Leaves(TrainerCallback):
    """Ends epoch 0 after a step."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_epoch_stop = state.global_step == 1


def test_losses_are_the_right_samples_after_an_epoch_that_is_left(tmp_path: Path) -> None:
    trainer = make(tmp_path, 6, save_strategy="no")
    trainer.add_callback(Leaves())
    credited = []
    observe = transformers._Draws.observe

    def noted(draws: Any, losses: torch.Tensor, world: int) -> None:
        credited.append(draws.sampler.global_batch(draws.step).tolist())
        observe(draws, losses, world)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformers._Draws, "observe", noted)
        trainer.train()
    assert credited == [ids for ids, _ in trainer.seen]
    assert len(credited) == 2 + 7


class Mine(GPT2LMHeadModel):
    """A language model of another name."""


def test_losses_are_those_of_the_model(tmp_path: Path) -> None:
    """The mean over samples of as many labels each is the model's own loss."""
    trainer = make(tmp_path, 6)
    config, x = trainer.model.config, torch.randint(64, (5, 8))
    config.num_labels, config.pad_token_id = 3, 0
    models: list[Any] = [Mine(config), GPT2LMHeadModel(config)]
    many = (torch.rand(5, 3) > 0.5).float()
    models.append(GPT2ForSequenceClassification(config))
    for model, labels in zip(models, (x, x, many), strict=True):
        model.loss_type = "ForCausalLM" if labels is x else None
        trainer.model = torch.compile(model.eval()) if model is models[1] else model.eval()
        with torch.no_grad():
            outputs = model(input_ids=x, labels=labels)
            losses = PrioritizedTrainer.sample_losses(trainer, outputs, labels)
            torch.testing.assert_close(losses.mean(), outputs.loss)
            if labels is x:  # logits of a tuned prompt come first
                logits = torch.cat([torch.randn(5, 4, 64), outputs["logits"]], 1)
                again = PrioritizedTrainer.sample_losses(trainer, {"logits": logits}, labels)
                whole = cross_entropy(logits[:, 3:-1].transpose(1, 2), labels)
                torch.testing.assert_close(again.mean(), whole)


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    for wrong in ({"alpha": -1}, {"floor": 2}, {"min_ess": 1.5}, {"cap": 0.5}, {"every": 2.5}):
        (name,) = wrong
        with pytest.raises(UsageError, match=f"Priorities: {name} must be .*, not {wrong[name]}"):
            Priorities(**wrong)  # type: ignore[arg-type]
    for changed, says in (
        ({"train_sampling_strategy": "group_by_length"}, "train_sampling_strategy = 'group_by_le"),
        ({"accelerator_config": {"dispatch_batches": True}}, "dispatch_batches"),
    ):
        with pytest.raises(UsageError, match=says):
            make(tmp_path, 6, **changed).train()
    plain = make(tmp_path / "plain", 6, max_steps=1)
    plain.train()
    folder = tmp_path / "plain" / "checkpoint-1"
    with pytest.raises(UsageError, match="ignore_data_skip"):
        make(tmp_path, 6, ignore_data_skip=True).train(resume_from_checkpoint=str(folder))
    with pytest.raises(ValueError, match="global_batch_size = 6, but this sampler has 5"):
        make(tmp_path, 5).train(resume_from_checkpoint=str(folder))
    with pytest.raises(UsageError, match="saved with every = 2, not 4"):
        half = make(tmp_path, 6, gradient_accumulation_steps=1)
        half.priorities = replace(HOW, every=2 * EVERY)  # the same window
        half.train(resume_from_checkpoint=str(folder))
    (folder / "priorities.pt").unlink()
    with pytest.raises(UsageError, match=r"no priorities\.pt: it is of a training without"):
        make(tmp_path, 6).train(resume_from_checkpoint=str(folder))
