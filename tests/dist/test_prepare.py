"""GlobalView: ``accelerator.prepare`` deals a sampler's own batches, at any number of processes."""

from __future__ import annotations

from importlib.util import find_spec
from itertools import product
from typing import Any

import numpy as np
import pytest
from accelerate import Accelerator, skip_first_batches
from accelerate.utils import DataLoaderConfiguration
from torch.utils.data import DataLoader

from distcl import DistributedWeightedSampler, GlobalView
from distcl.errors import UsageError
from tests.spawn import run_ranks

N = 95
WEIGHTS = np.arange(1, N + 1, dtype=float)
Batches = list[list[int]]


def one(size: int, **options: Any) -> DistributedWeightedSampler:
    sampler = DistributedWeightedSampler(size, seed=3, **options)
    sampler.set_weights(N, WEIGHTS)
    return sampler


def plan(sampler: DistributedWeightedSampler) -> Batches:
    return [sampler.global_batch(k).tolist() for k in range(len(sampler))]


def prepared(sampler: DistributedWeightedSampler, workers: int = 0, **settings: Any) -> Any:
    accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(**settings))
    view = GlobalView(sampler, accelerator)
    return accelerator.prepare(DataLoader(range(N), batch_sampler=view, num_workers=workers))


def read(loader: Any) -> Batches:
    return [batch.tolist() for batch in loader]


def work() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for split, even in product((False, True), repeat=2):
        sampler = one(12, num_samples=96) if split else one(10)  # the last of 5 divides by no W > 1
        loader = prepared(sampler, split_batches=split, even_batches=even)
        assert len(loader) == len(sampler)
        epochs = []
        for epoch in range(3):
            epochs.append((read(loader), plan(sampler)))
            assert sampler.epoch == epoch
        found[f"split {split}, even {even}"] = epochs

    # weights that change in mid-epoch: at the step stated, and refused one before it
    sampler = one(10, window=1)
    loader = prepared(sampler)
    loader.set_epoch(1)
    iterator = iter(loader)
    mine = [next(iterator).tolist() for _ in range(3)]
    with pytest.raises(UsageError, match="drawn up to step 4"):
        sampler.set_weights(N, WEIGHTS, from_step=3)
    sampler.set_weights(N, WEIGHTS[::-1], from_step=4)
    mine += [next(iterator).tolist() for _ in range(2)]
    state = sampler.state_dict(consumed=5)
    mine += read(iterator)
    reference = changed(epoch=1, window=1, step=4)
    found["changed"] = [(mine, plan(reference))]

    # a stop after 5 batches: the rest of the plan, and then the next epoch
    sampler = DistributedWeightedSampler(10, seed=3, window=1)
    sampler.load_state_dict(state)
    loader = prepared(sampler)
    with pytest.raises(UsageError, match=r"loader begins epoch 0.*loader\.iteration = 1"):
        read(loader)
    loader.iteration = sampler.epoch
    assert read(skip_first_batches(loader, state["step"])) == mine[5:]
    with pytest.raises(UsageError, match=r"loader\.set_epoch\(2\)"):
        read(loader)
    loader.set_epoch(2)
    reference.set_epoch(2)
    found["next"] = [(read(loader), plan(reference))]

    sampler.load_state_dict(state)
    loader = prepared(sampler)
    loader.iteration = 1
    with pytest.raises(UsageError, match=r"skip_first_batches\(loader, state\['step'\]\)"):
        read(loader)

    # two workers, each two batches ahead
    sampler = one(10, window=5)
    iterator = iter(prepared(sampler, workers=2))
    mine = [next(iterator).tolist() for _ in range(5)]
    with pytest.raises(UsageError, match="drawn up to step 10"):
        sampler.set_weights(N, WEIGHTS, from_step=5)
    iterator = iter(prepared(sampler := one(10, window=4), workers=2))
    mine = [next(iterator).tolist() for _ in range(3)]  # and so read 8
    sampler.set_weights(N, WEIGHTS[::-1], from_step=8)
    mine += read(iterator)
    found["changed, with workers"] = [(mine, plan(changed(epoch=0, window=4, step=8)))]
    if find_spec("torchdata"):
        found["stateful"] = [stateful(workers=0)]
    return found


def changed(epoch: int, window: int, step: int) -> DistributedWeightedSampler:
    """The sampler that was told of other weights before anything was read."""
    sampler = one(10, window=window)
    sampler.set_epoch(epoch)
    sampler.set_weights(N, WEIGHTS[::-1], from_step=step)
    return sampler


def stateful(workers: int) -> tuple[Batches, Batches]:
    """What is read before and after a stop, with ``use_stateful_dataloader``."""
    sampler = one(10)
    loader = prepared(sampler, workers, use_stateful_dataloader=True)
    loader.set_epoch(1)
    iterator = iter(loader)
    mine = [next(iterator).tolist() for _ in range(4)]
    states = sampler.state_dict(consumed=4), loader.state_dict()
    sampler = DistributedWeightedSampler(10, seed=3)
    sampler.load_state_dict(states[0])
    loader = prepared(sampler, workers, use_stateful_dataloader=True)
    loader.iteration = sampler.epoch
    loader.load_state_dict(states[1])
    return mine + read(loader), plan(sampler)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_every_step_has_the_samplers_own_batch(world: int) -> None:
    ranks = run_ranks(world, work) if world > 1 else [work()]
    for what in ranks[0]:
        for epochs in zip(*(found[what] for found in ranks), strict=True):
            parts, plans = zip(*epochs, strict=True)
            assert all(theirs == plans[0] for theirs in plans)
            steps = zip(*parts, strict=True)
            assert [sum(step, []) for step in steps] == plans[0], what
            sizes = [[len(part) for part in step] for step in zip(*parts, strict=True)]
            assert all(max(step) - min(step) <= 1 for step in sizes)
    draws = [epoch[1] for epoch in ranks[0]["split False, even True"]]
    assert draws[0] != draws[1] != draws[2]


class Settings:
    """Of an accelerator of three processes."""

    num_processes, split_batches, dispatch_batches, torch_device_mesh = 3, False, None, None

    def __init__(self, **changed: Any) -> None:
        vars(self).update(changed)


class Size:
    def size(self) -> int:
        return 2


class Mesh(dict[str, Size]):
    mesh_dim_names = ("dp_replicate", "tp")


@pytest.mark.parametrize(
    ("options", "settings", "says"),
    [
        ({"world_size": 3}, {}, "without rank and world_size"),
        ({}, {"dispatch_batches": True}, "dispatch_batches .* set it to False"),
        ({}, {"torch_device_mesh": Mesh(tp=Size())}, "a 'tp' dimension"),
        ({"batch_size": 10}, {"split_batches": True}, "10 samples .* split_batches: set it to F"),
        ({"batch_size": 2}, {}, "2 samples cannot be split over 3 processes"),
        ({"num_samples": 26}, {}, "last batch of 2 samples .* drop_last=True"),
        ({"num_samples": 27}, {"split_batches": True}, "of 3 .* by split_batches: .*drop_last=True"),
    ],
)
def test_what_cannot_be_exact_is_refused(options: Any, settings: Any, says: str) -> None:
    sampler = DistributedWeightedSampler(**{"batch_size": 12} | options)
    sampler.set_weights(N, WEIGHTS)
    with pytest.raises(UsageError, match=says):
        list(GlobalView(sampler, Settings(**settings)))  # type: ignore[arg-type]


def test_parts_are_refused_by_split_batches() -> None:
    """A view made for another accelerator than the one that prepares."""
    from accelerate.data_loader import prepare_data_loader

    Accelerator(cpu=True)
    loader = DataLoader(range(N), batch_sampler=GlobalView(one(12), Settings()))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="split_batches"):
        prepare_data_loader(loader, num_processes=3, process_index=0, split_batches=True)
