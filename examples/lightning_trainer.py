"""Weighted draws in Lightning's Trainer: killed, resumed, the same end.

python examples/lightning_trainer.py DIR [--devices 2] [--die-at STEP]; again to resume
"""

import argparse
import hashlib
import os
from pathlib import Path

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import TensorDataset
from torchdata.stateful_dataloader import StatefulDataLoader

from distcl import DistributedWeightedSampler

parser = argparse.ArgumentParser()
parser.add_argument("folder", type=Path)
parser.add_argument("--devices", type=int, default=1)
parser.add_argument("--die-at", type=int, default=-1)
options = parser.parse_args()
x = torch.arange(500.0)[:, None] / 500


class Model(lightning.LightningModule):
    """Learns a square, and draws large x more often."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 1))

    def train_dataloader(self):
        """Give each rank its part, by a loader that saves the sampler's state."""
        trainer = self.trainer
        sampler = DistributedWeightedSampler(
            24, rank=trainer.global_rank, world_size=trainer.world_size
        )
        sampler.set_weights(len(x), x[:, 0] + 0.1)
        return StatefulDataLoader(TensorDataset(x, x.square()), batch_sampler=sampler)

    def training_step(self, batch, index):
        """Return the mean squared error."""
        if self.global_step == options.die_at:
            os._exit(9)
        return nn.functional.mse_loss(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        """Return Adam."""
        return torch.optim.Adam(self.parameters(), lr=0.01)


lightning.seed_everything(0, verbose=False)
model = Model()
trainer = lightning.Trainer(
    accelerator="cpu",
    devices=options.devices,
    max_epochs=3,
    use_distributed_sampler=False,  # the sampler gives each rank its part already
    callbacks=[ModelCheckpoint(options.folder, save_last=True, every_n_train_steps=5)],
    logger=False,
    enable_progress_bar=False,
    enable_model_summary=False,
)
last = options.folder / "last.ckpt"
trainer.fit(model, ckpt_path=last if last.exists() else None)
if trainer.is_global_zero:
    parameters = torch.cat([p.detach().flatten() for p in model.parameters()])
    print("digest", hashlib.sha256(parameters.numpy().tobytes()).hexdigest()[:12])
