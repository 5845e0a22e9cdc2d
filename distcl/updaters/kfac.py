"""Online Laplace approximation with Kronecker factors (Ritter et al., NeurIPS 2018), by layers.

Penalty  λ/2 · vec(ΔW)ᵀ (A ⊗ G) vec(ΔW)  for ΔW = W - W*, with the gradient  λ G ΔW A, for every
Linear and Conv2d; ``kronecker.py`` says what A and G are. W* are the weights at the start of the
round, equal to theta_star while the round trains. Other parameters (norms, embeddings, scales) are
left without a penalty. Layers are dealt out over ranks: their owner alone keeps A, G and W*.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from typing import Any

import torch

from distcl.errors import ConfigError, DivergenceError
from distcl.types import Batch, Ids, Source
from distcl.updaters.base import Updater
from distcl.updaters.kronecker import (
    Curvature,
    FactorSums,
    Layer,
    PassRecorder,
    deal_layers,
    find_layers,
)
from distcl.updaters.quadratic_penalty import learning_rates
from distcl.updaters.step import UpdaterSetup

log = logging.getLogger("distcl")


class KFACOnline(Updater):
    """``kfac_online``: A <- d·A + (1-d)·A_new at every commit, G alike, d = ``kfac_ema_decay``.

    The first commit takes them whole. A_new and G_new come from all training passes of the round's
    steps 0, k, 2k, … for k = ``kfac_every``, over all ranks; hooks exist during those passes only,
    so no other pass is counted. Gradients are those of the labelled loss (the *empirical* Fisher)
    of each sample. Samples are those that were drawn: with importance weighting, by priority.

    Raises ConfigError naming a layer that cannot be handled, and on ``fp16``, in which gradients of
    single steps overflow by design.
    """

    dealt = ("sums", "curvature", "committed")

    def __init__(self, setup: UpdaterSetup) -> None:
        super().__init__(setup)
        if self.runtime.precision == "fp16":
            raise ConfigError(
                "continual_learning.update_mode = 'kfac_online' does not work with "
                "run.precision = 'fp16'; use 'bf16' or 'fp32'"
            )
        self.layers, rest = find_layers(self.runtime.strategy.unwrap(self.model), "kfac_online")
        for layer in self.layers:  # refused here, on every rank
            self._rate(layer)
        self.owners = deal_layers(self.layers, self.runtime.world_size)
        if rest and self.runtime.is_main:
            log.info(f"[kfac_online] without a penalty: {', '.join(rest)}")
        self.sums: dict[str, torch.Tensor] = {}
        """This round's, of my layers: name -> flat :class:`FactorSums`."""
        self.curvature: dict[str, Curvature] = {}
        self.committed: dict[str, torch.Tensor] = {}
        """W* [m, n] of my layers."""
        self.commits = 0
        self.steps = 0
        self.samples = 0
        self._recording = False
        self.recorder = PassRecorder(self.layers)

    def _is_mine(self, layer: Layer) -> bool:
        return self.owners[layer.name] == int(self.runtime.rank)

    # -- statistics ----------------------------------------------------------------------------

    def update_pre_fwd_bwd(self) -> None:
        """Decide whether this step's passes are counted."""
        self._recording = self.steps % self.config.kfac_every == 0
        self.steps += 1

    def losses(self, batch: Batch) -> torch.Tensor:
        """Return the losses [B] of a training forward, hooked if this step is counted.

        The row of zeros that stands for an empty part is not counted.
        """
        if not (self._recording and len(batch)):
            return super().losses(batch)
        with self.recorder.watching(len(batch)):
            losses = super().losses(batch)
        self.recorder.watch_scale(losses)
        return losses

    def backward(self, losses: torch.Tensor, batch: Batch) -> None:
        """Backward as always; then, layer by layer, the statistics go to their owners."""
        super().backward(losses, batch)
        if not self._recording:
            return
        if self.first_part:
            self.samples += batch.total
        for layer in self.layers:
            flat = self.recorder.sums(layer, batch, self.runtime.dtype, self.runtime.device)
            self.runtime.reduce(flat, self.owners[layer.name])
            if self._is_mine(layer):
                held = self.sums.get(layer.name)
                self.sums[layer.name] = flat if held is None else held + flat

    # -- penalty -------------------------------------------------------------------------------

    def cl_preprocessing(self) -> None:
        """Begin a round: theta_star <- w_now; owners keep W* of their layers. Collective."""
        super().cl_preprocessing()
        if self.commits:
            for layer, w in self._matrices():
                if w is not None:
                    self.committed[layer.name] = w

    def _matrices(self) -> Iterator[tuple[Layer, torch.Tensor | None]]:
        """Yield every layer, with its W as it is now if it is mine. Collective."""
        for layer in self.layers:
            full = {name: self.partition.gather(name) for name in layer.parameters}
            yield layer, layer.matrix(full) if self._is_mine(layer) else None

    def update_post_fwd_bwd(self) -> None:
        """Add the penalty's gradient, each layer's from its owner.

        explicit: λ G ΔW A, as published; diverges where lr·λ times the largest eigenvalue of A ⊗ G
        exceeds 2. damped: λF (I + lr·λF)⁻¹ ΔW, for SGD the proximal (implicit) step of the same
        penalty, exact and stable at any λ.
        """
        if not self.commits:
            return
        strength = self.config.kfac_lambda
        owners: dict[str, int] = {}
        grads: dict[str, torch.Tensor] = {}
        for layer, w in self._matrices():
            owners |= dict.fromkeys(layer.parameters, self.owners[layer.name])
            if w is not None:
                lr = self._rate(layer)
                delta = w - self.committed[layer.name]
                held = self.curvature.get(layer.name)
                zero = torch.zeros_like(delta)
                gradient = zero if held is None else held.gradient(delta, strength, lr)
                grads |= layer.tensors(gradient)
        self.partition.add_full_grads_(grads, owners)

    def _rate(self, layer: Layer) -> float:
        """Return the rate that damps a layer's penalty; ConfigError if it has several. Local."""
        if self.config.penalty_step != "damped":
            return 0.0
        rates = learning_rates(self.setup.optimizer, layer.parameters)
        if len(set(rates)) > 1:
            raise ConfigError(
                f"optimizer.groups: layer '{layer.name}' has parameters of several learning rates, "
                "which update_mode = 'kfac_online' cannot damp; give them one, or set "
                "continual_learning.penalty_step = 'explicit'"
            )
        return rates[0]

    # -- commit and state ----------------------------------------------------------------------

    def cl_postprocessing(self, source: Source, ids: Ids) -> None:
        """Fold the round's factors in. A layer that no counted pass used keeps its own. Collective.

        Raises DivergenceError, on every rank, naming a layer whose factors are not finite.
        """
        if not self.samples:
            return
        used = torch.zeros(len(self.layers), device=self.runtime.device)
        for i, layer in enumerate(self.layers):
            if layer.name not in self.sums:
                continue
            a, g, rows = FactorSums.view(layer, self.sums.pop(layer.name))
            used[i] = rows.item()
            if rows > 0:
                folded = self._folded(layer.name, a / self.samples, g / rows)
                if folded is None:
                    used[i] = torch.nan
                else:
                    self.curvature[layer.name] = folded
        self.runtime.all_reduce(used)
        for layer, n in zip(self.layers, used.tolist(), strict=True):
            if math.isnan(n):
                raise DivergenceError(
                    f"kfac_online: the factors of layer '{layer.name}' are not finite"
                )
        idle = [layer.name for layer, n in zip(self.layers, used.tolist(), strict=True) if n == 0]
        if idle and self.runtime.is_main:
            log.info(f"[kfac_online] in no counted pass of the round: {', '.join(idle)}")
        self.commits += 1
        self.taken_back()

    def taken_back(self) -> None:
        """Begin the round's sums anew. Local."""
        self.sums.clear()
        self.steps = self.samples = 0

    def _folded(self, name: str, a: torch.Tensor, g: torch.Tensor) -> Curvature | None:
        """Return the factors with the round's folded in; None if they are not finite."""
        old = self.curvature.get(name)
        if old is not None:
            decay = self.config.kfac_ema_decay
            a = decay * old.a + (1 - decay) * a
            g = decay * old.g + (1 - decay) * g
        if not (a.isfinite().all() and g.isfinite().all()):
            return None
        return Curvature.of(a, g)

    def state_dict(self) -> dict[str, Any]:
        """Return what this rank holds of its layers, by layer, and the counters."""
        return {
            "sums": dict(self.sums),
            "curvature": {name: held._asdict() for name, held in self.curvature.items()},
            "committed": dict(self.committed),
            "commits": self.commits,
            "steps": self.steps,
            "samples": self.samples,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned; layers of other ranks are passed over."""
        mine = {layer.name for layer in self.layers if self._is_mine(layer)}
        self.sums = {n: v for n, v in state["sums"].items() if n in mine}
        self.curvature = {n: Curvature(**v) for n, v in state["curvature"].items() if n in mine}
        self.committed = {n: v for n, v in state["committed"].items() if n in mine}
        self.commits, self.steps = state["commits"], state["steps"]
        self.samples = state["samples"]
