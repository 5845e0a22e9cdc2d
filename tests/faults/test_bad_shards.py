"""Damaged samples in shards: named, or skipped and counted."""

import json

import pytest

from tests.combinations import Combination, Result, attempt, make_data
from tests.dist.test_shards import SHORT, data, essence, train
from tests.spawn import distcl

__all__ = ["data"]  # a fixture


@pytest.mark.parametrize("access", ["indexed", "stream"])
def test_bad_samples_are_skipped_and_counted_the_same_at_every_world_size(data, tmp_path, access):
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for file in (data / "shards").iterdir():
        (damaged / file.name).write_bytes(file.read_bytes())
    tar = damaged / "train-000001.tar"
    content = bytearray(tar.read_bytes())
    for row in (10, 11, 200):  # of samples of 2,048 bytes: cls, then npy, whose shape it is
        content[row * 2048 + (1700 if access == "indexed" else 1600)] ^= 0xFF
    tar.write_bytes(content)
    over = ["stream.source=shards", f"stream.path={damaged}", f"data.access={access}"]
    over += ["data.verify=true"] if access == "indexed" else ["data.shuffle_buffer=50"]
    options = [f"--set={s}" for s in over]
    out = ["--out", str(tmp_path / "error")]
    done = distcl("train", "configs/digits.toml", *SHORT, *options, *out, ranks=2)
    assert done.returncode != 0
    status = json.loads((tmp_path / "error" / "status.json").read_text())
    assert status["exit_code"] == 3
    assert "shard 'train-000001.tar', sample '000000" in status["reason"]
    over.append("data.on_bad_sample=skip")
    one = train("configs/digits.toml", tmp_path / "one", *over, "data.workers=1")
    two = train("configs/digits.toml", tmp_path / "two", *over, ranks=2)
    assert essence(one) == essence(two)
    assert one["bad_samples"] == two["bad_samples"] == 3
    assert "[bad samples]" in (tmp_path / "two" / "log.txt").read_text()


def test_what_was_found_bad_before_a_checkpoint_is_left_out_after_it(tmp_path):
    """Held-out samples are read first, and what is bad is agreed on as the first round begins."""
    make_data(tmp_path / "data")
    keys = {
        "run.precision": "fp64",
        "run.poll_steps": 10,
        "run.report": False,
        "stream.source": "shards",
        "stream.path": str(tmp_path / "data" / "damaged"),
        "stream.experiences": 3,
        "stream.drift": "none",
        "data.on_bad_sample": "skip",
        "training.batch_size": 7,
        "training.steps_per_round": 3,
        "training.pretrain_epochs": 1,
        "checkpoint.every_round": False,
        "checkpoint.every_steps": 30,  # once: of pretraining's 37 steps, and two rounds of 3
    }
    what = Combination("train", "damaged shards", keys, resume=(3, 3))
    assert attempt(what, tmp_path / "runs", ranks=(3,)) == Result("equal")
    saved = list((tmp_path / "runs" / "ranks-3" / "checkpoints").glob("step-*"))
    assert [path.name for path in saved] == ["step-00000030"]
    log = (tmp_path / "runs" / "resumed" / "log.txt").read_text()
    assert "[bad samples] 6 skipped" in log
