"""Linear and Conv2d layers as Kronecker-factored blocks: which there are, and their statistics.

The weights of a layer are seen as one matrix W, [m, n]: m outputs, n inputs, the bias (if it has
one) as the last column, for an input that is always 1. Its Fisher information is taken to be A ⊗ G:

    A = 1/N · sum over samples and positions of a aᵀ   [n, n]   a: the layer's input, 1 appended
    G = 1/R · sum over samples and positions of g gᵀ   [m, m]   g: dL_i/d(output) of a sample

for N samples with R positions together (Martens & Grosse, ICML 2015; for convolutions, whose input
at a position is a patch, KFC: Grosse & Martens, ICML 2016). A Linear on [B, T, n] has T
positions a sample, and a layer that is used k times in a forward k times as many: the *expand*
approximation of Eschenhagen et al., NeurIPS 2023. With one position a sample and N = 1, A ⊗ G is
exactly the Fisher information of that sample.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import nn

from distcl.errors import ConfigError, UsageError
from distcl.types import Batch

PATCH_ELEMENTS = 1 << 22
"""Most elements of unfolded convolution inputs held at a time."""

_REFUSED = {
    nn.modules.conv._ConvNd: "it is a convolution of another kind than Conv2d",
    nn.RNNBase: "it is recurrent",
    nn.RNNCellBase: "it is recurrent",
    nn.MultiheadAttention: "it does not call its Linear layers as modules",
    nn.Bilinear: "it is bilinear",
}


@dataclass(frozen=True, slots=True)
class Layer:
    """A layer's block. ``weight`` and ``bias`` are names of parameters, None if frozen or absent.

    A frozen parameter is no part of W: W is then only the bias, [m, 1], or has no bias column.
    """

    name: str
    module: nn.Linear | nn.Conv2d
    weight: str | None
    bias: str | None

    @property
    def outputs(self) -> int:
        """Return m, the rows of W."""
        m = self.module
        return m.out_channels if isinstance(m, nn.Conv2d) else m.out_features

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Return the shape of the module's weight."""
        m = self.module
        if isinstance(m, nn.Conv2d):
            return (m.out_channels, m.in_channels, *m.kernel_size)
        return (m.out_features, m.in_features)

    @property
    def inputs(self) -> int:
        """Return n, the columns of W."""
        weights = torch.Size(self.weight_shape[1:]).numel() if self.weight else 0
        return weights + (self.bias is not None)

    @property
    def elements(self) -> int:
        """Return n² + m², the size of A and G together."""
        return self.inputs**2 + self.outputs**2

    @property
    def parameters(self) -> list[str]:
        """Return the names of the parameters that W is made of."""
        return [name for name in (self.weight, self.bias) if name is not None]

    def matrix(self, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return W [m, n] from full parameters by name."""
        return torch.cat([tensors[n].reshape(self.outputs, -1) for n in self.parameters], dim=1)

    def tensors(self, matrix: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return what :meth:`matrix` put together, in the parameters' own shapes."""
        found: dict[str, torch.Tensor] = {}
        if self.bias is not None:
            found[self.bias] = matrix[:, -1]
            matrix = matrix[:, :-1]
        if self.weight is not None:
            found[self.weight] = matrix.reshape(self.weight_shape)
        return found

    def add_moments_(self, sums: FactorSums, a: torch.Tensor, g: torch.Tensor) -> None:
        """Add the statistics of one call, from its input ``a`` and the output's gradient ``g``.

        Linear: a [..., inputs], g [..., m]. Conv2d: a [B, C, H, W], g [B, m, H', W'].
        """
        dtype = sums.a.dtype
        for a_rows, g_rows in self._rows(a.to(dtype), g.to(dtype)):
            columns = a_rows if self.weight else a_rows[:, :0]
            if self.bias:
                columns = nn.functional.pad(columns, (0, 1), value=1.0)
            sums.a.addmm_(columns.T, columns)
            sums.g.addmm_(g_rows.T, g_rows)
            sums.rows.add_(len(g_rows))

    def _rows(
        self, a: torch.Tensor, g: torch.Tensor
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield inputs [R, inputs] and output gradients [R, m], a row for each position."""
        m = self.module
        if isinstance(m, nn.Linear):
            yield a.reshape(-1, m.in_features), g.reshape(-1, m.out_features)
            return
        a, g = a.reshape(-1, *a.shape[-3:]), g.reshape(-1, *g.shape[-3:])
        mode = "constant" if m.padding_mode == "zeros" else m.padding_mode
        per_sample = torch.Size(self.weight_shape[1:]).numel() * g[0, 0].numel()
        size = max(1, PATCH_ELEMENTS // per_sample)
        for x, y in zip(torch.split(a, size), torch.split(g, size), strict=True):
            padded = nn.functional.pad(x, m._reversed_padding_repeated_twice, mode)
            patches = nn.functional.unfold(padded, m.kernel_size, m.dilation, 0, m.stride)
            yield (
                patches.transpose(1, 2).reshape(-1, patches.shape[1]),
                y.flatten(2).transpose(1, 2).reshape(-1, m.out_channels),
            )


class FactorSums(NamedTuple):
    """Running sums of a layer: of a aᵀ [n, n], of g gᵀ [m, m], and of positions [1]."""

    a: torch.Tensor
    g: torch.Tensor
    rows: torch.Tensor

    @classmethod
    def view(cls, layer: Layer, flat: torch.Tensor) -> FactorSums:
        """Return views of a flat tensor of ``layer.elements + 1`` elements."""
        n, m = layer.inputs, layer.outputs
        a, g, rows = torch.split(flat, [n * n, m * m, 1])
        return cls(a.view(n, n), g.view(m, m), rows)


class PassRecorder:
    """What layers see in a training pass: inputs and output gradients, in pairs.

    Held until the end of its backward: inputs, most of which autograd keeps anyway, and gradients,
    each as large as its output. In return A and G of one layer at a time exist outside their owner.
    """

    def __init__(self, layers: Iterable[Layer]) -> None:
        self._layers = list(layers)
        self._seen: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        self._scale = torch.ones(())  # d(what is differentiated)/d(loss of each sample), [B]

    @contextmanager
    def watching(self, samples: int) -> Iterator[None]:
        """Watch a forward of so many samples; no other pass is counted."""
        handles = [
            layer.module.register_forward_hook(partial(self._see, layer, samples), with_kwargs=True)
            for layer in self._layers
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def watch_scale(self, losses: torch.Tensor) -> None:
        """Learn d(what is differentiated)/d(loss of a sample), W / B_global · its loss weight."""

        def see(g: torch.Tensor) -> None:
            self._scale = g.detach()

        losses.register_hook(see)  # type: ignore[no-untyped-call]

    def sums(
        self, layer: Layer, batch: Batch, dtype: torch.dtype, device: torch.device
    ) -> torch.Tensor:
        """Return a layer's :class:`FactorSums`, flat, of a pass that is through; it is forgotten.

        Gradients are those of samples' own losses.
        """
        flat = torch.zeros(layer.elements + 1, dtype=dtype, device=device)
        sums = FactorSums.view(layer, flat)
        for a, g in self._seen.pop(layer.name, ()):
            weighted = batch.weights is not None
            layer.add_moments_(sums, a, self._unscaled(layer, g.to(dtype)) if weighted else g)
        if batch.weights is None and len(batch):
            sums.g.div_(self._scale[0] ** 2)
        return flat

    def _see(
        self,
        layer: Layer,
        samples: int,
        module: nn.Module,
        args: tuple[torch.Tensor, ...],
        kwargs: dict[str, torch.Tensor],
        output: torch.Tensor,
    ) -> torch.Tensor:
        """Keep the input until the output's gradient comes: only their pair is counted."""
        rows = output.numel() // layer.outputs
        if rows % samples:
            raise ConfigError(
                f"kfac_online: layer '{layer.name}' has {rows} rows of input for {samples} "
                "samples; each row must belong to one sample"
            )
        a = (args[0] if args else kwargs["input"]).detach()
        version = a._version

        def see_gradient(g: torch.Tensor) -> None:
            if a._version != version:
                raise UsageError(
                    f"kfac_online: the model changes the input of layer '{layer.name}' in place"
                )
            self._seen.setdefault(layer.name, []).append((a, g))

        if output.requires_grad:
            output.register_hook(see_gradient)  # type: ignore[no-untyped-call]
        return output.clone()  # a view that is changed in place, by a ReLU say, loses its hooks

    def _unscaled(self, layer: Layer, g: torch.Tensor) -> torch.Tensor:
        """Return the gradients of samples' own losses, from those of what was differentiated.

        A sample lies along the first dimension that has as many entries as there are samples; or
        where none has, as equally many neighbours in the first one. Local.
        """
        scale = self._scale.to(g.dtype)
        inverse = torch.where(scale == 0, 0.0, 1 / scale)  # of no weight: no gradient
        shape = g.shape[:-1] if isinstance(layer.module, nn.Linear) else g.shape[:-3]
        if len(scale) in shape:
            k = shape.index(len(scale))
        elif shape and shape[0] % len(scale) == 0:
            k, inverse = 0, inverse.repeat_interleave(shape[0] // len(scale))
        elif len(scale) > 1:
            raise ConfigError(
                f"kfac_online: layer '{layer.name}' has outputs of shape {list(g.shape)} for "
                f"{len(scale)} samples; priority.correction needs to know whose each row is"
            )
        else:
            return g * inverse
        return g * inverse.view(-1, *[1] * (g.ndim - 1 - k))


class Curvature(NamedTuple):
    """A = U_a diag(l_a) U_aᵀ and G = U_g diag(l_g) U_gᵀ, without the eigenvalues that are zero.

    u_a [n, p], l_a [p], u_g [m, q], l_g [q]: p and q are the ranks of A and G.
    """

    u_a: torch.Tensor
    l_a: torch.Tensor
    u_g: torch.Tensor
    l_g: torch.Tensor

    @classmethod
    def of(cls, a: torch.Tensor, g: torch.Tensor) -> Curvature:
        """Decompose, in float64; what is within rounding of zero in the factors' dtype is zero."""
        parts: list[torch.Tensor] = []
        for factor in (a, g):
            values, vectors = torch.linalg.eigh(factor.double())
            keep = values > values[-1] * torch.finfo(factor.dtype).eps
            parts += [vectors[:, keep].to(factor.dtype), values[keep].to(factor.dtype)]
        return cls(*parts)

    @property
    def a(self) -> torch.Tensor:
        """Return A [n, n]."""
        return (self.u_a * self.l_a) @ self.u_a.T

    @property
    def g(self) -> torch.Tensor:
        """Return G [m, m]."""
        return (self.u_g * self.l_g) @ self.u_g.T

    def gradient(self, delta: torch.Tensor, strength: float, lr: float = 0.0) -> torch.Tensor:
        """Return the penalty's gradient at W* + delta, [m, n].

        With lr = 0 that of λ/2 · vec(Δ)ᵀ (A ⊗ G) vec(Δ), which is λ G Δ A. Else λF (I + lr·λF)⁻¹ Δ
        for F = A ⊗ G: where Δ's part along the eigenvectors i of G and j of A has the coefficient
        c = λ l_g[i] l_a[j], it becomes c / (1 + lr·c).
        """
        c = strength * torch.outer(self.l_g, self.l_a)
        c = c / (1 + lr * c)
        return self.u_g @ (c * (self.u_g.T @ delta @ self.u_a)) @ self.u_a.T


def find_layers(model: nn.Module, updater: str) -> tuple[list[Layer], list[str]]:
    """Return the layers with trainable weights, and the names of all other trainable parameters.

    Raises ConfigError naming a trainable layer that looks like one of these and is not: grouped,
    of another kind, with weights that are shared with another module or computed from others.
    """
    users: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            users.setdefault(id(parameter), []).append(name)
    layers: list[Layer] = []
    for name, module in model.named_modules():
        trainable = {n: p for n, p in module.named_parameters() if p.requires_grad}
        if not trainable:
            continue
        reason = _refusal(module)
        if reason is None and isinstance(module, nn.Linear | nn.Conv2d):
            others = {u for p in trainable.values() for u in users[id(p)]} - {name}
            if others:
                reason = f"it shares weights with '{min(others)}'"
        if reason is not None:
            raise ConfigError(
                f"continual_learning.update_mode = '{updater}' cannot work with layer '{name}' "
                f"({type(module).__name__}) of the model: {reason}"
            )
        if isinstance(module, nn.Linear | nn.Conv2d):
            full = {n: f"{name}.{n}" if name else n for n in trainable}
            layers.append(Layer(name, module, full.get("weight"), full.get("bias")))
    if not layers:
        raise ConfigError(
            f"continual_learning.update_mode = '{updater}' needs a model with a trainable "
            "nn.Linear or nn.Conv2d; this one has none"
        )
    held = {n for layer in layers for n in layer.parameters}
    rest = [n for n, p in model.named_parameters() if p.requires_grad and n not in held]
    return layers, rest


def _refusal(module: nn.Module) -> str | None:
    """Return why a module with trainable parameters cannot be handled, or None."""
    if isinstance(module, nn.Linear | nn.Conv2d):
        kind = nn.Linear if isinstance(module, nn.Linear) else nn.Conv2d
        own = {n for n, _ in module.named_parameters(recurse=False)}
        if isinstance(module, nn.Conv2d) and module.groups > 1:
            return f"it is a grouped convolution, with {module.groups} groups"
        if type(module).forward is not kind.forward:
            return f"it has a forward of its own, not {kind.__name__}'s"
        if "weight" not in own or own - {"weight", "bias"} or list(module.children()):
            return "its weights are computed from other parameters"
        return None
    return next((why for kind, why in _REFUSED.items() if isinstance(module, kind)), None)


def deal_layers(layers: Iterable[Layer], world: int) -> dict[str, int]:
    """Return layer name -> rank: the largest first, each to the rank that holds least. Local.

    No rank holds more than 1/world of all elements of A and G plus one layer.
    """
    held = [0] * world
    owners: dict[str, int] = {}
    for layer in sorted(layers, key=lambda layer: -layer.elements):
        owners[layer.name] = held.index(min(held))
        held[owners[layer.name]] += layer.elements
    return owners
