"""The README's loop, run as written, alone and on two ranks."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

from tests.spawn import run_ranks

README = Path(__file__).parents[2] / "README.md"


def _loop() -> dict[str, Any]:
    found = re.search(r"<!-- own loop -->\n```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert found is not None
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    seen: list[list[int]] = []

    class Watched(TensorDataset):
        def __getitem__(self, i: int) -> Any:
            if model.training and torch.is_grad_enabled() and not torch.is_inference_mode_enabled():
                seen[-1].append(i)
            return super().__getitem__(i)

    datasets = []
    for k in range(3):
        g = torch.Generator().manual_seed(k)
        x = torch.randn(130, 5, generator=g)
        datasets.append(Watched(x, (x[:, k] > 0).long()))

    def one_by_one() -> Any:
        for dataset in datasets:
            seen.append([])
            yield dataset

    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    names: dict[str, Any] = {"model": model, "optimizer": optimizer, "datasets": one_by_one()}
    exec(compile(found[1], "README.md", "exec"), names)
    return {
        "seen": seen,
        "weights": names["weights"],
        "plan": [names["sampler"].plan_digest()],
        "moved": [p.detach().numpy() for p in model.parameters()],
    }


@pytest.mark.parametrize("world", [1, 2])
def test_the_loop_of_the_readme_works_as_written(world: int) -> None:
    results = run_ranks(world, _loop)
    for k in range(3):
        assert sum(len(r["seen"][k]) for r in results) == 130  # no rank draws for another
    for result in results:
        np.testing.assert_array_equal(result["weights"], results[0]["weights"])
        assert result["plan"] == results[0]["plan"]
        for a, b in zip(result["moved"], results[0]["moved"], strict=True):
            np.testing.assert_array_equal(a, b)
    assert results[0]["weights"].std() > 0.01  # the last round's priorities are not flat
