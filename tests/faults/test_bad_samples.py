"""``data.on_bad_sample = "skip"`` with what else draws, learns and deals out samples."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distcl import job
from distcl.config import DataConfig, StreamConfig
from distcl.data.shards.decode import npy_bytes
from distcl.data.shards.index import index_folder
from distcl.data.stream import create_stream
from distcl.errors import DataError, DistclError
from distcl.updaters.der import DarkExperienceReplay
from tests.files import write_tar
from tests.small import small
from tests.spawn import exit_codes, run_ranks

CLASSES = 4


def write(folder: Path, bad: Collection[int], tests: Collection[int] = ()) -> Path:
    """Six shards of 20 samples, three of 10 held out; those of rows ``bad`` do not decode."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    shards = [("train", k, range(20 * k, 20 * k + 20), bad) for k in range(6)]
    shards += [("test", k, range(10 * k, 10 * k + 10), tests) for k in range(3)]
    for split, number, rows, damaged in shards:
        members = []
        for row in rows:
            x = npy_bytes(rng.normal(row % CLASSES, 0.5, 5).astype(np.float32))
            damaged_x = b"\x93NUMPY, and then nothing"
            members.append((f"{row:04d}.npy", damaged_x if row in damaged else x))
            members.append((f"{row:04d}.cls", b"%d" % (row % CLASSES)))
        write_tar(folder / f"{split}-{number:03d}.tar", members)
    index_folder(folder)
    return folder


def keys(folder: Path, *more: str) -> tuple[str, ...]:
    return (
        "stream.source=shards",
        f"stream.path={folder}",
        "stream.drift=none",
        "stream.samples_per_experience=0",
        "training.batch_size=16",
        "data.on_bad_sample=skip",
        "data.lanes=3",
        "run.precision=fp64",
        "continual_learning.importance_weighting=false",
        "run.timeout_seconds=30",
        *more,
    )


def go(folder: Path, out: Path, *more: str) -> Any:
    """Run a job; return its draws, accuracies and count of bad samples, or the error's words."""
    try:
        found = job.execute("train", small(*keys(folder, *more)), out)
    except DistclError as error:
        return type(error).__name__, error.exit_code, str(error)
    return found["accuracy"], [r["draws_sha256"] for r in found["rounds"]], found["bad_samples"]


WAYS = {
    "without_replacement": (
        "continual_learning.importance_weighting=true",
        "priority.signal=loss",
        "priority.draw=without_replacement",
        "stream.experiences=2",
    ),
    "systematic": (
        "continual_learning.importance_weighting=true",
        "priority.signal=loss",
        "priority.draw=systematic",
        "priority.correction=0.5",
        "stream.experiences=2",
    ),
    "lwf": (
        "continual_learning.update_mode=lwf",
        "continual_learning.mix_historic_data=true",
        "continual_learning.buffer_size=11",
        "stream.drift=split",
    ),
    "der": (
        "continual_learning.update_mode=der",
        "continual_learning.buffer_size=11",
        "stream.drift=split",
    ),
}


@pytest.mark.parametrize("way", WAYS)
def test_bad_samples_go_with_every_way_to_draw_and_learn(tmp_path, way):
    folder = write(tmp_path / "s", bad=(5, 39, 77, 100))
    one = go(folder, tmp_path / "one", *WAYS[way])
    assert one[2] in (3, 4), one  # der reads no sample but those that it draws
    if way in ("without_replacement", "lwf"):
        three = run_ranks(3, go, folder, tmp_path / "three", *WAYS[way])
        assert three == [three[0]] * 3 and three[0][1:] == one[1:]
        np.testing.assert_allclose(np.array(three[0][0], float), np.array(one[0], float), atol=1e-9)


LATE = (  # samples of the history are read for the first time as the round begins
    "continual_learning.update_mode=lwf",
    "continual_learning.mix_historic_data=true",
    "continual_learning.importance_weighting=true",
    "priority.signal=loss",
    "priority.source=online",
    "priority.target=current",
    "priority.refresh_steps=4",
    "stream.drift=split",
    "stream.experiences=2",
    "training.pretrain_epochs=0",
)
SOME = tuple(range(0, 120, 5))
MOST = tuple(row for row in range(120) if row // 4 % 4)


@pytest.mark.parametrize(
    ("bad", "kept", "batch", "steps", "seed"), [(SOME, 11, 16, 3, 0), (MOST, 1, 2, 30, 3)]
)
def test_lwf_has_the_logits_of_what_is_read_in_the_place_of_history(
    tmp_path, bad, kept, batch, steps, seed
):
    folder = write(tmp_path / "s", bad)
    more = (
        f"continual_learning.buffer_size={kept}",
        f"training.batch_size={batch}",
        f"training.steps_per_round={steps}",
        f"run.seed={seed}",
    )
    one = go(folder, tmp_path / "one", *LATE, *more)
    assert len(one[1]) == 2 and one[2] > 0, one
    if batch > 2:
        three = run_ranks(3, go, folder, tmp_path / "three", *LATE, *more)
        assert three == [three[0]] * 3 and three[0][1:] == one[1:]


class Spoiled(DarkExperienceReplay):
    """Samples of the first two shards go bad when the second round begins."""

    folder = Path()

    def cl_preprocessing(self) -> None:
        super().cl_preprocessing()
        for k in range(2 if len(self.stored.ids) else 0):
            path = self.folder / f"train-{k:03d}.tar"
            path.write_bytes(path.read_bytes().replace(b"\x93NUMPY", b"\x94NUMPY", 13))


def test_der_replays_what_has_logits_when_samples_go_bad_later(tmp_path, monkeypatch):
    folder = write(tmp_path / "s", ())
    monkeypatch.setattr(Spoiled, "folder", folder)
    mode = "continual_learning.update_mode=tests.faults.test_bad_samples:Spoiled"
    way = (mode, *WAYS["der"][1:], "stream.experiences=3", "training.pretrain_epochs=0")
    found = go(folder, tmp_path / "one", *way)
    assert len(found[1]) == 3 and found[2] > 0, found


def test_a_bad_sample_is_replaced_by_the_next_of_its_experience(tmp_path):
    bad, tests = (5, 39, *range(60, 80), 119), (3, 29)
    folder = write(tmp_path / "s", bad, tests)
    write(tmp_path / "sound", ())
    for drift, options in (("split", {}), ("none", {"experiences": "shards"})):
        config = StreamConfig(
            source="shards", path=str(folder), drift=drift, experiences=3, options=options
        )
        for access in ("indexed", "stream"):
            data = DataConfig(on_bad_sample="skip", access=access)
            config = config.model_copy(update={"path": str(folder)})
            made = create_stream(config, 1, data)
            config = config.model_copy(update={"path": str(tmp_path / "sound")})
            sound = create_stream(config, 1, DataConfig(access=access))
            for experience in made.experiences:
                for ids, out in ((experience.train, bad), (experience.test, tests)):
                    ids = np.sort(ids)
                    rows = ids & 0xFFFF
                    good = ids[~np.isin(rows, out)]
                    at = np.searchsorted(good, ids)
                    batch = made.read(ids)
                    assert batch.ids.tolist() == good[at % len(good)].tolist()
                    same = sound.read(batch.ids.numpy())
                    assert (batch.x == same.x).all() and (batch.y == same.y).all()


@pytest.mark.parametrize("access", ["indexed", "stream"])
@pytest.mark.parametrize("part", ["training", "held-out"])
def test_an_experience_without_a_sound_sample_ends_the_run(tmp_path, access, part):
    bad, tests = ((range(40, 80), ()), ((), range(10, 20)))[part == "held-out"]
    folder = write(tmp_path / "s", bad, tests)
    over = (
        "stream.options.experiences=shards",
        f"data.access={access}",
    )
    words = f"experience 2 has {40 if part == 'training' else 10} {part} samples, and not one"
    name, code, said = go(folder, tmp_path / "one", *over)
    assert (name, code) == ("DataError", 3) and words in said
    found = run_failing(folder, tmp_path / "three", *over)
    assert found["exit_code"] == 3 and words in found["reason"]


def run_failing(folder: Path, out: Path, *more: str) -> dict[str, Any]:
    codes = exit_codes(3, go, folder, out, *more)
    assert None not in codes
    return dict(json.loads((out / "status.json").read_text()))


def test_an_experience_known_to_be_bad_is_refused(tmp_path):
    folder = write(tmp_path / "s", ())
    for k in (2, 3):
        (folder / f"train-{k:03d}.tar").unlink()
    config = StreamConfig(
        source="shards",
        path=str(folder),
        drift="none",
        experiences=3,
        options={"experiences": "shards"},
    )
    with pytest.raises(DataError, match="experience 2 has no training samples"):
        create_stream(config, 0, DataConfig(on_bad_sample="skip"))


def test_bad_samples_have_no_class(tmp_path):
    """Those known to be bad count as none when classes are dealt out and weighed."""
    folder = write(tmp_path / "s", ())
    (folder / "train-000.tar").unlink()
    for drift in ("split", "label_shift"):
        config = StreamConfig(source="shards", path=str(folder), drift=drift, experiences=2)
        made = create_stream(config, 0, DataConfig(on_bad_sample="skip"))
        counts = [np.bincount(made.read(e.train).y, minlength=CLASSES) for e in made.experiences]
        assert made.info.unusable == 20
        assert (np.sum(counts, axis=0) == 25).all() if drift == "split" else counts[0].sum() == 100
