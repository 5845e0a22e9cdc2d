"""Parts as users bring them: models, losses and signals of all kinds, right and wrong."""

from __future__ import annotations

import math
from collections import namedtuple
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from distcl.types import Batch, DataSpec, Outputs, SourceInfo


class Plain(nn.Module):
    """A perceptron that the others change."""

    def __init__(self, spec: DataSpec) -> None:
        super().__init__()
        self.a = nn.Linear(math.prod(spec.x_shape), 12)
        self.b = nn.Linear(12, spec.classes)

    def hidden(self, x):
        return torch.tanh(self.a(x.flatten(1)))

    def forward(self, x):
        return self.b(self.hidden(x))


class Unused(Plain):
    """Has a layer that no forward uses."""

    def __init__(self, spec: DataSpec) -> None:
        super().__init__(spec)
        self.never = nn.Linear(3, 3)


class Branching(Plain):
    """Sends some samples through a layer of their own, which other batches do not use."""

    def __init__(self, spec: DataSpec) -> None:
        super().__init__(spec)
        self.own = nn.Linear(12, 12)

    def forward(self, x):
        h = self.hidden(x)
        mask = (x.flatten(1).sum(1) * 100).long() % 23 == 0
        if mask.any():
            h = torch.where(mask[:, None], self.own(h), h)
        return self.b(h)


class Experts(Plain):
    """Sends each sample through one of many layers: a batch uses some, a stand-in another."""

    def __init__(self, spec: DataSpec) -> None:
        super().__init__(spec)
        self.experts = nn.ModuleList(nn.Linear(12, 12) for _ in range(9))

    def forward(self, x):
        h = self.hidden(x)
        chosen = (x.flatten(1).sum(1) * 100).long() % len(self.experts)
        out = h
        for k in chosen.unique().tolist():
            out = torch.where((chosen == k)[:, None], self.experts[k](h), out)
        return self.b(out)


class Scalar(Plain):
    """Has a parameter without dimensions."""

    def __init__(self, spec: DataSpec) -> None:
        super().__init__(spec)
        self.t = nn.Parameter(torch.tensor(1.0))

    def forward(self, x):
        return self.t * super().forward(x)


class ComplexBuffer(Plain):
    def __init__(self, spec: DataSpec) -> None:
        super().__init__(spec)
        self.register_buffer("filter", torch.complex(torch.zeros(3), torch.ones(3)))


class ComplexParameter(Plain):
    def __init__(self, spec: DataSpec) -> None:
        super().__init__(spec)
        self.w = nn.Parameter(torch.ones(3, dtype=torch.complex64))


class Huge(Plain):
    def __init__(self, spec: DataSpec) -> None:
        super().__init__(spec)
        self.register_buffer("t", torch.tensor([1e300], dtype=torch.float64), persistent=False)


class Lazy(nn.Module):
    def __init__(self, spec: DataSpec, norm: bool = False) -> None:
        super().__init__()
        self.a, self.b = nn.LazyLinear(12), nn.LazyLinear(spec.classes)
        self.norm = nn.LazyBatchNorm1d() if norm else nn.Identity()

    def forward(self, x):
        return self.b(torch.relu(self.norm(self.a(x.flatten(1)))))


class Norm(Plain):
    """BatchNorm over vectors: cannot train on one sample."""

    def __init__(self, spec: DataSpec) -> None:
        super().__init__(spec)
        self.norm = nn.BatchNorm1d(12)

    def hidden(self, x):
        return self.norm(super().hidden(x))


class UnitInputs(Plain):
    """Divides a sample by its norm: zeros would give NaN."""

    def forward(self, x):
        x = x.flatten(1)
        return super().forward(x / x.norm(dim=1, keepdim=True))


class Noisy(Plain):
    """Draws from all generators, and counts in buffers that it replaces."""

    def __init__(self, spec: DataSpec) -> None:
        super().__init__(spec)
        self.drop = nn.Dropout(0.3)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        import random

        import numpy as np

        if self.training:
            self.calls = self.calls + 1 + 0 * random.random() + 0 * float(np.random.rand())
        return self.drop(super().forward(x))


@dataclass
class ModelOutput:
    logits: torch.Tensor
    features: torch.Tensor


Named = namedtuple("Named", "features logits")
RETURNS = {
    "dict": lambda z, h: {"features": h, "logits": z},
    "output": lambda z, h: ModelOutput(z, h),
    "named": lambda z, h: Named(h, z),
    "tuple": lambda z, h: (z, h),
    "other": lambda z, h: {"features": h},
    "text": lambda z, h: "logits",
    "mean": lambda z, h: z.mean(0),
    "squeezed": lambda z, h: z.squeeze(0),
    "detached": lambda z, h: z.detach(),
}


class Returning(Plain):
    """Returns its logits in some form."""

    def __init__(self, spec: DataSpec, how: str) -> None:
        super().__init__(spec)
        self.how = RETURNS[how]

    def forward(self, x):
        h = self.hidden(x)
        return self.how(self.b(h), h)


class TwoHeads(Plain):
    """Returns two outputs, of which ``first_loss`` takes one."""

    def __init__(self, spec: DataSpec) -> None:
        super().__init__(spec)
        self.other = nn.Linear(12, spec.classes)

    def forward(self, x):
        h = self.hidden(x)
        return self.b(h), self.other(h)


def first_loss(outputs, y):
    return functional.cross_entropy(outputs[0], y, reduction="none")


def mean_loss(outputs, y):
    return functional.cross_entropy(outputs, y)


class Broken(Plain):
    """Raises from the ``after``-th training forward on, on one rank or on all."""

    def __init__(self, spec: DataSpec, after: int = 0, rank: int = -1) -> None:
        super().__init__(spec)
        self.after, self.rank, self.calls = after, rank, 0

    def forward(self, x):
        import os

        self.calls += self.training
        if self.calls > self.after and self.rank in (-1, int(os.environ.get("RANK", "0"))):
            raise ZeroDivisionError("their own mistake")
        return super().forward(x)


def sequence(spec: DataSpec, inputs: int = 7) -> nn.Module:
    """A model without a line of theirs in its forward; 7 inputs do not fit."""
    return nn.Sequential(nn.Flatten(), nn.Linear(inputs, spec.classes))


class Unmappable(Plain):
    """Asks for a value of its input, which vmap refuses."""

    def forward(self, x):
        return super().forward(x) * (2.0 if x.sum().item() > -1 else 1.0)


def broken_loss(outputs, y):
    raise KeyError("their loss")


def leaving_loss(outputs, y):
    raise SystemExit(0)


def refused_loss(outputs, y):
    raise RuntimeError("connection refused: it timed out")


class BrokenSignal:
    needs_anchor = False
    needs_logits = False

    def score(self, batch: Batch, now: Outputs, anchor: Outputs | None) -> torch.Tensor:
        return now.loss / [][0]


class FlatSignal(BrokenSignal):
    def score(self, batch: Batch, now: Outputs, anchor: Outputs | None) -> torch.Tensor:
        return now.loss.mean()


def broken_source(config):
    raise ValueError("their source")


class Late:
    """Samples, one of which cannot be read."""

    def __init__(self, n: int, error: BaseException) -> None:
        self.info = SourceInfo(labels=torch.arange(n).numpy() % 3)
        self.error = error

    def __len__(self) -> int:
        return len(self.info.labels)

    def read(self, ids):
        if 77 in ids:
            raise self.error
        ids = torch.as_tensor(ids)
        return Batch(ids, ids[:, None].float(), ids % 3, len(ids))


def late_source(config):
    return Late(100, OverflowError("sample 77\nis theirs")), Late(50, OverflowError())


def leaving_source(config):
    return Late(100, SystemExit(0)), Late(50, SystemExit(0))
