"""Counting operations changes none of them; freed memory is used again."""

import os
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from distcl.distributed.memory import FlopCount

MODELS = {
    "mlp": lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 4)),
    "cnn": lambda: nn.Sequential(nn.Conv2d(1, 6, 3), nn.GroupNorm(2, 6), nn.ReLU(), nn.Flatten()),
    "attention": lambda: nn.Sequential(nn.Flatten(1, 2), nn.TransformerEncoderLayer(8, 2, 16, 0.0)),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_count_is_that_of_torch_and_gradients_keep_every_bit(name):
    torch.manual_seed(0)
    model, x = MODELS[name](), torch.randn(5, 1, 8, 8)
    model(x).square().sum().backward()
    plain = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    with FlopCount() as count:
        model(x).square().sum().backward()
    for parameter, grad in zip(model.parameters(), plain, strict=True):
        assert torch.equal(parameter.grad, grad)
    with FlopCounterMode(display=False) as torchs:
        model(x).square().sum().backward()
    with torch.inference_mode():
        outputs = model(x)
        with FlopCount() as inferring:
            assert torch.equal(model(x), outputs)
        with FlopCounterMode(display=False) as torchs_inferring:
            model(x)
    assert inferring.total == torchs_inferring.get_total_flops() > 0
    assert count.total == torchs.get_total_flops() > 0


FREED = """
import psutil, torch
from distcl.distributed.memory import keep_freed_memory
{first}
resident = psutil.Process().memory_info
before = resident().rss
large = torch.ones(6 << 20)
del large
print(resident().rss - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_freed_memory_is_kept_unless_the_environment_says_how_to_allocate():
    def kept(first: str) -> int:
        code = FREED.format(first=first)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
        return int(done.stdout)

    assert kept("keep_freed_memory({})") > 20e6
    assert kept("") < 10e6
    assert kept("keep_freed_memory({'MALLOC_ARENA_MAX': '1'})") < 10e6


HOLES = """
import psutil, torch
from distcl.distributed.memory import keep_freed_memory, large_arrays
keep_freed_memory({})
resident = psutil.Process().memory_info
before = resident().rss
with large_arrays():
    large = torch.ones(6 << 20)
above = [bytes(1000) for _ in range(1000)]
del large
print(resident().rss - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_large_arrays_leave_no_hole_where_they_were():
    def kept(code: str) -> int:
        environ = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_"))}
        command = [sys.executable, "-c", code]
        return int(subprocess.run(command, capture_output=True, check=True, env=environ).stdout)

    assert kept(HOLES) < 10e6
    assert kept(HOLES.replace("with large_arrays()", "if True")) > 20e6
