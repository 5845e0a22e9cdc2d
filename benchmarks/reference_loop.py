"""The published single-process loop, written out plainly: what distcl is measured against.

    python benchmarks/reference_loop.py TASKS.npz [--model MODEL] [--per-sample | --arithmetic]

The structure is that of the method's published code: one process; a DataLoader of (image, label)
pairs; before each task two ``functional_call`` passes, under the weights and under theta_star, over
the data in order; the differences as a list of floats into a WeightedRandomSampler; the EWC penalty
added to the loss parameter by parameter, each term read back by ``.item()``. The model is one of
distcl's, ``[model]`` as JSON; arithmetic, batches, learning rate and penalty are those of the job
that it is compared with.

TASKS.npz (``distcl bench peers`` writes one): x float32 [T·N, 1, 28, 28], y int64 [T·N], tasks one
after another, x_test and y_test alike; raw float32 [N, 1, 28, 28] and raw_y int64 [N], what they
are before any drift, for ``--per-sample``, which transforms each image when it is loaded, as the
published datasets do.

``--arithmetic`` leaves out all but what must be computed, in as few calls as torch needs for it:
two inference passes over each task, and its steps.

Prints JSON: seconds from the first task to the last evaluation, those of them that scoring took,
and the average accuracy at the end; with ``--arithmetic``, seconds.
"""

from __future__ import annotations

import argparse
import json
import math
import time

import numpy as np
import torch
import torch.nn.functional as F
from torch.func import functional_call
from torch.utils.data import DataLoader, Dataset, TensorDataset, WeightedRandomSampler

from distcl.config import ModelConfig
from distcl.models import create_model
from distcl.types import DataSpec

MODEL = '{"name": "cnn", "options": {"channels": [16, 32, 64]}}'
BATCH = 64
SCORE_BATCH = 64  # scored through the same loader as trained
LR = 0.05
EWC_LAMBDA = 5.0
EWC_DECAY = 0.9
ALPHA = 1.0


class Drifting(Dataset):
    """Images that are turned, stretched and shifted one by one, whenever they are loaded."""

    def __init__(self, images: torch.Tensor, labels: torch.Tensor, theta: torch.Tensor) -> None:
        self.images, self.labels, self.theta = images, labels, theta

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        image = self.images[index]
        grid = F.affine_grid(self.theta[None], [1, *image.shape], align_corners=False)
        return F.grid_sample(image[None], grid, align_corners=False)[0], self.labels[index]


def affine(task: int) -> torch.Tensor:
    """Return the map of a task, [2, 3]: ``task`` small random maps, one on top of the other."""
    rng, whole = np.random.default_rng(0), np.eye(3)
    for _ in range(task):
        angle, scale, dx, dy = rng.uniform(-1, 1, 4) * [math.radians(15), 0.1, 0.1, 0.1]
        cos, sin = math.cos(angle) * math.exp(scale), math.sin(angle) * math.exp(scale)
        whole = whole @ np.array([[cos, -sin, dx], [sin, cos, dy], [0, 0, 1]])
    return torch.from_numpy(whole[:2].astype(np.float32))


def compute_priorities(model, theta_star, loader):
    """Return floats in loader order: clamp(L(w, x) - L(theta_star, x), 1e-8) ** alpha."""
    model.eval()
    now = {name: p.detach() for name, p in model.named_parameters()}
    priorities = []
    with torch.no_grad():
        for x, y in loader:
            loss = F.cross_entropy(functional_call(model, now, (x,)), y, reduction="none")
            old = F.cross_entropy(functional_call(model, theta_star, (x,)), y, reduction="none")
            priorities.extend(((loss - old).clamp(min=1e-8) ** ALPHA).tolist())
    model.train()
    return priorities


def compute_fisher(model, dataset, samples):
    """Return the mean squared gradient of the first samples' losses, one at a time."""
    fisher = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    model.eval()
    for index in range(samples):
        x, y = dataset[index]
        model.zero_grad()
        F.cross_entropy(model(x[None]), y[None]).backward()
        for name, p in model.named_parameters():
            fisher[name] += p.grad.detach() ** 2 / samples
    model.zero_grad()
    model.train()
    return fisher


def evaluate(model, dataset):
    """Return the accuracy on a dataset."""
    model.eval()
    right = 0
    with torch.no_grad():
        for x, y in DataLoader(dataset, batch_size=256):
            right += (model(x).argmax(dim=1) == y).sum().item()
    model.train()
    return right / len(dataset)


def train(tasks, tests, model, epochs, samples, seed):
    """Train on one task after another; return seconds, those of them for scores, and accuracy."""
    spec = DataSpec((1, 28, 28), 10)
    model = create_model(ModelConfig.model_validate_json(model), spec, seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    theta_star = {name: p.detach().clone() for name, p in model.named_parameters()}
    fisher = None
    torch.manual_seed(seed)
    begun, scoring = time.perf_counter(), 0.0
    for dataset in tasks:
        before = time.perf_counter()
        weights = compute_priorities(model, theta_star, DataLoader(dataset, SCORE_BATCH))
        scoring += time.perf_counter() - before
        theta_star = {name: p.detach().clone() for name, p in model.named_parameters()}
        sampler = WeightedRandomSampler(weights, num_samples=len(weights), replacement=True)
        loader = DataLoader(dataset, batch_size=BATCH, sampler=sampler)
        for _ in range(epochs):
            for x, y in loader:
                loss = F.cross_entropy(model(x), y)
                total_penalty = 0.0
                if fisher is not None:
                    for name, p in model.named_parameters():
                        pull = fisher[name] * (p - theta_star[name]) ** 2
                        penalty = EWC_LAMBDA / 2 * pull.sum()
                        total_penalty += penalty.item()
                        loss = loss + penalty
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        new = compute_fisher(model, dataset, samples)
        if fisher is not None:
            new = {n: EWC_DECAY * fisher[n] + (1 - EWC_DECAY) * new[n] for n in new}
        fisher = new
        accuracies = [evaluate(model, test) for test in tests]
    seconds, accuracy = time.perf_counter() - begun, sum(accuracies) / len(accuracies)
    return {"seconds": seconds, "scoring": scoring, "accuracy": accuracy}


def arithmetic(tasks, model, epochs, seed):
    """Return the seconds of the job's forwards, backwards, penalties and steps, and of no more."""
    model = create_model(ModelConfig.model_validate_json(model), DataSpec((1, 28, 28), 10), seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    weights = list(model.parameters())
    theta_star = [p.detach().clone() for p in weights]
    fisher = [torch.rand_like(p) for p in weights]
    torch.manual_seed(seed)
    begun = time.perf_counter()
    for task, (x, y) in enumerate(tasks):
        with torch.inference_mode():
            for part in x.split(512):
                model(part), model(part)
        for _ in range(epochs):
            for rows in torch.randint(len(y), (len(y),)).split(BATCH):
                optimizer.zero_grad()
                F.cross_entropy(model(x[rows]), y[rows]).backward()
                if task:
                    away = torch._foreach_sub([p.detach() for p in weights], theta_star)
                    grads = [p.grad for p in weights]
                    torch._foreach_addcmul_(grads, away, fisher, value=EWC_LAMBDA)
                optimizer.step()
    return {"seconds": time.perf_counter() - begun}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tasks")
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--fisher", type=int, default=256, help="samples of a task's Fisher")
    parser.add_argument("--per-sample", action="store_true")
    parser.add_argument("--arithmetic", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    data = {name: torch.from_numpy(value) for name, value in np.load(given.tasks).items()}
    count = int(data["count"])
    cached = list(zip(data["x"].chunk(count), data["y"].chunk(count), strict=True))
    if given.arithmetic:
        print(json.dumps(arithmetic(cached, given.model, given.epochs, given.seed)))
        return
    tests = [
        TensorDataset(x, y)
        for x, y in zip(data["x_test"].chunk(count), data["y_test"].chunk(count), strict=True)
    ]
    tasks: list[Dataset] = []
    for task, (x, y) in enumerate(cached):
        drifting = Drifting(data["raw"], data["raw_y"], affine(task))
        tasks.append(drifting if given.per_sample else TensorDataset(x, y))
    print(json.dumps(train(tasks, tests, given.model, given.epochs, given.fisher, given.seed)))


if __name__ == "__main__":
    main()
