"""The replicated partition and the anchor, against the dense weights that they cut up."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from distcl.parallel.anchor import Anchor
from distcl.config import RunConfig
from distcl.errors import UsageError
from distcl.models.freezing import freeze
from distcl.parallel import ddp
from distcl.parallel.partition import create_partition
from distcl.parallel.flat_shards import flattened
from distcl.distributed.runtime import Runtime
from tests.models import awkward, frozen_names
from tests.spawn import run_ranks


def _tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return dict(model.named_parameters()) | dict(model.named_buffers())


def _ownership() -> dict[str, Any]:
    runtime = Runtime()
    model = awkward()
    partition = create_partition(runtime, runtime.prepare(model))
    return {name: view.clone().float().numpy() for name, view in partition.owned().items()}


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_all_that_can_change_is_owned_once_and_no_rank_owns_more_than_its_share(world: int) -> None:
    parts = run_ranks(world, _ownership)
    frozen = frozen_names(awkward())
    assert frozen and not any(frozen & part.keys() for part in parts)
    dense = {n: t for n, t in _tensors(awkward()).items() if n not in frozen}
    for name, tensor in dense.items():
        joined = np.concatenate([part[name] for part in parts if name in part])
        np.testing.assert_array_equal(joined, tensor.detach().float().reshape(-1).numpy())
    cuts: dict[tuple[torch.dtype, bool], int] = {}
    for tensor in dense.values():
        key = (tensor.dtype, isinstance(tensor, torch.nn.Parameter))
        cuts[key] = cuts.get(key, 0) + tensor.numel()
    share = sum(-(-n // world) for n in cuts.values())
    assert max(sum(v.size for v in part.values()) for part in parts) <= share


def _swap(bucket: int, fail_on: tuple[int, ...]) -> dict[str, Any]:
    ddp.BUCKET_ELEMENTS = bucket
    runtime = Runtime()
    model = runtime.prepare(awkward(seed=0))
    module = runtime.strategy.unwrap(model).eval()
    partition = create_partition(runtime, model)
    anchor = Anchor(partition)
    other = _tensors(awkward(seed=1))
    mine = partition.owned()
    dense = _tensors(module)
    for name in mine:  # theta_star := the other weights, cut as this rank owns them
        start = mine[name].storage_offset() - flattened(name, dense[name]).storage_offset()
        anchor.theta_star[name].copy_(flattened(name, other[name])[start : start + len(mine[name])])
    stored = {name: value.clone() for name, value in anchor.theta_star.items()}
    before = {name: value.detach().clone() for name, value in dense.items()}
    x = torch.randn(5, 7, generator=torch.Generator().manual_seed(3))
    result: dict[str, Any] = {}
    try:
        with anchor.swapped_in():
            with torch.inference_mode():
                result["inside"] = module(x).numpy()
            if runtime.rank in fail_on:
                raise ValueError("inside the swap")
    except ValueError:
        result["raised"] = True
    result["restored"] = all(torch.equal(before[n], v) for n, v in _tensors(module).items())
    result["anchor kept"] = all(torch.equal(stored[n], v) for n, v in anchor.theta_star.items())
    module.train()
    model(x).sum().backward()  # nothing became an inference tensor
    return result


@pytest.mark.parametrize(("world", "bucket"), [(1, 1 << 20), (2, 1 << 20), (2, 5), (3, 7)])
def test_a_swapped_model_computes_with_theta_star_and_is_restored_exactly(
    world: int, bucket: int
) -> None:
    x = torch.randn(5, 7, generator=torch.Generator().manual_seed(3))
    dense, first = awkward(seed=1).eval(), _tensors(awkward(seed=0))
    frozen = frozen_names(dense)
    dense.load_state_dict({n: first[n] for n in frozen}, strict=False)  # those are not swapped
    expected = dense(x).detach().numpy()
    for fail_on in ((), tuple(range(world))):
        for result in run_ranks(world, _swap, bucket, fail_on):
            np.testing.assert_array_equal(result["inside"], expected)
            assert result["restored"]
            assert result["anchor kept"]
            assert result.get("raised", False) == bool(fail_on)


def _add_grad() -> dict[str, Any]:
    runtime = Runtime(RunConfig(precision="fp64"))
    model = runtime.prepare(awkward())
    partition = create_partition(runtime, model)
    x = torch.randn(6, 7, generator=torch.Generator().manual_seed(3)).double()
    model(x).square().mean().backward()
    partition.add_grad_({name: 10 * w for name, w in partition.trainable().items()})
    named = runtime.strategy.unwrap(model).named_parameters()
    return {n: p.grad.numpy() for n, p in named if p.grad is not None}


@pytest.mark.parametrize("world", [1, 2, 3])
def test_added_gradients_reach_every_parameter_once(world: int) -> None:
    model = awkward().double()
    x = torch.randn(6, 7, generator=torch.Generator().manual_seed(3)).double()
    model(x).square().mean().backward()
    for grads in run_ranks(world, _add_grad):
        trained = {n for n, p in model.named_parameters() if p.requires_grad}
        assert set(grads) == trained
        for name, parameter in model.named_parameters():
            if name in trained:
                expected = (parameter.grad + 10 * parameter).detach().numpy()
                np.testing.assert_allclose(grads[name], expected, rtol=0, atol=1e-14)


def _buffers_and_sums() -> dict[str, Any]:
    runtime = Runtime()
    model = awkward()
    model.norm.running_mean.add_(runtime.rank)
    model.norm.num_batches_tracked.add_(runtime.rank)
    prepared = runtime.prepare(model)
    partition = create_partition(runtime, prepared)
    partition.sync_buffers()
    full = {n: torch.full_like(p, runtime.rank + 1.0) for n, p in model.named_parameters()}
    sums = partition.reduce_owned(full)
    return {
        "mean": model.norm.running_mean.numpy(),
        "count": int(model.norm.num_batches_tracked),
        "sums": {n: v.numpy() for n, v in sums.items()},
    }


def test_buffers_are_averaged_and_sums_are_cut_into_owned_slices() -> None:
    results = run_ranks(3, _buffers_and_sums)
    dense = awkward()
    frozen = frozen_names(dense)
    for result in results:
        np.testing.assert_allclose(result["mean"], dense.norm.running_mean + 1.0, atol=1e-6)
        assert result["count"] == 2
    for name, parameter in dense.named_parameters():
        if name in frozen:
            assert not any(name in r["sums"] for r in results)
            continue
        joined = np.concatenate([r["sums"][name] for r in results if name in r["sums"]])
        np.testing.assert_array_equal(joined, np.full(parameter.numel(), 6.0))


def _frozen_norm() -> list[bool]:
    runtime = Runtime()
    model = awkward()
    with torch.no_grad():  # of which (x + x + x) / 3 is not x
        model.norm.running_mean.copy_(1.5 + (4 * torch.arange(11) + 2) * 2.0**-23)
    freeze(model, ["norm.running_mean"])
    before = {n: b.clone() for n, b in model.named_buffers()}
    prepared = runtime.prepare(model).train()
    prepared(torch.randn(4, 7))
    create_partition(runtime, prepared).sync_buffers()
    return [torch.equal(before[n], b) for n, b in model.named_buffers()]


def test_buffers_of_frozen_norms_stay_as_they_are() -> None:
    assert run_ranks(3, _frozen_norm) == [[True] * 4] * 3


def test_channels_last_weights_are_cut_in_memory_order_and_views_are_refused() -> None:
    weight = torch.randn(4, 3, 5, 5).to(memory_format=torch.channels_last)
    view = flattened("w", weight)
    view.mul_(2)
    assert view.shape == (300,)
    assert torch.equal(view.sort().values, weight.reshape(-1).sort().values)
    with pytest.raises(UsageError, match="'w' is an expanded or sliced view"):
        flattened("w", torch.randn(4, 1).expand(4, 3))
