"""Small reference models. Each takes inputs of ``spec.x_shape`` and returns [B, outputs].

``outputs`` is the number of classes or, for regression, of values in a target; the last layer is
called ``head``. All work under ``torch.func`` (functional_call, vmap, grad) and on empty batches;
with ``norm = "batch"`` both hold in eval mode only. Nothing here communicates.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import nn

from distcl.errors import ConfigError
from distcl.registry import Count, checked
from distcl.types import DataSpec

Norm = Literal["group", "batch"]

_ACTIVATIONS = {"relu": nn.ReLU, "gelu": nn.GELU, "tanh": nn.Tanh}


class MLP(nn.Module):
    """Multi-layer perceptron on flattened inputs; no hidden layer makes it linear."""

    @checked("model")
    def __init__(
        self,
        spec: DataSpec,
        hidden: tuple[Count, ...] = (256, 256),
        activation: Literal["relu", "gelu", "tanh"] = "relu",
    ) -> None:
        super().__init__()
        self.features = math.prod(spec.x_shape)
        sizes = [self.features, *hidden]
        layers: list[nn.Module] = []
        for n_in, n_out in itertools.pairwise(sizes):
            layers += [nn.Linear(n_in, n_out), _ACTIVATIONS[activation]()]
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(sizes[-1], spec.outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, *x_shape] → [B, outputs]."""
        out: torch.Tensor = self.head(self.body(x.reshape(x.shape[0], self.features)))
        return out


class _Images(nn.Module):
    """A model of images, [C, H, W] or [H, W]; sets ``channels``, ``height``, ``width``."""

    def __init__(self, name: str, spec: DataSpec) -> None:
        super().__init__()
        if len(spec.x_shape) not in (2, 3):
            raise ConfigError(
                f"model '{name}' takes images, [C, H, W] or [H, W], but a sample of this stream "
                f"has shape {list(spec.x_shape)}; 'mlp' takes any"
            )
        self.channels, self.height, self.width = (1, *spec.x_shape)[-3:]

    def images(self, x: torch.Tensor) -> torch.Tensor:
        """[B, *x_shape] → [B, C, H, W]."""
        return x.reshape(x.shape[0], self.channels, self.height, self.width)


def _norm(channels: int, norm: Norm = "group") -> nn.Module:
    """BatchNorm, or GroupNorm of at most 8 groups of at least 4 channels."""
    if norm == "batch":
        return nn.BatchNorm2d(channels)
    return nn.GroupNorm(math.gcd(8, channels // 4) if channels % 4 == 0 else 1, channels)


def _conv(n_in: int, n_out: int, stride: int = 1, kernel: int = 3) -> nn.Conv2d:
    """A convolution before a norm: no bias, padded to keep the size."""
    return nn.Conv2d(n_in, n_out, kernel, stride, padding=kernel // 2, bias=False)


class CNN(_Images):
    """Three 3×3 convolutions with GroupNorm, the latter two with stride 2, for images.

    Their maps are averaged to at most 2×2, so that any image size works.
    """

    @checked("model")
    def __init__(
        self,
        spec: DataSpec,
        channels: Annotated[tuple[Count, ...], Field(min_length=3, max_length=3)] = (32, 64, 128),
    ) -> None:
        super().__init__("cnn", spec)
        layers: list[nn.Module] = []
        n_in = self.channels
        for n_out, stride in zip(channels, (1, 2, 2), strict=True):
            layers += [_conv(n_in, n_out, stride), _norm(n_out), nn.ReLU()]
            n_in = n_out
        # A fixed window: on CUDA the gradient of adaptive pooling is not deterministic.
        size = [-(-side // 4) for side in (self.height, self.width)]
        window = [-(-side // 2) for side in size]
        cells = math.prod(-(-s // w) for s, w in zip(size, window, strict=True))
        layers += [nn.AvgPool2d((window[0], window[1]), ceil_mode=True), nn.Flatten()]
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(n_in * cells, spec.outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, *x_shape] → [B, outputs]."""
        out: torch.Tensor = self.head(self.body(self.images(x)))
        return out


class BasicBlock(nn.Module):
    """Two 3×3 convolutions and a shortcut."""

    def __init__(self, n_in: int, n_out: int, stride: int, norm: Norm) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            _conv(n_in, n_out, stride),
            _norm(n_out, norm),
            nn.ReLU(),
            _conv(n_out, n_out),
            _norm(n_out, norm),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or n_in != n_out:
            self.shortcut = nn.Sequential(_conv(n_in, n_out, stride, 1), _norm(n_out, norm))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, n_in, H, W] → [B, n_out, H/stride, W/stride]."""
        return torch.relu(self.residual(x) + self.shortcut(x))


class ResNet18(_Images):
    """ResNet-18 (He et al., CVPR 2016) with a stem for small images: 3×3, no pooling.

    width: channels of the first stage; norm: "group", or "batch" as published, which makes results
    depend on how a batch is split among ranks.
    """

    @checked("model")
    def __init__(self, spec: DataSpec, width: Count = 64, norm: Norm = "group") -> None:
        super().__init__("resnet18", spec)
        self.stem = nn.Sequential(_conv(self.channels, width), _norm(width, norm), nn.ReLU())
        stages: list[nn.Module] = []
        n_in = width
        for n_out, stride in ((width, 1), (2 * width, 2), (4 * width, 2), (8 * width, 2)):
            stages += [BasicBlock(n_in, n_out, stride, norm), BasicBlock(n_out, n_out, 1, norm)]
            n_in = n_out
        self.body = nn.Sequential(*stages)
        self.head = nn.Linear(n_in, spec.outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, *x_shape] → [B, outputs]."""
        out: torch.Tensor = self.head(self.body(self.stem(self.images(x))).mean((-2, -1)))
        return out


class Block(nn.Module):
    """A transformer block: attention and a perceptron, each behind a LayerNorm."""

    def __init__(self, dim: int, heads: int, causal: bool = False) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norm1 = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, T, dim] → [B, T, dim]."""
        b, t, dim = x.shape
        qkv = self.qkv(self.norm1(x)).reshape(b, t, 3, self.heads, dim // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        # Written out: the fused kernel knows neither forward-mode nor second derivatives.
        scores = q @ k.transpose(-2, -1) / math.sqrt(dim // self.heads)
        if self.causal:
            later = torch.ones(t, t, dtype=torch.bool, device=x.device).triu(1)
            scores = scores.masked_fill(later, -torch.inf)
        weights = scores.softmax(-1)
        x = x + self.proj((weights @ v).transpose(1, 2).reshape(b, t, dim))
        out: torch.Tensor = x + self.mlp(self.norm2(x))
        return out


class ViT(_Images):
    """Vision transformer (Dosovitskiy et al., ICLR 2021) in the size DeiT calls tiny.

    patch: side of a patch in pixels, must divide the image; dim: width, must be a multiple of
    ``heads``; depth: blocks. The mean over patches is classified; there is no class token.
    """

    @checked("model")
    def __init__(
        self,
        spec: DataSpec,
        patch: Count = 4,
        dim: Count = 192,
        depth: Count = 12,
        heads: Count = 3,
    ) -> None:
        super().__init__("vit_tiny", spec)
        if self.height % patch or self.width % patch:
            raise ConfigError(
                f"model.options.patch: must divide the image, {self.height}×{self.width} pixels, "
                f"but is {patch}"
            )
        _require_multiple(dim, heads)
        patches = (self.height // patch) * (self.width // patch)
        self.embed = nn.Conv2d(self.channels, dim, patch, stride=patch)
        self.position = nn.Parameter(torch.empty(1, patches, dim))
        nn.init.trunc_normal_(self.position, std=0.02)
        self.body = nn.Sequential(*(Block(dim, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, spec.outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, *x_shape] → [B, outputs]."""
        tokens = self.embed(self.images(x)).flatten(2).transpose(1, 2) + self.position
        out: torch.Tensor = self.head(self.norm(self.body(tokens)).mean(1))
        return out


class Decoder(nn.Module):
    """Causal transformer over token ids, [B, T] → scores of the token after each, [B, T, V].

    As Radford et al., "Language models are unsupervised multitask learners", 2019, have it. dim:
    width, must be a multiple of ``heads``; depth: blocks; length: the longest sample, in tokens.
    Inputs are token ids [B, T], or a dict that has them as ``input_ids``; V is the number of tokens
    that the stream has. Padding comes last, so nothing before it sees it.
    """

    @checked("model")
    def __init__(
        self,
        spec: DataSpec,
        dim: Count = 64,
        depth: Count = 2,
        heads: Count = 4,
        length: Count = 128,
    ) -> None:
        super().__init__()
        _require_multiple(dim, heads)
        if not (spec.classes and len(spec.y_shape) == 1):
            raise ConfigError("model 'decoder' needs a stream of token ids, as source 'text' is")
        if spec.longest > length:
            raise ConfigError(
                f"model.options.length = {length}, but the longest sample has {spec.longest} "
                "tokens; cut them with stream.options.length"
            )
        self.tokens = nn.Embedding(spec.classes, dim)
        self.position = nn.Parameter(torch.empty(length, dim))
        nn.init.normal_(self.tokens.weight, std=0.02)
        nn.init.normal_(self.position, std=0.02)
        self.body = nn.Sequential(*(Block(dim, heads, causal=True) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, spec.classes, bias=False)

    def forward(self, x: torch.Tensor | Mapping[str, torch.Tensor]) -> torch.Tensor:
        """[B, T] → [B, T, V]."""
        ids = x["input_ids"] if isinstance(x, Mapping) else x
        if ids.shape[1] > len(self.position):
            raise ConfigError(
                f"model.options.length = {len(self.position)}, but a sample has {ids.shape[1]} "
                "tokens"
            )
        hidden = self.tokens(ids) + self.position[: ids.shape[1]]
        out: torch.Tensor = self.head(self.norm(self.body(hidden)))
        return out


def _require_multiple(dim: int, heads: int) -> None:
    if dim % heads:
        raise ConfigError(f"model.options.dim: must be a multiple of heads ({heads}), but is {dim}")
