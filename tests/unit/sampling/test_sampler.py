import hashlib
import io
import math
from itertools import chain

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset

from distcl.errors import UsageError
from distcl.sampling import draws
from distcl.sampling.groups import Group
from distcl.sampling.sampler import DistributedWeightedSampler

IDS = np.arange(100) * 10 + (3 << 40)
WEIGHTS = np.arange(100) % 7 + 0.5
DRAWS = ("multinomial", "systematic", "without_replacement", "credit")


def ranks(world: int, batch_size: int = 16, ids=IDS, weights=WEIGHTS, **options):
    samplers = [
        DistributedWeightedSampler(batch_size, rank=r, world_size=world, **options)
        for r in range(world)
    ]
    for sampler in samplers:
        sampler.set_weights(ids, weights)
    return samplers


def one(batch_size: int = 16, ids=IDS, weights=WEIGHTS, **options) -> DistributedWeightedSampler:
    return ranks(1, batch_size, ids, weights, **options)[0]


def whole_plan(sampler: DistributedWeightedSampler) -> list[list[int]]:
    return [sampler.global_batch(step).tolist() for step in range(len(sampler))]


def flat(parts) -> list[int]:
    return list(chain.from_iterable(parts))


@settings(deadline=None)
@given(
    world=st.integers(1, 8),
    extra=st.integers(0, 20),
    number=st.integers(1, 90),
    num_samples=st.none() | st.integers(1, 120),
    draw=st.sampled_from(("multinomial", "systematic", "permutation")),
    drop_last=st.booleans(),
    seed=st.integers(0, 2**64 - 1),
)
def test_ranks_partition_every_global_batch(
    world, extra, number, num_samples, draw, drop_last, seed
) -> None:
    batch_size = world + extra
    weights = None if draw == "permutation" else np.arange(number) + 1.0
    options = {"num_samples": num_samples, "drop_last": drop_last, "seed": seed}
    if weights is not None:
        options["draw"] = draw
    samplers = ranks(world, batch_size, np.arange(number) * 3, weights, **options)
    total = num_samples or number
    steps = total // batch_size if drop_last else math.ceil(total / batch_size)
    parts = [list(sampler) for sampler in samplers]
    assert {len(p) for p in parts} == {len(s) for s in samplers} == {steps}
    alone = one(batch_size, np.arange(number) * 3, weights, **options)
    for step in range(steps):
        expected = alone.global_batch(step)
        assert len(expected) == min(batch_size, total - step * batch_size)
        assert flat(p[step] for p in parts) == expected.tolist()
        sizes = [len(p[step]) for p in parts]
        assert sizes == sorted(sizes, reverse=True)
        assert sizes[0] - sizes[-1] <= 1
    assert {s.plan_digest() for s in samplers} == {alone.plan_digest()}


@settings(deadline=None, max_examples=60)
@given(
    world=st.integers(1, 4),
    new_world=st.integers(1, 4),
    stop=st.integers(0, 7),
    window=st.none() | st.integers(1, 4),
    revise=st.none() | st.integers(1, 3),
    draw=st.sampled_from(DRAWS),
    groups=st.booleans(),
)
def test_interrupted_and_resumed_is_as_uninterrupted(
    world, new_world, stop, window, revise, draw, groups
) -> None:
    revise = None if revise is None or window is None else revise * window

    def make(rank: int, of: int) -> DistributedWeightedSampler:
        return DistributedWeightedSampler(
            16, window=window, rank=rank, world_size=of, seed=5, draw=draw
        )

    def fill(sampler: DistributedWeightedSampler, weights: np.ndarray, from_step: int = 0) -> None:
        if groups:
            parts = [Group(IDS[:40], weights[:40], 30), Group(IDS[40:], None, 70)]
            sampler.set_groups(parts, from_step=from_step)
        else:
            sampler.set_weights(IDS, weights, from_step=from_step)

    def begun(rank: int, of: int, taken: int) -> DistributedWeightedSampler:
        sampler = make(rank, of)
        fill(sampler, WEIGHTS)
        sampler.set_round(2)
        sampler.set_epoch(4)
        if revise is not None:
            fill(sampler, WEIGHTS[::-1].copy(), revise)
        iterator = iter(sampler)
        for _ in range(taken):
            next(iterator)
        return sampler

    first = [begun(rank, world, stop) for rank in range(world)]
    stored = io.BytesIO()
    torch.save(first[0].state_dict(), stored)
    reference = begun(0, 1, 0)
    digest, expected = reference.plan_digest(), whole_plan(reference)

    resumed = [make(rank, new_world) for rank in range(new_world)]
    for sampler in resumed:
        stored.seek(0)
        sampler.load_state_dict(torch.load(stored, weights_only=True))
        sampler.set_epoch(4)  # as a loop over epochs does
        assert sampler.first_step == stop
    parts = [list(sampler) for sampler in resumed]
    together = [flat(step) for step in zip(*parts, strict=True)]
    assert together == expected[stop:]
    if window is None:
        assert whole_plan(resumed[0]) == expected
        assert resumed[0].plan_digest() == digest
        assert len(list(resumed[0])) == 7  # only the first iteration goes on in the middle
    for sampler in (reference, resumed[0]):
        sampler.set_epoch(5)
    assert whole_plan(resumed[0]) == whole_plan(reference)


@pytest.mark.parametrize("draw", DRAWS)
def test_plan_is_a_pure_function_of_seed_stream_round_epoch_draw_and_weights(draw: str) -> None:
    def digest(round_index: int = 0, epoch: int = 0, weights=WEIGHTS, **options) -> str:
        sampler = one(weights=weights, draw=draw, **options)
        sampler.set_round(round_index)
        sampler.set_epoch(epoch)
        return sampler.plan_digest()

    plans = [
        digest(),
        digest(seed=1),
        digest(stream=1),
        digest(round_index=1),
        digest(epoch=1),
        digest(weights=WEIGHTS**2),
    ]
    assert len(set(plans)) == len(plans)
    assert digest(round_index=1) == digest(round_index=1) == plans[3]
    assert one(draw=draw, round_index=1).plan_digest() == plans[3]


def test_digest_is_sha256_of_little_endian_ids_in_order() -> None:
    sampler = one()
    ids = flat(whole_plan(sampler))
    assert len(ids) == 100
    for steps, end in ((None, 100), (0, 0), (2, 32), (7, 100)):
        expected = hashlib.sha256(np.array(ids[:end], dtype="<i8").tobytes()).hexdigest()
        assert sampler.plan_digest(steps) == expected


def test_digests_are_equal_at_every_world_size() -> None:
    assert len({s.plan_digest() for world in (1, 2, 3) for s in ranks(world, seed=9)}) == 1


def test_systematic_counts_and_without_replacement_show_in_the_plan() -> None:
    drawn = np.concatenate(whole_plan(one(draw="systematic", num_samples=1000)))
    expected = 1000 * WEIGHTS / WEIGHTS.sum()
    counts = np.array([(drawn == i).sum() for i in IDS])
    assert np.abs(counts - expected).max() < 1
    drawn = np.concatenate(whole_plan(one(draw="without_replacement", num_samples=60)))
    assert len(set(drawn.tolist())) == 60


def test_without_weights_draws_are_permutations() -> None:
    sampler = one(num_samples=250, weights=None)
    drawn = flat(whole_plan(sampler))
    assert sorted(drawn[:100]) == sorted(drawn[100:200]) == IDS.tolist()
    assert len(set(drawn[200:])) == 50


def test_equal_weights_draw_with_replacement_but_no_weights_do_not() -> None:
    drawn = flat(whole_plan(one(weights=np.ones(100))))
    assert 50 < len(set(drawn)) < 80  # 63 are expected
    assert len(set(flat(whole_plan(one(weights=None))))) == 100


def test_ids_and_weights_may_be_tensors_lists_or_a_number() -> None:
    plan = whole_plan(one())
    tensors = one(
        ids=torch.from_numpy(IDS),
        weights=torch.tensor(WEIGHTS, dtype=torch.bfloat16).requires_grad_(),
    )
    assert whole_plan(tensors) == plan
    assert whole_plan(one(ids=IDS.tolist(), weights=WEIGHTS.tolist())) == plan
    rows = one(ids=100)
    assert [[int(IDS[i]) for i in batch] for batch in whole_plan(rows)] == plan
    assert type(next(iter(rows))[0]) is int


def test_what_the_caller_changes_later_does_not_change_the_plan() -> None:
    ids, weights = IDS.copy(), WEIGHTS.copy()
    sampler = one(ids=ids, weights=weights)
    ids[:], weights[:] = 0, 1
    sampler.global_batch(0)[:] = 0
    assert whole_plan(sampler) == whole_plan(one())


# ---------------------------------------------------------------- weights that change


@pytest.mark.parametrize("draw", DRAWS)
def test_new_weights_from_a_step_on_leave_earlier_batches_alone(draw: str) -> None:
    options = {"num_samples": 96, "draw": draw, "window": 3}
    before = whole_plan(one(**options))
    rest = 0.0 if draw == "credit" else 1e-12  # what small weights have earned is not lost
    half = np.where(np.arange(100) < 60, WEIGHTS, rest)
    sampler = one(**options)
    sampler.set_weights(IDS, half, from_step=3)
    after = whole_plan(sampler)
    assert after[:3] == before[:3]
    assert after[3:] != before[3:]
    assert set(flat(after[3:])) <= set(IDS[:60].tolist())
    assert [len(batch) for batch in after] == [16] * 6
    sampler.set_epoch(1)  # the next epoch is drawn from the newest weights, as if given first
    other = one(**{**options, "weights": half})
    other.set_epoch(1)
    assert whole_plan(sampler) == whole_plan(other)


def test_weights_change_while_iterating_and_again() -> None:
    samplers = ranks(3, draw="systematic", window=2)
    iterators = [iter(sampler) for sampler in samplers]
    seen: list[list[int]] = []
    for step in range(7):
        seen.append(flat(next(iterator) for iterator in iterators))
        for sampler in samplers:
            if step in (1, 3):
                sampler.set_weights(IDS, WEIGHTS ** (step + 2), from_step=step + 3)
    expected = one(draw="systematic", window=2)
    for step in (1, 3):
        expected.set_weights(IDS, WEIGHTS ** (step + 2), from_step=step + 3)
    assert seen == whole_plan(expected)


@pytest.mark.parametrize("step", [1, 2, 3])
def test_steps_that_cannot_be_redrawn_are_named(step: int) -> None:
    sampler = one(window=2)
    iterator = iter(sampler)
    for _ in range(3):
        next(iterator)
    with pytest.raises(UsageError, match="windows of 2 steps, drawn up to step 4"):
        sampler.set_weights(IDS, WEIGHTS, from_step=step)
    sampler.set_weights(IDS[:50], WEIGHTS[:50], from_step=4)
    with pytest.raises(UsageError, match="2 groups from step 6 on: the plan has 1"):
        sampler.set_groups([Group(IDS, None, 1)] * 2, from_step=6)


def test_a_replaced_plan_ends_the_old_iteration_with_an_error() -> None:
    sampler = one()
    iterator = iter(sampler)
    next(iterator)
    sampler.set_weights(IDS, WEIGHTS)
    with pytest.raises(UsageError, match="from_step"):
        next(iterator)
    assert len(list(sampler)) == 7


def test_epochs_begin_at_the_start_after_a_break() -> None:
    sampler = one()
    next(iter(sampler))
    assert len(list(sampler)) == 7
    sampler.set_epoch(0)
    assert len(list(sampler)) == 7
    assert sampler.state_dict()["step"] == 7


# ---------------------------------------------------------------- in other people's loops


class Rows(Dataset):
    def __len__(self) -> int:
        return 100

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.full((2,), float(index)), index


@pytest.mark.parametrize("workers", [0, 2])
def test_a_plain_dataloader_delivers_the_plan_and_resumes_in_it(workers: int) -> None:
    options = {"num_workers": workers, "persistent_workers": workers > 0}
    sampler = one(ids=100)
    loader = DataLoader(Rows(), batch_sampler=sampler, **options)
    assert len(loader) == 7
    for epoch in range(2):
        sampler.set_epoch(epoch)
        batches = [index.tolist() for _, index in loader]
        assert batches == whole_plan(sampler)

    sampler.set_epoch(2)
    iterator = iter(loader)
    seen = [next(iterator)[1].tolist() for _ in range(3)]
    state = sampler.state_dict(consumed=3)
    assert sampler.state_dict()["step"] >= 3  # workers read ahead
    resumed = DistributedWeightedSampler(16)
    resumed.load_state_dict(state)
    rest = [index.tolist() for _, index in DataLoader(Rows(), batch_sampler=resumed, **options)]
    assert seen + rest == whole_plan(resumed) == whole_plan(sampler)


def test_accelerate_does_not_shard_on_one_process() -> None:
    sampler = one(ids=100)
    loader = Accelerator(cpu=True).prepare(DataLoader(Rows(), batch_sampler=sampler))
    for epoch in range(2):
        batches = [index.tolist() for _, index in loader]
        assert sampler.epoch == epoch
        assert batches == whole_plan(sampler)
    sampler.set_epoch(5)
    state = sampler.state_dict(consumed=2)

    resumed = DistributedWeightedSampler(16)
    loader = Accelerator(cpu=True).prepare(DataLoader(Rows(), batch_sampler=resumed))
    resumed.load_state_dict(state)
    loader.iteration = resumed.epoch
    assert [index.tolist() for _, index in loader] == whole_plan(resumed)[2:]


@pytest.mark.parametrize("split_batches", [False, True])
def test_accelerate_cannot_shard_a_second_time(split_batches: bool) -> None:
    Accelerator(cpu=True)
    loader = DataLoader(Rows(), batch_sampler=ranks(2, ids=100)[1])
    with pytest.raises(UsageError, match=r"GlobalView\(sampler, accelerator\); or leave its"):
        prepare_data_loader(loader, num_processes=2, process_index=1, split_batches=split_batches)


# ---------------------------------------------------------------- wrong use


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"batch_size": 2, "world_size": 3}, "batch of 2 .* 3 ranks"),
        ({"batch_size": 0}, "batch of 0"),
        ({"batch_size": 8, "world_size": 2, "rank": 2}, "rank"),
        ({"batch_size": 8, "rank": -1}, "rank"),
        ({"batch_size": 8, "num_samples": 0}, "num_samples"),
        ({"batch_size": 8, "window": 0}, "window"),
        ({"batch_size": 8, "draw": "alias"}, "unknown draw 'alias'; known: multinomial"),
    ],
)
def test_wrong_constructor_arguments_are_named(options: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        DistributedWeightedSampler(**options)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -1.0])
def test_bad_weights_name_the_id_and_change_nothing(bad: float) -> None:
    sampler = one()
    weights = WEIGHTS.copy()
    weights[17] = bad
    with pytest.raises(ValueError, match=f"id {IDS[17]} is"):
        sampler.set_weights(IDS, weights)
    with pytest.raises(ValueError, match=f"id {IDS[17]} is"):
        one(window=2).set_weights(IDS, weights, from_step=2)
    with pytest.raises(ValueError, match=f"all 100 weights are zero, from id {IDS[0]}"):
        sampler.set_weights(IDS, np.zeros(100))
    assert whole_plan(sampler) == whole_plan(one())


@pytest.mark.parametrize(
    ("ids", "weights", "says"),
    [
        ([], [], "no ids|integers"),
        (0, None, "no ids"),
        ([1.5], [1.0], "integers"),
        ([[1, 2]], [[1.0, 2.0]], "one row"),
        ([1, 2], [1.0], r"\(1,\) for 2 ids"),
        (np.array([2**63 + 5], dtype=np.uint64), [1.0], f"below 2.*not {2**63 + 5}"),
    ],
)
def test_ids_that_do_not_fit_are_refused(ids, weights, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        DistributedWeightedSampler(4).set_weights(ids, weights)


def test_use_before_weights_is_refused() -> None:
    with pytest.raises(UsageError, match="set_weights first"):
        len(DistributedWeightedSampler(4))


def test_options_can_be_read_and_not_changed() -> None:
    given = {"window": 2, "num_samples": 40, "seed": 3, "draw": "systematic", "drop_last": True}
    sampler = DistributedWeightedSampler(8, stream=1, **given)
    assert {name: getattr(sampler, name) for name in given} == given
    assert (sampler.global_batch_size, sampler.batch_size, sampler.stream) == (8, 8, 1)
    with pytest.raises(AttributeError):
        sampler.seed = 4


@pytest.mark.parametrize("name", ["seed", "stream", "draw", "num_samples", "drop_last", "window"])
def test_state_of_another_sampler_is_refused_by_key(name: str) -> None:
    other = {"seed": 3, "stream": 1, "draw": "systematic", "num_samples": 5, "window": 2}
    other["drop_last"] = True
    with pytest.raises(ValueError, match=f"saved with {name}"):
        one().load_state_dict(one(**{name: other[name]}).state_dict())
    with pytest.raises(ValueError, match="consumed"):
        one().state_dict(consumed=8)
    with pytest.raises(ValueError, match="step 7"):
        one().global_batch(7)


def test_more_than_2_to_the_24_ids() -> None:
    number = (1 << 24) + 1
    weights = draws.generator(1).random(number)
    weights[-1] = number / 2  # as much as all others together
    sampler = DistributedWeightedSampler(1024, num_samples=200_000, rank=1, world_size=3)
    sampler.set_weights(number, weights)
    drawn = np.concatenate(list(sampler))
    assert np.mean(drawn == number - 1) == pytest.approx(0.5, abs=0.01)
    assert drawn[drawn < number - 1].mean() == pytest.approx(number / 2, rel=0.01)
