import pickle

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset, IterableDataset, TensorDataset

from distcl.config import StreamConfig
from distcl.data.loader import BatchLoader, as_source, iterate_chunks
from distcl.data.sources.arrays import ArraySource
from distcl.data.stream import DriftStream
from distcl.errors import ConfigError, DataError, DistclError
from distcl.sampling.sampler import DistributedWeightedSampler
from distcl.types import Batch, Source
from tests.plans import SOURCE, Plan, X, Y


def drifting():
    return DriftStream(
        SOURCE,
        SOURCE,
        StreamConfig(drift=["rotate", "noise"], experiences=3, transition_fraction=0.25),
        seed=0,
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_come_in_the_order_of_the_plan_and_again_next_epoch(workers):
    made = drifting()
    ids = np.random.default_rng(1).permutation(np.concatenate([e.train for e in made.experiences]))
    plan = Plan([ids[i : i + 16] for i in range(0, len(ids), 16)])
    loader = BatchLoader(made, plan, workers=workers)
    assert len(loader) == 10
    for _ in range(2):
        for batch, wanted in zip(loader, plan.batches, strict=True):
            expected = made.read(wanted)
            assert np.array_equal(batch.ids.numpy(), wanted)
            assert torch.equal(batch.x, expected.x) and torch.equal(batch.y, expected.y)
            assert batch.total == len(wanted)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_rank_without_samples_gets_an_empty_batch_and_the_global_size(workers):
    made = drifting()
    ids = made.experiences[1].train
    plans = [Plan([ids[:7], ids[7:9], ids[9:10]], rank, 3) for rank in range(3)]
    steps = list(zip(*(BatchLoader(made, plan, workers=workers) for plan in plans), strict=True))
    assert [[len(part) for part in parts] for parts in steps] == [[3, 2, 2], [1, 1, 0], [1, 0, 0]]
    for parts, total in zip(steps, (7, 2, 1), strict=True):
        assert {part.total for part in parts} == {total}
        assert {(part.x.shape[1:], part.x.dtype, part.y.dtype) for part in parts} == {
            (torch.Size([1, 4, 4]), torch.float32, torch.int64)
        }


def test_a_plan_may_change_between_epochs_though_workers_stay():
    plan = Plan([[1, 2], [3]])
    loader = BatchLoader(SOURCE, plan, workers=1)
    first = [batch.ids.tolist() for batch in loader]
    plan.batches = [np.array([4]), np.array([5, 5]), np.array([6])]
    assert first == [[1, 2], [3]]
    assert [batch.ids.tolist() for batch in loader] == [[4], [5, 5], [6]]


def test_an_epoch_left_early_starts_anew():
    loader = BatchLoader(SOURCE, Plan([[i] for i in range(9)]), workers=2)
    for batch in loader:
        if batch.ids.item() == 3:
            break
    assert [batch.ids.item() for batch in loader] == list(range(9))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_sampler_resumed_in_mid_epoch_keeps_the_sizes_of_its_batches(workers):
    def sampler(rank):
        made = DistributedWeightedSampler(8, rank=rank, world_size=3, seed=1)
        made.set_weights(50, np.arange(1.0, 51.0))
        return made

    state = sampler(0).state_dict(consumed=4)
    for rank in range(3):
        whole = list(BatchLoader(SOURCE, sampler(rank), workers=workers))
        assert [batch.total for batch in whole] == [8] * 6 + [2]
        resumed = sampler(rank)
        resumed.load_state_dict(state)
        loader = BatchLoader(SOURCE, resumed, workers=workers)
        for begin in (4, 0):  # the epoch after the resumed one is whole again
            for batch, wanted in zip(loader, whole[begin:], strict=True):
                assert torch.equal(batch.ids, wanted.ids) and batch.total == wanted.total


def test_floating_point_is_cast_and_labels_are_not():
    source = ArraySource({"a": X, "b": np.arange(50)}, Y)
    (batch,) = BatchLoader(source, Plan([[3, 4]]), device="cpu", dtype=torch.float64)
    assert batch.x["a"].dtype == torch.float64
    assert batch.x["b"].dtype == torch.int64 and batch.y.dtype == torch.int64
    assert torch.equal(batch.x["a"], torch.from_numpy(X[[3, 4]]).double())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("workers", [0, 2])
def test_batches_arrive_on_a_gpu_through_pinned_memory(workers):
    source = ArraySource({"a": X, "b": np.arange(50)}, Y)
    plan = Plan([[3, 4], [], [5]])
    loader = BatchLoader(source, plan, workers=workers, pin_memory=True, device="cuda")
    for batch, wanted in zip(loader, plan.batches, strict=True):
        assert batch.ids.device.type == "cpu"
        assert batch.x["a"].is_cuda and batch.x["b"].is_cuda and batch.y.is_cuda
        assert torch.equal(batch.x["a"].cpu(), torch.from_numpy(X[wanted]))


# -- errors ------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_a_reading_error_arrives_as_it_was(workers):
    told = None
    try:  # not pytest.raises, which keeps the loader's workers waiting for the garbage collector
        list(BatchLoader(SOURCE, Plan([[0], [1], [99]]), workers=workers))
    except DistclError as error:
        told = type(error), str(error), error.exit_code
    assert told == (DataError, "arrays: there is no sample 99 (0…49)", 3)


def test_sources_can_be_sent_to_spawned_workers():
    made = pickle.loads(pickle.dumps(drifting()))
    ids = made.experiences[2].train[:5]
    assert torch.equal(made.read(ids).x, drifting().read(ids).x)


# -- datasets as sources -----------------------------------------------------------------------


class Squares(Dataset):
    def __len__(self):
        return 10

    def __getitem__(self, i):
        return {"n": torch.tensor([float(i)]), "square": i * i}, i % 3


def test_a_source_passes_through():
    assert as_source(SOURCE) is SOURCE


def test_a_tensor_dataset_is_a_source():
    x, y = torch.from_numpy(X), torch.from_numpy(Y)
    source = as_source(TensorDataset(x, y))
    assert isinstance(source, Source) and len(source) == 50
    batch = source.read(np.array([7, 7, 0]))
    assert torch.equal(batch.x, x[[7, 7, 0]]) and batch.y.tolist() == [2, 2, 0]
    assert batch.ids.tolist() == [7, 7, 0] and batch.total == 3


def test_any_map_style_dataset_is_a_source():
    source = as_source(Squares())
    batch = source.read(np.array([4, 2]))
    assert batch.x["n"].tolist() == [[4.0], [2.0]] and batch.x["square"].tolist() == [16, 4]
    assert batch.y.tolist() == [1, 2] and batch.y.dtype == torch.int64
    empty = source.read(np.empty(0, dtype=np.int64))
    assert empty.x["n"].shape == (0, 1) and empty.y.shape == (0,) and empty.total == 0


def test_a_dataset_drifts_and_loads_like_any_source():
    data = TensorDataset(torch.from_numpy(X), torch.from_numpy(Y))
    config = StreamConfig(drift=["rotate", "noise"], experiences=3, transition_fraction=0.25)
    made = DriftStream(as_source(data), as_source(data), config, seed=0)
    ids = np.concatenate([e.train for e in made.experiences])
    assert torch.equal(made.read(ids).x, drifting().read(ids).x)


class Ragged(Squares):
    def __getitem__(self, i):
        return torch.zeros(i), 0


class Triples(Squares):
    def __getitem__(self, i):
        return 1.0, 2, 3


class Endless(IterableDataset):
    def __iter__(self):
        yield 1, 2


@pytest.mark.parametrize("bad", [-1, 10])
def test_a_position_out_of_range_is_named(bad):
    with pytest.raises(DataError, match=rf"Squares: there is no sample {bad} \(0…9\)"):
        as_source(Squares()).read(np.array([1, bad]))


def test_datasets_that_are_no_source_are_refused():
    ids = np.array([1, 2])
    with pytest.raises(DataError, match=r"Ragged: sample 2 has shapes x \[2\], y \[\], but"):
        as_source(Ragged()).read(ids)
    with pytest.raises(DataError, match="Triples: a sample must be a pair"):
        as_source(Triples()).read(ids)
    with pytest.raises(DataError, match="Endless is neither a Source nor a map-style dataset"):
        as_source(Endless())
    with pytest.raises(DataError, match="list has no samples"):
        as_source([])


# -- chunks ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "sizes"), [(0, []), (4, [4]), (10, [4, 4, 2])])
def test_chunks_cover_the_ids_in_order(n, sizes):
    ids = np.arange(n)[::-1].copy()
    chunks = list(iterate_chunks(SOURCE, ids, 4))
    assert [len(chunk) for chunk in chunks] == sizes
    assert [i for chunk in chunks for i in chunk.ids.tolist()] == ids.tolist()


def batch_of(n, x, y):
    return Batch(torch.arange(n), x, y, n)


def test_only_texts_of_unequal_lengths_are_padded_to_one_batch():
    """Images of other sizes, or targets of other lengths, would train on what nobody has given."""
    ids, mask = torch.ones(2, 3, dtype=torch.int64), torch.ones(2, 3, dtype=torch.int64)
    long = {"input_ids": ids, "attention_mask": mask}
    short = {name: t[:1, :2] for name, t in long.items()}
    both = batch_of(2, long, ids).joined(batch_of(1, short, ids[:1, :2]))
    assert both.x["input_ids"].tolist() == both.x["attention_mask"].tolist()
    assert both.x["attention_mask"][2].tolist() == [1, 1, 0]
    assert both.y[2].tolist() == [1, 1, -100]
    y = torch.zeros(2, dtype=torch.int64)
    for x, other in (
        (torch.zeros(2, 3, 4, 4), torch.zeros(2, 1, 4, 4)),  # colours
        (torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 4, 5)),
        (ids, ids[:, :2]),  # nothing says which are padding
        (torch.zeros(2, 3), torch.zeros(2)),
        ({"image": torch.zeros(2, 3, 4, 4)}, {"image": torch.zeros(2, 1, 4, 4)}),
    ):
        with pytest.raises(ConfigError, match="cannot be one batch"):
            batch_of(2, x, y).joined(batch_of(2, other, y))
    with pytest.raises(ConfigError, match=r"shapes \[3\] and \[2\] cannot be one batch"):
        batch_of(2, ids, torch.zeros(2, 3)).joined(batch_of(2, ids, torch.zeros(2, 2)))
