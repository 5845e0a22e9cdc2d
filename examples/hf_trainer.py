"""Draws by loss in the Hugging Face Trainer: killed, resumed, the same end.

python examples/hf_trainer.py DIR [--die-at STEP]; again to resume; or
torchrun --nproc-per-node 2 examples/hf_trainer.py DIR
"""

import argparse
import hashlib
import os
import pydoc_data.topics as topics

import torch
from transformers import GPT2Config, GPT2LMHeadModel, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from distcl.integrations.transformers import Priorities, PrioritizedTrainer

parser = argparse.ArgumentParser()
parser.add_argument("folder")
parser.add_argument("--die-at", type=int, default=-1)
options = parser.parse_args()
world = int(os.environ.get("WORLD_SIZE", 1))
os.makedirs(options.folder, exist_ok=True)

text = torch.frombuffer(bytearray(topics.topics["specialnames"].encode()[:5120]), dtype=torch.uint8)
rows = text[: len(text) // 32 * 32].view(-1, 32).long()
dataset = [{"input_ids": row, "labels": row} for row in rows]  # any map-style dataset


class Die(TrainerCallback):
    """Ends as a power failure would."""

    def on_step_begin(self, args, state, control, **kwargs):
        """Stop at once at the step that was asked for."""
        if state.global_step == options.die_at:
            os._exit(9)


torch.manual_seed(0)
sizes = {"vocab_size": 256, "n_positions": 32, "n_embd": 32, "n_layer": 1, "n_head": 2}
model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))
model.loss_type = "ForCausalLM"  # else transformers 5 counts a label too many of GPT2
trainer = PrioritizedTrainer(
    model=model,
    args=TrainingArguments(
        options.folder,
        per_device_train_batch_size=8 // world,
        gradient_accumulation_steps=2,
        num_train_epochs=4,
        learning_rate=3e-3,
        save_steps=3,
        save_total_limit=2,
        logging_steps=4,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
    ),
    train_dataset=dataset,
    priorities=Priorities(every=2, min_ess=0.5),
    callbacks=[Die()],
)
trainer.train(resume_from_checkpoint=get_last_checkpoint(options.folder))

if trainer.is_world_process_zero():
    parameters = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
    print("digest", hashlib.sha256(parameters.numpy().tobytes()).hexdigest()[:12])
if world > 1:
    torch.distributed.destroy_process_group()
