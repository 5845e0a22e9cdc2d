"""Parts of a checkpoint by name, and slices of other ranks, read again by name and place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from distcl.checkpoint.reader import Reader
from distcl.checkpoint.store import SHARED, rank_file
from distcl.errors import CheckpointError
from distcl.parallel.sliced_state import SavedSlices


def reader(folder: Path, shared: dict[str, Any], *ranks: dict[str, Any]) -> Reader:
    torch.save(shared, folder / SHARED)
    for rank, state in enumerate(ranks):
        torch.save(state, folder / rank_file(rank))
    return Reader(folder, {"world_size": len(ranks)})


def test_exactly_the_parts_of_the_run_must_be_there(tmp_path: Path) -> None:
    found = reader(tmp_path, {"job": {}, "loop": {}}, {"anchor": {}}, {"anchor": {}, "more": {}})
    with pytest.raises(CheckpointError, match="lacks the state of 'monitor'"):
        found.check_names({"job", "loop", "monitor"}, {"anchor"})
    with pytest.raises(CheckpointError, match="has a state of 'loop', which this run does not"):
        found.check_names({"job"}, {"anchor"})
    with pytest.raises(CheckpointError, match="has a state of 'more', which this run does not"):
        found.check_names({"job", "loop"}, {"anchor"})
    with pytest.raises(CheckpointError, match="lacks the state of 'more'"):  # on one rank
        found.check_names({"job", "loop"}, {"anchor", "more"})
    sound = reader(tmp_path, {"job": {}}, {"anchor": {}}, {"anchor": {}})
    sound.check_names({"job"}, {"anchor"})


def saved(ranges: dict[str, tuple[int, int]], world_size: int, rank: int = 0) -> SavedSlices:
    whole = torch.arange(10.0)
    spans = [(0, 4), (4, 7), (7, 10)]
    states = [{"old": [{"w": whole[a:b]}], "plain": 1} for a, b in spans]
    return SavedSlices(Path("c"), states, [{"w": s} for s in spans], ranges, rank, world_size)


@pytest.mark.parametrize("span", [(0, 10), (3, 8), (4, 7), (9, 10)])
def test_slices_are_cut_anew(span: tuple[int, int]) -> None:
    found = saved({"w": span, "other": (0, 3)}, 2).cut("old", 0)
    assert list(found) == ["w"]  # what nobody has saved stays out
    assert torch.equal(found["w"], torch.arange(10.0)[slice(*span)])


def test_what_no_rank_has_saved_is_named() -> None:
    with pytest.raises(CheckpointError, match="'c' lacks old/0 of 'w'"):
        saved({"w": (0, 11)}, 2).cut("old", 0)
    assert saved({"w": (0, 1)}, 2).cut("new") == {}


def test_a_rank_finds_its_own_only_among_as_many() -> None:
    assert saved({"w": (4, 7)}, 3, rank=1).same_layout
    assert not saved({"w": (4, 8)}, 3, rank=1).same_layout
    assert saved({"w": (4, 8)}, 3, rank=1).own["plain"] == 1
    assert saved({"w": (4, 7)}, 2, rank=1).own is None
    assert not saved({"w": (4, 7)}, 2, rank=1).same_layout
