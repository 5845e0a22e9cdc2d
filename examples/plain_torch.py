"""Draws by loss in a plain torch loop: killed, resumed, the same at any number of processes.

python examples/plain_torch.py DIR [--die-at STEP]; again to resume; or
torchrun --nproc-per-node 2 examples/plain_torch.py DIR
"""

import argparse
import hashlib
import os
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from distcl import DistributedWeightedSampler

EPOCHS, BATCH, WINDOW = 3, 24, 4  # a global batch; new weights every WINDOW steps

parser = argparse.ArgumentParser()
parser.add_argument("folder", type=Path)
parser.add_argument("--die-at", type=int, default=-1)
options = parser.parse_args()
rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
if world > 1:
    dist.init_process_group("gloo")

torch.manual_seed(0)
x = torch.randn(500, 8)
dataset = TensorDataset(x, (x[:, 0] * x[:, 1] > 0).long())
model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 2))
training = nn.parallel.DistributedDataParallel(model) if world > 1 else model
optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
criterion = nn.CrossEntropyLoss(reduction="none")
scores = np.ones(len(dataset))  # each sample's last loss
sampler = DistributedWeightedSampler(BATCH, window=WINDOW, rank=rank, world_size=world)
sampler.set_weights(len(dataset), scores)
loader = DataLoader(dataset, batch_sampler=sampler)

checkpoint, first = options.folder / "checkpoint.pt", 0
options.folder.mkdir(parents=True, exist_ok=True)
if checkpoint.exists():
    state = torch.load(checkpoint)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    sampler.load_state_dict(state["sampler"])
    scores, first = state["scores"].numpy(), sampler.epoch
    print(f"rank {rank} resumes in epoch {first}, step {sampler.first_step}")

for epoch in range(first, EPOCHS):
    sampler.set_epoch(epoch)
    for step, (inputs, labels) in enumerate(loader, start=sampler.first_step):
        if epoch * len(sampler) + step == options.die_at:
            os._exit(9)
        losses = criterion(training(inputs), labels)
        losses.mean().backward()  # parts are equal: the number of processes divides BATCH
        optimizer.step()
        optimizer.zero_grad()

        everyones = [losses.detach()]  # in order of rank, as global_batch is
        if world > 1:
            everyones = [torch.empty_like(everyones[0]) for _ in range(world)]
            dist.all_gather(everyones, losses.detach())
        scores[sampler.global_batch(step)] = torch.cat(everyones).numpy()
        if (step + 1) % WINDOW == 0:
            weights = 0.1 + scores  # never 0; equal on all ranks
            sampler.set_weights(len(dataset), weights, from_step=step + 1)
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            state["sampler"] = sampler.state_dict(consumed=step + 1)
            state["scores"] = torch.from_numpy(scores)
            if rank == 0:
                torch.save(state, checkpoint.with_suffix(".new"))
                checkpoint.with_suffix(".new").replace(checkpoint)

if rank == 0:
    parameters = torch.cat([p.detach().flatten() for p in model.parameters()])
    digest = hashlib.sha256(parameters.numpy().tobytes()).hexdigest()[:12]
    print(f"digest {digest}, effective sample size {weights.sum() ** 2 / (weights**2).sum():.0f}")
if world > 1:
    dist.destroy_process_group()
