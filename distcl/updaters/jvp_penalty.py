"""A penalty on the slope of the loss between current and past samples."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from distcl.errors import ConfigError, DataError
from distcl.types import Batch
from distcl.updaters.base import StepResult, Updater
from distcl.updaters.jvp_reg import floating, normalized, with_floating


class JVPPenalty(Updater):
    """``jvp_penalty``: the loss, plus a penalty on its slope from current towards past samples.

    Objective over the current batch, with λ = ``jvp_lambda`` and r = ``jvp_deltax_norm``:

        mean_i ℓ_i + λ · mean_i (∇_x ℓ_i · δ_i)²,   δ_i = r (h_i - x_i)/‖h_i - x_i‖₂

    h_i is a sample of the history batch: the one at position p modulo its size, for the sample at
    position p of the current batch. ∇_x ℓ_i · δ_i is the JVP of ℓ_i along δ_i, the linear part of
    ℓ_i(x_i + δ_i) - ℓ_i(x_i): weights that make it small are as good a little on the way to the
    past as they are here. δ_i spans all floating-point inputs of a sample. Without history: the
    loss alone. The history is not trained on by itself (``mix_historic_data`` does that).

    The JVP comes from the input's gradient, which is then differentiated again. Forward mode would
    be cheaper, but in torch 2.13 the backward of its result is wrong for LayerNorm, without a word.
    """

    uses_hist_batch = True
    unsupported = dict.fromkeys(
        ("zero1", "zero2", "zero3", "fsdp2"),
        "it differentiates the model twice, which sharding libraries do not allow",
    )

    def fwd_bwd(self, batch: Batch, hist_batch: Batch | None) -> StepResult:
        """See the class. The losses returned are without the penalty. Collective.

        Raises ConfigError if x has no floating-point tensor, or if the model or the loss cannot be
        differentiated twice.
        """
        if hist_batch is None or not self.config.jvp_lambda:
            return super().fwd_bwd(batch, None)
        return self.accumulated(self._part, batch, self._partners(batch, hist_batch))

    def _part(self, batch: Batch, hist_batch: Batch | None) -> StepResult:
        assert hist_batch is not None
        here = [x.detach().requires_grad_() for x in floating(batch.x, "jvp_lambda")]
        past = floating(hist_batch.x, "jvp_lambda")
        between = [h - x.detach() for h, x in zip(past, here, strict=True)]
        steps = [self.config.jvp_deltax_norm * direction for direction in normalized(between)]
        with sdpa_kernel(SDPBackend.MATH):  # fused attention has no second derivative
            losses = self.losses(replace(batch, x=with_floating(batch.x, here)))
        try:
            grads = torch.autograd.grad(
                losses.sum(), here, create_graph=True, materialize_grads=True
            )
            products = [(g * d).unsqueeze(-1).flatten(1) for g, d in zip(grads, steps, strict=True)]
            slopes = torch.cat(products, dim=1).sum(dim=1)
            self.backward(losses + self.config.jvp_lambda * slopes.square(), batch)
            self.trained += batch.total if self.first_part else 0  # differentiated twice
        except RuntimeError as error:
            if "derivative for" not in str(error) and "differentiate twice" not in str(error):
                raise
            raise ConfigError(
                "continual_learning.update_mode = 'jvp_penalty' differentiates the model and the "
                f"loss twice, which one of them does not allow: {error}"
            ) from error
        return StepResult(losses.detach(), batch.ids, batch.total)

    def _partners(self, batch: Batch, hist_batch: Batch) -> Batch:
        """Return the history samples that my current ones are paired with, in order. Collective.

        Batches of equal size are cut into equal parts, so that partners lie on the same rank;
        otherwise the history batch is gathered. Parts are cut as DistributedWeightedSampler does.
        """
        past = floating(hist_batch.x, "jvp_lambda")
        for x, h in zip(floating(batch.x, "jvp_lambda"), past, strict=True):
            if x.shape[1:] != h.shape[1:]:
                raise DataError(
                    "jvp_penalty needs samples of equal shape; current ones have "
                    f"{list(x.shape[1:])}, those of the history {list(h.shape[1:])}"
                )
        if hist_batch.total == batch.total:
            return hist_batch
        world = self.runtime.world_size
        starts = [_start(hist_batch.total, rank, world) for rank in range(world + 1)]
        each = starts[1]
        rows = [r * each + k for r in range(world) for k in range(starts[r + 1] - starts[r])]
        first = _start(batch.total, self.runtime.rank, world)
        mine = [rows[p % len(rows)] for p in range(first, first + len(batch))]
        gathered = [self.runtime.all_gather(h, world * each, each)[mine] for h in past]
        return Batch(batch.ids, gathered, batch.y, batch.total)


def _start(total: int, rank: int, world: int) -> int:
    """Return where a rank's part of a global batch begins: sizes within one, larger ones first."""
    size, extra = divmod(total, world)
    return rank * size + min(rank, extra)
