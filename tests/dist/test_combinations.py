"""Parts that know nothing of each other work together, the same on 1, 2 and 3 ranks.

Twelve fixed combinations; benchmarks/combinations.py tries any number.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.combinations import attempt, differences, draw, make_data
from tests.forked import Started

RANKS = (1, 2, 3)
SEED = 1
NUMBERS = (0, 2, 4, 5, 6, 7, 8, 10, 15, 16, 20, 24)
"""Every updater and signal, every source but hf, streams and resumes among them."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("combinations") / "data"
    make_data(folder)
    return folder



@pytest.mark.parametrize("number", NUMBERS)
def test_a_combination_is_one_run_on_1_2_and_3_ranks(
    number: int, data: Path, tmp_path: Path
) -> None:
    what = draw(SEED, number, data, RANKS)
    result = attempt(what, tmp_path / "runs", RANKS)
    again = f"python benchmarks/combinations.py --seed {SEED} --only {number}"
    assert result.kind == "equal", f"{what}: {result.why}\n{what.toml}\nagain: {again}"


def test_what_differs_is_found(tmp_path: Path) -> None:
    (tmp_path / "job.toml").write_text("[training]\nepochs = 1\n[run]\nreport = false\n")
    argv = ("train", str(tmp_path / "job.toml"), "--out", str(tmp_path / "a"), "--quiet")
    assert Started(argv, tmp_path / "said").end().codes == [0]
    a, b = tmp_path / "a", Path(shutil.copytree(tmp_path / "a", tmp_path / "b"))
    assert differences(a, b, exact=True) == ""
    final = b / "checkpoints" / "final.safetensors"
    weights = load_file(final)
    name = next(iter(weights))
    first = weights[name].flat[0]
    for value, exact in ((np.nextafter(first, 9), True), (first + 1e-6, False), (np.nan, False)):
        weights[name].flat[0] = value
        save_file(weights, final)
        assert "weights differ by" in differences(a, b, exact)
    weights[name].flat[0] = first
    save_file(weights, final)
    summary = json.loads((b / "summary.json").read_text())
    for change in ("draws_sha256", "final_loss", "steps"):
        changed = json.loads(json.dumps(summary))
        changed["rounds"][-1][change] = 5
        (b / "summary.json").write_text(json.dumps(changed))
        assert f" {change}: " in differences(a, b)
