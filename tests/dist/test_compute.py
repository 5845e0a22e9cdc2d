"""What a run says that it computed, by hand: samples scored, samples trained on."""

import pytest

from tests.small import execute
from tests.spawn import run_ranks

N = 301  # samples of an experience; 7 batches of 50 are a pass over it, and a round has 2
HISTORY = (2 * N, 2 * N + 50)  # drawn in round 1, from 301: two passes; in 2, from 602: 13 batches
TRAINED = {  # mode -> how often current and history samples go forward and backward
    "base": (1, 0),
    "er": (1, 1),
    "mer": (1, 1),
    "agem": (1, 1),
    "jvp_reg": (2, 2),
    "lwf": (1, 0),
}


@pytest.mark.parametrize(
    ("mode", "world", "parts"),
    [*((mode, 1, 1) for mode in TRAINED), ("agem", 2, 3), ("jvp_reg", 3, 2)],
)
def test_every_forward_and_backward_is_counted_once(tmp_path, mode, world, parts):
    overrides = (
        f"continual_learning.update_mode={mode}",
        "continual_learning.importance_weighting=false",
        f"training.accumulate={parts}",
    )
    rounds = run_ranks(world, execute, "train", overrides, tmp_path / "run")[0]["rounds"]
    teacher = N if mode == "lwf" else 0
    now, past = TRAINED[mode]
    trained = [now * 2 * N + past * drawn for drawn in HISTORY]
    assert [r["compute"] for r in rounds] == [
        {"scored": teacher, "trained": count, "units": teacher + 3 * count} for count in trained
    ]


def test_a_fisher_pass_and_a_scoring_pass_count_and_evaluation_does_not(tmp_path):
    overrides = ("continual_learning.update_mode=ewc_online", "training.step_factor=1.5")
    summary = run_ranks(1, execute, "train", overrides, tmp_path / "run")[0]
    assert summary["pretrain"]["compute"] == {"scored": 0, "trained": 3 * N, "units": 9 * N}
    assert [r["steps"] for r in summary["rounds"]] == [21, 21]
    for report in summary["rounds"]:
        assert report["compute"]["trained"] == 3 * N + N
        assert report["compute"]["scored"] == report["forward_passes_per_sample"] * N
    stages = [summary["pretrain"], *summary["rounds"]]
    for key in ("scored", "trained", "units"):
        assert summary["compute"][key] == sum(stage["compute"][key] for stage in stages)


@pytest.mark.parametrize("world", [1, 2])
def test_operations_of_the_steps_are_those_of_the_layers_at_every_world_size(tmp_path, world):
    overrides = ("continual_learning.importance_weighting=false",)
    ranks = run_ranks(world, execute, "train", overrides, tmp_path / "run")
    forward = 2 * (64 * 16 + 16 * 10)  # a multiplication and an addition each
    backward = forward + 2 * 16 * 10  # of weights; of inputs, but the first layer's
    for stage in [ranks[0]["pretrain"], *ranks[0]["rounds"]]:
        assert stage["flops"] == stage["steps"] * 50 * (forward + backward)
    steps = sum(stage["steps"] for stage in [ranks[0]["pretrain"], *ranks[0]["rounds"]])
    assert ranks[0]["flops"] == steps * 50 * (forward + backward)
    for summary in ranks:
        assert len(summary["peak_memory"]) == world
        assert all(1 << 27 < peak < 1 << 34 for peak in summary["peak_memory"])


def test_operations_that_a_sharding_library_hides_are_null(tmp_path):
    overrides = ("continual_learning.importance_weighting=false", "parallel.strategy=fsdp2")
    summary = run_ranks(1, execute, "train", overrides, tmp_path / "run")[0]
    assert summary["flops"] is None
    assert [stage["flops"] for stage in summary["rounds"]] == [None, None]
