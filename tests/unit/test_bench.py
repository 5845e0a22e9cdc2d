import importlib
import json

import pytest

from distcl.bench import BENCHMARKS, chosen
from distcl.bench.measure import seconds_of
from distcl.bench.rows import Row, skipped
from distcl.errors import UsageError
from tests.spawn import distcl


def test_names_are_chosen_once_in_the_registry_s_order() -> None:
    assert chosen(["shards", "sampler", "shards"]) == ["sampler", "shards"]
    assert chosen(["sampler", "all"]) == list(BENCHMARKS)


def test_an_unknown_name_is_refused_with_the_nearest() -> None:
    with pytest.raises(UsageError, match=r"no benchmark 'smapler'.*'sampler'"):
        chosen(["smapler"])


def test_every_registered_benchmark_exists() -> None:
    for name in BENCHMARKS:
        assert callable(importlib.import_module(f"distcl.bench.{name}").bench)


def test_rows_hold_their_ratio_against_the_target() -> None:
    faster = Row("x", ours=1.0, theirs=10.0, target=9.0, limit=0.5)
    assert (faster.ratio, faster.goal, faster.passed, faster.of_limit) == (10, "≥ 9", True, 0.5)
    less = Row("x", ours=1.1, theirs=1.0, better="less", target=1.05)
    assert (less.ratio, less.goal, less.passed) == (1.1, "≤ 1.05", False)
    more = Row("x", ours=8.0, theirs=10.0, better="more", target=0.8, limit=16.0)
    assert (more.ratio, more.passed, more.of_limit) == (0.8, True, 0.5)
    nothing = skipped("x", "no GPU")
    assert (nothing.ratio, nothing.passed, nothing.goal) == (None, None, None)


def test_works_take_turns() -> None:
    turns: list[str] = []
    seconds_of(lambda: turns.append("a"), lambda: turns.append("b"), repeats=2, warmup=1)
    assert turns == ["a", "b"] * 3


def test_the_command_prints_a_table_and_writes_objects(tmp_path) -> None:
    out = tmp_path / "rows.json"
    done = distcl("bench", "sampler", "--quick", "--json", str(out))
    assert done.returncode == 0, done.stderr
    assert "systematic" in done.stdout and "target" in done.stdout
    rows = json.loads(out.read_text())
    keys = {"name", "ours", "theirs", "ratio", "target", "pass"}
    assert all(keys <= row.keys() for row in rows) and len(rows) == 5
    memory = next(row for row in rows if "memory" in row["name"])
    assert memory["ours"] <= 48
