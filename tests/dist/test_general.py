"""General data are replayed: the same at one rank and three, and after a restart."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from distcl.job import execute as run_job
from distcl.reporting.run_reader import read_run
from distcl.types import GENERAL as LAST
from distcl.types import unpack_ids
from tests.small import execute, small
from tests.spawn import run_ranks

GENERAL = (
    'stream.general={source = "digits", test_fraction = 0.7}',
    "run.precision=fp64",
    "training.batch_size=37",
    "training.accumulate=2",
    "priority.correction=0.5",
)
ER = ("continual_learning.update_mode=er", "continual_learning.replay_batch_size=11")
DER = (*ER, "continual_learning.update_mode=der", "training.pretrain_epochs=0")
MIXED = (
    "continual_learning.mix_historic_data=true",
    "continual_learning.current_ratio=0.6",
    "continual_learning.history_of=general",
    "priority.target=union",
)


def drawn(folder: Path, number: int) -> set[int]:
    """The experiences of which samples were drawn in a round."""
    return set(unpack_ids(read_run(folder).draws[number]["ids"])[0].tolist())


@pytest.mark.parametrize("case", [ER, DER, MIXED], ids=["er", "der", "mixed"])
def test_general_data_are_replayed_alike_on_any_number_of_ranks(
    case: tuple[str, ...], tmp_path: Path
) -> None:
    keys = (*GENERAL, *case, "checkpoint.every_steps=5", "checkpoint.keep=99")
    one, three = (
        run_ranks(world, execute, "train", keys, tmp_path / str(world))[0] for world in (1, 3)
    )
    digests = [[r["draws_sha256"] for r in summary["rounds"]] for summary in (one, three)]
    assert digests[0] == digests[1]
    final = Path("checkpoints") / "final.safetensors"
    a, b = (load_file(tmp_path / name / final) for name in ("1", "3"))
    for name in a:
        np.testing.assert_allclose(a[name], b[name], rtol=0, atol=1e-11)
    held = [r["priority"]["hist"]["n"] for r in three["rounds"]]
    if case is DER:
        assert held == [539, 539 + 301, 539 + 602]
    elif case is ER:  # all of the general data, and the experiences before
        assert held == [539 + 301, 539 + 602]
    else:
        assert held == [539, 539]
        assert [drawn(tmp_path / "3", k) for k in (1, 2)] == [{1, LAST}, {2, LAST}]
    within = sorted((tmp_path / "3" / "checkpoints").glob("step-*"))[-2]
    run_ranks(3, resumed, keys, str(tmp_path / "again"), str(within))
    c = load_file(tmp_path / "again" / final)
    assert all(np.array_equal(b[name], c[name]) for name in b)


def resumed(keys: tuple[str, ...], out: str, path: str) -> None:
    run_job("train", small(*keys), Path(out), resume=path)


def test_they_are_replayed_in_the_first_round_also_where_nothing_was_learnt_before(
    tmp_path: Path,
) -> None:
    keys = ("training.pretrain_epochs=0", *ER)
    given = execute("train", (*keys, GENERAL[0]), tmp_path / "a")["rounds"][0]["priority"]
    plain = execute("train", keys, tmp_path / "b")["rounds"][0]["priority"]
    assert given["hist"]["n"] == 539 and "hist" not in plain
