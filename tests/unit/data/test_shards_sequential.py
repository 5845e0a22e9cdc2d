"""Shards read from front to back, through the webdataset library."""

import gzip
import json
import logging
import re
import tarfile
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from distcl.config import DataConfig, StreamConfig
from distcl.data.ids import IdRuns
from distcl.data.loader import BatchLoader
from distcl.data.replay_buffer import ReplayBuffer
from distcl.data.shards.index import index_folder, verify_folder
from distcl.data.shards.indexed import ShardSource
from distcl.data.shards.manifest import numbered, read_shards, write_manifest
from distcl.data.shards.open import shards
from distcl.data.shards.sequential import StreamedSource
from distcl.data.stream import create_stream
from distcl.errors import ConfigError, DataError
from distcl.priority.population import Dealer
from distcl.sampling.groups import Part
from distcl.sampling.sequential import LaneSampler
from tests.files import shard_folder


def streamed(folder: Path, url: str = "", **data: object) -> StreamedSource:
    manifest = read_shards(folder)
    config = DataConfig(access="stream", **data)
    return StreamedSource(folder, manifest.split("train"), config, manifest.label, url, "streamed")


@pytest.mark.parametrize("format_", [tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT])
def test_streamed_samples_are_those_of_the_index(tmp_path, format_):
    folder = shard_folder(tmp_path, [7, 1, 12], format=format_)
    ours = streamed(folder, shuffle_buffer=3)
    theirs = ShardSource(folder, read_shards(folder).split("train"), DataConfig())
    rng = np.random.default_rng(0)
    for ids in [np.arange(20), *rng.integers(0, 20, (30, 5)), np.arange(0)]:
        a, b = ours.read(ids), theirs.read(ids)
        assert torch.equal(a.x, b.x) and torch.equal(a.y, b.y) and torch.equal(a.ids, b.ids)


def test_a_weighted_pass_opens_each_shard_once_and_decodes_only_what_is_drawn(tmp_path):
    undrawn = tuple(range(0, 60, 7))
    folder = shard_folder(tmp_path / "s", [11, 14, 5, 30], bad=undrawn)
    log = tmp_path / "opened"
    config = StreamConfig(
        source="shards",
        path=str(folder),
        drift="none",
        experiences=1,
        options={"url": f"pipe:echo {{name}} >> {log}; cat {folder}/{{name}}"},
    )
    data = DataConfig(shuffle_buffer=6, lanes=3, on_bad_sample="skip")
    (folder / "test-0.tar").write_bytes((folder / "s2.tar").read_bytes())
    index_folder(folder)
    stream = create_stream(config, 0, data)
    assert stream.info.sequential and stream.experiences[0].train.tolist() == list(range(60))
    for workers in (0, 1, 2):
        plan = LaneSampler(8, window=6, seed=1)
        weights = np.random.default_rng(0).random(60)
        weights[list(undrawn)] = 0
        slices = Dealer(3, stream.lanes_of).deal(np.arange(60))
        plan.set_groups([Part(slices.ids, weights, slices, draws=90)])
        log.write_text("")
        fresh = create_stream(config, 0, data)
        fresh.info.replaced.clear()
        seen = list(BatchLoader(fresh, plan, workers=workers))
        ids = np.concatenate([batch.ids for batch in seen])
        np.testing.assert_array_equal(np.concatenate([b.x[:, 0] for b in seen]), ids)
        assert len(ids) == 90 and not fresh.info.replaced
        opened = log.read_text().split()
        at_start = ["s0.tar", "test-0.tar"]  # the shape of a sample; none is opened twice then
        assert opened[:2] == at_start
        opened = opened[2:] if workers else opened  # a worker opens its own
        assert len(opened) == len(set(opened))
        assert {"s0.tar", "s1.tar", "s3.tar"} <= set(opened)


@pytest.mark.parametrize(("drift", "read_at_start"), [("none", 1), ("split", 5)])
def test_a_stream_is_not_read_before_it_is_used_unless_experiences_go_by_class(
    tmp_path, drift, read_at_start
):
    folder = shard_folder(tmp_path / "s", [6, 6, 6, 6])
    (folder / "test-0.tar").write_bytes((folder / "s2.tar").read_bytes())
    index_folder(folder)
    log = tmp_path / "opened"
    config = StreamConfig(
        source="shards",
        path=str(folder),
        drift=drift,
        experiences=2,
        options={"url": f"pipe:echo {{name}} >> {log}; cat {folder}/{{name}}"},
    )
    stream = create_stream(config, 0, DataConfig())
    opened = set(log.read_text().split()) - ({"test-0.tar"} if read_at_start == 1 else set())
    assert len(opened) == read_at_start
    indexed = create_stream(config.model_copy(update={"options": {}}), 0, DataConfig())
    assert stream.spec == indexed.spec
    for mine, theirs in zip(stream.experiences, indexed.experiences, strict=True):
        assert np.asarray(mine.train).tolist() == sorted(theirs.train.tolist())
        assert mine.test.tolist() == theirs.test.tolist()
        assert isinstance(mine.train, IdRuns) == (drift == "none")


def test_a_manifest_that_denies_a_label_is_found_out(tmp_path):
    folder = shard_folder(tmp_path, [6])
    manifest = read_shards(folder)
    most = manifest.shards[0].classes - 1
    assert most == max(streamed(folder).read(np.arange(6)).y)
    shard = replace(manifest.shards[0], classes=most)
    write_manifest(folder, replace(manifest, shards=[shard]))
    with pytest.raises(
        DataError, match=rf"label is {most}, but shards.json says at most {most - 1}"
    ):
        streamed(folder).read(np.arange(6))
    assert verify_folder(folder)[1] == [
        f"shard 's0.tar': its largest label is {most} but shards.json says {most - 1}"
    ]


@pytest.mark.parametrize("world", [1, 4, 16])
def test_a_rank_keeps_48_bytes_a_sample_divided_by_the_ranks(tmp_path, world):
    """Ids, weights and draws of four million samples, of which one is read."""
    folder = shard_folder(tmp_path, [10])
    (shard,) = read_shards(folder).shards
    (folder / "s0.index.npy").unlink()
    each, n = 62_500, 4_000_000
    shards_ = [replace(shard, samples=each, name=f"s{k}.tar") for k in range(n // each)]
    test = replace(shard, split="test")
    write_manifest(folder, numbered("cls", [*shards_, replace(test, name="s0.tar")]))
    config = StreamConfig(source="shards", path=str(folder), drift="none", experiences=2)
    tracemalloc.start()
    try:
        stream = create_stream(config, 0, DataConfig(access="stream"))
        history = ReplayBuffer(stream)
        for experience in stream.experiences:
            history.add(experience.train)
        dealer = Dealer(16, stream.lanes_of, rank=1 % world, world_size=world)
        slices = [dealer.deal(ids) for ids in (stream.experiences[1].train, history.ids())]
        plan = LaneSampler(64, window=1024)
        plan.set_groups([Part(s.ids, np.ones(len(s.ids)), s, draws=len(s.ids)) for s in slices])
        plan.parts(0)
        assert [len(s.ids) for s in slices] == [n // world, 2 * n // world]
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 48 * 2 * n / world + 4e6  # the history is of both


def test_a_class_that_comes_later_is_refused(tmp_path):
    folder = shard_folder(tmp_path, [2, 2])  # labels 0, 1, and 2, 0
    later = folder / "s1.tar"
    content = later.read_bytes()
    later.unlink()
    (folder / "test-0.tar").write_bytes((folder / "s0.tar").read_bytes())
    index_folder(folder)
    config = StreamConfig(
        source="shards",
        path=str(folder),
        drift="none",
        experiences=1,
        options={"live_seconds": 1},
    )
    stream = create_stream(config, 0, DataConfig(access="stream"))
    assert stream.spec.classes == 2 and stream.arrived() == 0
    later.write_bytes(content)
    index_folder(folder)
    assert stream.arrived() == 2
    with pytest.raises(DataError, match=r"among samples 2 to 3, new .*, is a label above 1"):
        stream.grow(2)


def test_worker_processes_do_not_move_what_is_open_here(tmp_path):
    folder = shard_folder(tmp_path, [400])
    source = streamed(folder, f"pipe:cat {folder}/{{name}}", shuffle_buffer=2)
    assert source.read(np.array([0, 1])).x[:, 0].tolist() == [0, 1]
    plan = LaneSampler(50, window=4)
    slices = Dealer(1, lambda ids, lanes: ids * 0).deal(np.arange(400))
    plan.set_groups([Part(slices.ids, None, slices, draws=400)])
    seen = [batch.ids for batch in BatchLoader(source, plan, workers=1)]
    assert sorted(np.concatenate(seen).tolist()) == list(range(400))
    assert source.read(np.arange(2, 400)).x[:, 0].tolist() == list(range(2, 400))


def test_a_compressed_archive_can_be_streamed(tmp_path):
    folder = shard_folder(tmp_path, [5])
    (tmp_path / "s0.tar").write_bytes(gzip.compress((tmp_path / "s0.tar").read_bytes()))
    assert streamed(folder).read(np.array([3, 1])).x[:, 0].tolist() == [3, 1]


@pytest.mark.parametrize(
    ("url", "message"),
    [
        (
            "pipe:head -c 9000 {folder}/{{name}}",
            "s0.tar', in or after sample '000[34]': .*trunc",
        ),
        (
            # Seen as soon as the command has ended, which may be before its bytes are read.
            "pipe:head -c 8192 {folder}/{{name}}; exit 3",
            "s0.tar'(, in or after sample '000[0-4]')? cannot be read.*exit 3",
        ),
        ("{folder}/no-{{name}}", "shard 'no-s0.tar' is missing"),
        ("pipe:cat {folder}/s1.tar", "shard 's0.tar' has 2 samples but shards.json says 6 .id 2"),
        ("pipe:echo nonsense", "shard 's0.tar' is truncated, or no uncompressed tar"),
    ],
)
def test_a_stream_that_fails_names_shard_and_id_or_is_skipped(tmp_path, url, message):
    folder = shard_folder(tmp_path, [6, 2])
    where = url.format(folder=folder)
    with pytest.raises(DataError, match=message):
        streamed(folder, where).read(np.arange(6))
    if "head" in url and "exit" not in url:
        batch = streamed(folder, where, on_bad_sample="skip").read(np.arange(6))
        assert batch.ids.tolist()[:3] == [0, 1, 2] and set(batch.ids.tolist()[4:]) <= {6, 7}


def test_a_bad_sample_in_a_stream_is_named_or_replaced(tmp_path):
    folder = shard_folder(tmp_path, [4, 4], bad=(2,))
    with pytest.raises(DataError, match=r"shard 's0\.tar', sample '0002', id 2: member"):
        streamed(folder).read(np.array([1, 2]))
    batch = streamed(folder, on_bad_sample="skip").read(np.array([2, 5]))
    assert batch.ids.tolist() == [3, 5]


def config_of(folder: Path, **options: str) -> StreamConfig:
    return StreamConfig(source="shards", path=str(folder), options=options)


def test_access_is_chosen_and_the_log_says_why(tmp_path, caplog):
    folder = shard_folder(tmp_path, [6, 6])
    (tmp_path / "s1.tar").rename(tmp_path / "test.tar")
    (tmp_path / "s1.index.npy").unlink()
    index_folder(folder)
    log = logging.getLogger("distcl")
    log.propagate = True
    with caplog.at_level(logging.INFO, "distcl"):
        train, _ = shards(config_of(folder), DataConfig())
        assert type(train) is ShardSource and "indexed access" in caplog.text
        train, _ = shards(config_of(folder), DataConfig(), url=f"{folder}/{{name}}")
        assert isinstance(train, StreamedSource) and "url is given" in caplog.text
        (tmp_path / "s0.index.npy").unlink()
        train, _ = shards(config_of(folder), DataConfig())
        assert isinstance(train, StreamedSource) and "'s0.tar' has no index" in caplog.text


@pytest.mark.parametrize(
    ("data", "options", "error", "message"),
    [
        ({"verify": True}, {}, ConfigError, "data.verify needs indexed access"),
        ({}, {"experiences": "key:site"}, ConfigError, "by key or time needs indexed access"),
        ({}, {}, DataError, "there are no test shards"),
    ],
)
def test_what_a_stream_cannot_do_is_refused(tmp_path, data, options, error, message):
    folder = shard_folder(tmp_path, [6, 6])
    with pytest.raises(error, match=re.escape(message)):
        shards(config_of(folder), DataConfig(access="stream", **data), **options)


def test_a_stream_has_experiences_by_ranges_of_its_shards(tmp_path):
    folder = shard_folder(tmp_path, [6, 2, 4, 3])
    for name in ("test-0.tar", "test-1.tar"):
        (tmp_path / name).write_bytes((tmp_path / "s0.tar").read_bytes())
    index_folder(folder)
    config = config_of(folder, experiences="shards").model_copy(update={"experiences": 2})
    stream = create_stream(
        config.model_copy(update={"drift": "none"}), 0, DataConfig(access="stream")
    )
    assert [len(e.train) for e in stream.experiences] == [8, 7]


def test_indexed_access_and_a_url_do_not_go_together(tmp_path):
    folder = shard_folder(tmp_path, [6])
    assert json.loads((folder / "shards.json").read_text())["label"] == "cls"
    with pytest.raises(ConfigError, match=r"stream\.options\.url needs"):
        shards(config_of(folder), DataConfig(access="indexed"), url="x/{name}")
