"""Every layout of the weights on real ranks: who owns what, and swapping that leaves no trace."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from distcl.config import RunConfig
from distcl.distributed.runtime import Runtime
from distcl.parallel.anchor import Anchor
from distcl.parallel.partition import Partition, create_partition
from distcl.priority.loss_cache import weights_checksum
from tests.layouts import (
    DEEPSPEED,
    LAYOUTS,
    WITHOUT,
    available,
    cut,
    each,
    fresh_runtime,
    gathered,
    layout_params,
    tensors,
)
from tests.models import frozen_names, tangled, tangled_anchor
from tests.spawn import run_ranks


class Midway(Exception):
    """Raised inside a forward."""


def _stop(*_: Any) -> None:
    raise Midway


def _session(
    layout: str, swaps: bool, precision: str, folder: Path, sabotage: bool = False
) -> dict[str, Any]:
    """Train with Adam; from the fourth step on, swap in every way that must leave no trace."""
    runtime = fresh_runtime(layout, precision, folder=folder)
    first, other = (tangled(seed, batchnorm=precision == "fp32") for seed in (0, 1))
    names = list(tensors(first))
    model, optimizer = runtime.prepare_training(
        first, lambda params: torch.optim.Adam(params, lr=0.05)
    )
    module, partition = runtime.strategy.unwrap(model), create_partition(runtime, model)
    result: dict[str, Any] = {
        "owned": {n: v.float().cpu().numpy().copy() for n, v in partition.owned().items()},
        "fingerprint": weights_checksum(partition.owned(), partition, runtime),
    }
    anchor = Anchor(partition)
    for name, value in cut(partition, runtime, tensors(other)).items():
        anchor.theta_star[name].copy_(value)
    stored = {n: v.clone() for n, v in anchor.theta_star.items()}
    if sabotage:
        partition._zero.empty_partition_cache = lambda: None  # type: ignore[attr-defined]
    g = torch.Generator().manual_seed(3)
    x = torch.randn(7, 6, 7, generator=g)  # a step, a sample, a feature
    inside, losses = [], []

    def train(step: int) -> None:
        module.train()
        mine = x[step].to(runtime.device) + runtime.rank
        loss = model(mine).square().mean()
        runtime.strategy.backward(loss)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(loss.detach()))

    for step in range(7):
        module.eval()
        if swaps and step >= 3:
            inside += _swap(
                0 if sabotage else step - 3, anchor, partition, module, x[0].to(runtime.device)
            )
        train(step)
    kept = all(torch.equal(stored[n], v) for n, v in anchor.theta_star.items())
    result |= {"inside": inside, "losses": [*losses], "weights": gathered(partition, names)}
    partition.sync_buffers()
    anchor = Anchor(partition, undo=True)
    moments = []
    for moment in ("start", "trained", "back"):
        if moment == "trained":
            anchor.refresh()
            train(5)
            train(6)
            mine = {n: w.clone() for n, w in partition.trainable().items()}
        if moment == "back":
            anchor.put_back(module.buffers())
        with partition.inference():
            outputs = module.eval()(x[0].to(runtime.device)).float().cpu().numpy()
        moments.append({**gathered(partition, names), "outputs": outputs})
    partition.put(mine)
    with partition.inference():
        outputs = module(x[0].to(runtime.device)).float().cpu().numpy()
    put = {**gathered(partition, names), "outputs": outputs}
    return result | {"anchor kept": kept, "moments": moments, "put": put}


def _swap(
    step: int, anchor: Anchor, partition: Partition, module: torch.nn.Module, x: torch.Tensor
) -> list[np.ndarray]:
    if step == 1:  # inference mode outside of the swap
        with torch.inference_mode(), anchor.swapped_in():
            return [module(x).cpu().numpy()]
    if step == 2:  # a forward that breaks off on all ranks
        hook = module.get_submodule("head").register_forward_pre_hook(_stop)
        with pytest.raises(Midway), anchor.swapped_in(), partition.inference():
            module(x)
        hook.remove()
    outputs = []
    for _ in range(2 if step == 3 else 1):
        with anchor.swapped_in(), partition.inference():
            outputs.append(module(x).cpu().numpy())
    return outputs


def _sessions(layouts: list[str], precision: str, folder: Path) -> dict[str, Any]:
    def both(layout: str) -> dict[str, Any]:
        return {s: _session(layout, s == "swaps", precision, folder) for s in ("swaps", "never")}

    return each(layouts, both)


@pytest.fixture(scope="module", params=[2, 3])
def ranks(request: Any, tmp_path_factory: Any) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("layouts")
    return run_ranks(request.param, _sessions, available(list(LAYOUTS)), "fp32", folder)


every_layout = layout_params(list(LAYOUTS))
every_half = layout_params(["fsdp2 in units", "zero1", "zero2", "zero3", "zero3 mixed"])


@every_layout
def test_a_swapped_model_computes_with_theta_star(layout: str, ranks: list[Any]) -> None:
    g = torch.Generator().manual_seed(3)
    expected = tangled_anchor().eval()(torch.randn(7, 6, 7, generator=g)[0]).detach().numpy()
    for rank in ranks:
        assert len(rank[layout]["swaps"]["inside"]) == 5
        for outputs in rank[layout]["swaps"]["inside"]:
            np.testing.assert_allclose(outputs, expected, rtol=0, atol=1e-6)


@every_layout
def test_a_run_that_swaps_equals_one_that_never_did_bit_for_bit(
    layout: str, ranks: list[Any]
) -> None:
    for rank in ranks:
        swaps, never = rank[layout]["swaps"], rank[layout]["never"]
        assert swaps["losses"] == never["losses"]
        assert swaps["anchor kept"]
        for name, value in never["weights"].items():
            np.testing.assert_array_equal(swaps["weights"][name], value)


def assert_taken_back(moments: list[dict[str, np.ndarray]]) -> None:
    start, trained, back = moments
    assert not any(np.array_equal(start[n], v) for n, v in trained.items() if "running" in n)
    assert not np.array_equal(start["outputs"], trained["outputs"])
    for name, value in start.items():
        np.testing.assert_array_equal(back[name], value)


def assert_put(session: dict[str, Any], dense: torch.nn.Module, atol: float) -> None:
    """Put the trained weights into the model that was taken back, with the buffers of then."""
    put, (start, trained, _) = session["put"], session["moments"]
    for name in dict(dense.named_parameters()):
        np.testing.assert_array_equal(put[name], trained[name])
    dense.load_state_dict({n: torch.from_numpy(put[n]) for n in tensors(dense)}, strict=False)
    x = torch.randn(7, 6, 7, generator=torch.Generator().manual_seed(3))[0]
    expected = dense.eval()(x).detach().numpy()
    np.testing.assert_allclose(put["outputs"], expected, rtol=0, atol=atol)
    assert np.abs(put["outputs"] - start["outputs"]).max() > 2 * atol


@every_layout
def test_weights_that_are_put_in_stay(layout: str, ranks: list[Any]) -> None:
    for rank in ranks:
        assert_put(rank[layout]["never"], tangled(0), 1e-6)


@every_layout
def test_the_fingerprint_is_that_of_whole_weights(layout: str, ranks: list[Any]) -> None:
    runtime = Runtime(RunConfig())
    partition = create_partition(runtime, tangled(0))
    whole = weights_checksum(partition.owned(), partition, runtime)
    assert {rank[layout]["swaps"]["fingerprint"] for rank in ranks} == {whole}


@every_layout
def test_weights_and_buffers_are_put_back_bit_for_bit(layout: str, ranks: list[Any]) -> None:
    for rank in ranks:
        assert_taken_back(rank[layout]["never"]["moments"])


@every_layout
def test_layouts_train_alike(layout: str, ranks: list[Any]) -> None:
    for rank in ranks:
        trained, reference = rank[layout]["never"], rank["ddp"]["never"]
        np.testing.assert_allclose(trained["losses"], reference["losses"], rtol=0, atol=1e-4)


@every_layout
def test_all_that_can_change_is_owned_once_by_a_rank_with_about_its_share(
    layout: str, ranks: list[Any]
) -> None:
    parts, dense = [rank[layout]["swaps"]["owned"] for rank in ranks], tensors(tangled(0))
    for name in frozen_names(tangled(0)):
        del dense[name]
        assert not any(name in part for part in parts)
    rows = 0
    for name, tensor in dense.items():
        flat = tensor.float().reshape(-1).numpy()
        joined = np.concatenate([p[name] for p in parts if name in p])
        np.testing.assert_array_equal(joined, flat)
        rows += tensor.numel() // max(1, len(tensor)) if tensor.ndim else 1
    total = sum(t.numel() for t in dense.values())
    largest = max(sum(v.size for v in part.values()) for part in parts)
    padding = {"fsdp2": rows, "zero3": len(dense)}.get(layout.split()[0], 4 * len(ranks))
    assert largest <= -(-total // len(ranks)) + padding


def _halves(folder: Path, layouts: list[str]) -> dict[str, Any]:
    return _sessions(layouts, "bf16", folder)


@pytest.fixture(scope="module")
def halves(tmp_path_factory: Any) -> list[dict[str, Any]]:
    layouts = available(["fsdp2 in units", "zero1", "zero2", "zero3", "zero3 mixed"])
    return run_ranks(2, _halves, tmp_path_factory.mktemp("halves"), layouts)


@every_half
def test_in_bf16_swapping_leaves_no_trace_in_weights_or_masters(
    layout: str, halves: list[Any]
) -> None:
    g = torch.Generator().manual_seed(3)
    dense = tangled_anchor(batchnorm=False).eval()
    expected = dense(torch.randn(7, 6, 7, generator=g)[0]).detach().numpy()
    for rank in halves:
        swaps, never = rank[layout]["swaps"], rank[layout]["never"]
        for outputs in swaps["inside"]:
            np.testing.assert_allclose(outputs, expected, rtol=0, atol=0.03)
        assert swaps["losses"] == never["losses"]
        assert swaps["anchor kept"]
        assert_taken_back(never["moments"])
        assert_put(never, tangled(0, batchnorm=False), 0.03)
        for name, value in never["weights"].items():
            np.testing.assert_array_equal(swaps["weights"][name], value)
        rounded = torch.from_numpy(swaps["weights"]["left.weight"])
        assert not torch.equal(rounded, rounded.bfloat16().float())  # masters, not weights


def _without_release(folder: Path) -> dict[str, Any]:
    return {
        layout: {
            "sabotaged": _session(layout, True, "fp32", folder, sabotage=True),
            "never": _session(layout, False, "fp32", folder),
        }
        for layout in ("zero3", "zero3 resident")
    }


@pytest.mark.skipif(not DEEPSPEED, reason=WITHOUT)
def test_swapping_without_release_would_be_noticed(tmp_path: Path) -> None:
    g = torch.Generator().manual_seed(3)
    expected = tangled_anchor().eval()(torch.randn(7, 6, 7, generator=g)[0]).detach().numpy()
    result = run_ranks(2, _without_release, tmp_path)[0]
    resident = result["zero3 resident"]["sabotaged"]
    assert np.abs(resident["inside"][0] - expected).max() > 0.1
    whole = result["zero3"]
    assert np.abs(np.subtract(whole["sabotaged"]["losses"], whole["never"]["losses"])).max() > 1e-3
