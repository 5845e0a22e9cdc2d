"""The contract of the layouts on CUDA with NCCL: the scenarios of tests/strategies, on one GPU and
on several. Start it by ``pytest tests/gpu``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.layouts import available
from tests.spawn import run_ranks
from tests.strategies import test_layouts, test_layouts_methods, test_layouts_rounds

COUNT = torch.cuda.device_count()
one = [pytest.mark.gpu, pytest.mark.skipif(COUNT < 1, reason="needs a CUDA device; there is none")]
two = [
    pytest.mark.multigpu,
    pytest.mark.skipif(COUNT < 2, reason=f"needs 2 CUDA devices; there are {COUNT}"),
]
worlds = pytest.mark.parametrize(
    "world", [pytest.param(1, marks=one), pytest.param(2, marks=two)], ids=["gpu", "multigpu"]
)
LAYOUTS = ["fsdp2 in units", "zero1", "zero2", "zero3", "zero3 resident", "zero3 mixed"]
OFFLOADED = ["fsdp2 offloaded", "zero2 offloaded", "zero3 offloaded"]


@worlds
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_that_swaps_equals_one_that_never_did(
    world: int, precision: str, tmp_path: Path
) -> None:
    layouts = available([*LAYOUTS, *OFFLOADED])
    g = torch.Generator().manual_seed(3)
    dense = test_layouts.tangled_anchor(batchnorm=precision == "fp32").eval()
    expected = dense(torch.randn(7, 6, 7, generator=g)[0]).detach().numpy()
    tolerance = 1e-5 if precision == "fp32" else 0.03
    for rank in run_ranks(world, test_layouts._sessions, layouts, precision, tmp_path, timeout=170):
        for layout in layouts:
            swaps, never = rank[layout]["swaps"], rank[layout]["never"]
            for outputs in swaps["inside"]:
                np.testing.assert_allclose(outputs, expected, rtol=0, atol=tolerance)
            assert swaps["losses"] == never["losses"], layout
            for name, value in never["weights"].items():
                np.testing.assert_array_equal(swaps["weights"][name], value)


@worlds
def test_rounds_agree_with_ddp(world: int, tmp_path: Path) -> None:
    layouts = available(["ddp", *LAYOUTS, *OFFLOADED])
    runs = run_ranks(world, test_layouts_rounds._variant, tmp_path, layouts, "sgd", timeout=170)[0]
    for layout in layouts:
        assert runs[layout]["digests"][0] == runs["ddp"]["digests"][0]
        for name, value in runs["ddp"]["weights"].items():
            np.testing.assert_allclose(runs[layout]["weights"][name], value, rtol=0, atol=1e-4)


@worlds
def test_methods_agree_with_ddp(world: int, tmp_path: Path) -> None:
    layouts = available(["ddp", "fsdp2 in units", "zero2", "zero3 offloaded"])
    ways: dict[str, Any] = run_ranks(
        world, test_layouts_methods._everything, tmp_path, layouts, timeout=175
    )[0]["ways"]
    for way, found in ways.items():
        for layout in layouts:
            for name, value in found["ddp"].items():
                if not isinstance(found[layout], str):
                    given = found[layout][name]
                    np.testing.assert_allclose(given, value, rtol=0, atol=1e-3, err_msg=way)
