import numpy as np
import torch

from distcl.config import ParallelConfig, RunConfig
from distcl.distributed.runtime import Runtime
from distcl.priority.weighting import WeightVector
from distcl.sampling import draw_log as module
from distcl.sampling.draw_log import BINS, EDGES, DrawLog, weight_histogram
from distcl.training.round_report import thumbnails
from tests.spawn import run_ranks

WEIGHTS = np.random.default_rng(5).lognormal(0, 2, 1001)


def test_counts_are_those_of_all_draws_however_often_they_are_merged(monkeypatch):
    monkeypatch.setattr(module, "_PENDING", 100)
    ids = np.random.default_rng(0).integers(0, 50, 1000)
    log = DrawLog(Runtime(RunConfig(), ParallelConfig()))
    for batch in np.split(ids, 40):
        log.add([(0, batch)])
    found, counts = log.counts()
    expected, number = np.unique(ids, return_counts=True)
    assert np.array_equal(found, expected) and np.array_equal(counts, number)
    told, top, most = log.told(100, 5)
    assert most.tolist() == sorted(number.tolist(), reverse=True)[:5]
    assert all(number[expected == i] == n for i, n in zip(top, most, strict=True))
    assert told == {
        "draws": 1000,
        "distinct": len(expected),
        "coverage": len(expected) / 100,
        "most": number.max(),
    }


def test_a_log_goes_on_from_its_state():
    runtime = Runtime(RunConfig(), ParallelConfig())
    first, second, whole = (DrawLog(runtime) for _ in range(3))
    first.add([(0, np.array([1, 2, 2]))])
    second.load_states([first.state_dict()])
    whole.add([(0, np.array([1, 2, 2]))])
    for log in (second, whole):
        log.add([(0, np.array([2, 7]))])
    for mine, expected in zip(second.told(10, 5), whole.told(10, 5), strict=True):
        assert np.array_equal(mine, expected)
    assert second.digest() == whole.digest() != first.digest()


def histogram():
    return weight_histogram(
        WeightVector(np.arange(len(WEIGHTS)), WEIGHTS), Runtime(RunConfig(), ParallelConfig())
    )


def test_the_histogram_is_the_same_at_any_number_of_ranks_and_equals_numpys():
    relative = np.clip(WEIGHTS / WEIGHTS.mean(), EDGES[0], EDGES[-1] * (1 - 1e-12))
    expected, _ = np.histogram(relative, EDGES)
    assert len(EDGES) == BINS + 1 == 65
    for world in (1, 2, 3):
        for counts in run_ranks(world, histogram):
            assert np.array_equal(counts, expected)


def test_thumbnails_are_small_and_use_their_whole_range():
    x = torch.linspace(-3, 5, 2 * 3 * 200 * 100).reshape(2, 3, 200, 100)
    small = thumbnails(x)
    assert small.shape == (2, 50, 25, 3) and small.dtype == np.uint8
    assert small[0].min() == small[1].min() == 0 and small[0].max() == small[1].max() == 255
    assert thumbnails(torch.zeros(1, 1, 8, 8)).max() == 0
