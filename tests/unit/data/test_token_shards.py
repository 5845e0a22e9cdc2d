"""Texts in shards: the batches of the source that they were made of, and what is refused."""

from __future__ import annotations

import io
import json
import tarfile

import numpy as np
import pytest
import torch
from torch.utils._pytree import tree_leaves

from distcl.config import DataConfig, StreamConfig
from distcl.data.shards.index import index_folder, index_path, verify_folder
from distcl.data.shards.inputs import SourceSamples, open_samples
from distcl.data.shards.manifest import read_shards, write_manifest
from distcl.data.shards.tar import END, member_bytes
from distcl.data.shards.writer import append_shards, write_shards
from distcl.data.stream import create_stream
from distcl.errors import ConfigError, DataError

STREAM = {"drift": "none", "experiences": 2, "test_fraction": 0.3}
LINES = {
    "language, no domains": ({"length": 9}, 1),
    "language, domains": ({"length": 9, "domain": "where"}, 2),
    "labels": ({"length": 9, "label": "mood"}, 1),
    "labels and domains": ({"length": 9, "label": "mood", "domain": "where"}, 2),
}


def lines(path, number=40):
    rng = np.random.default_rng(0)
    rows = [
        {
            "text": "".join(chr(97 + c) for c in rng.integers(0, 26, 1 + k % 12)),
            "mood": ["low", "high", "mid"][k % 3],
            "where": "xy"[k % 7 > 3],
        }
        for k in range(number)
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def files(path):
    for name in "ab":
        (path / name).mkdir(parents=True)
        for k in range(4):
            (path / name / f"{k}.txt").write_text(f"{name}, {k}: " + "some words " * (k + 2))
    return path


def stream_of(config, **data):
    return create_stream(config, 0, DataConfig(**data))


def shards_config(folder, like, **options):
    return like.model_copy(update={"source": "shards", "path": str(folder), "options": options})


def same(ours, theirs):
    assert ours.spec == theirs.spec and len(ours.experiences) == len(theirs.experiences)
    assert (ours.spec.tokens, ours.spec.longest) == (theirs.spec.tokens, theirs.spec.longest)
    for e, f in zip(ours.experiences, theirs.experiences, strict=True):
        for ids, others in ((e.train, f.train), (e.test, f.test)):
            ids, others = np.asarray(ids), np.asarray(others)
            assert np.array_equal(np.sort(ids), np.sort(others))
            for some in (others[:0], others[:1], np.sort(others), others[[-1, 0, 0]]):
                a, b = ours.read(some), theirs.read(some)
                for x, y in zip(tree_leaves((a.x, a.y)), tree_leaves((b.x, b.y)), strict=True):
                    assert x.dtype == y.dtype and torch.equal(x, y)


def both_ways(config, folder, per_shard=7):
    """Write shards and compare what is read of them by index and streamed; return the manifest."""
    manifest = write_shards(SourceSamples(config), folder, per_shard)
    memory, found = stream_of(config), shards_config(folder, config)
    indexed = stream_of(found)
    same(memory, indexed)
    same(memory, stream_of(found, access="stream"))
    for e, f in zip(memory.experiences, indexed.experiences, strict=True):
        assert np.array_equal(e.train, f.train)
        assert not manifest.texts.domains or e.name == f.name
    assert verify_folder(folder)[1] == []
    return manifest


@pytest.mark.parametrize("options, experiences", LINES.values(), ids=LINES)
def test_lines_in_shards_are_what_they_are_in_memory(options, experiences, tmp_path):
    path = lines(tmp_path / "t.jsonl")
    config = StreamConfig(
        source="jsonl", path=str(path), options=options, **STREAM | {"experiences": experiences}
    )
    manifest = both_ways(config, tmp_path / "s")
    texts = manifest.texts
    assert (texts.tokens, texts.tokenizer, texts.longest, texts.packed) == (257, "bytes", 9, False)
    assert texts.domains == (["x", "y"] if "domain" in options else [])
    assert manifest.class_names == (["high", "low", "mid"] if "label" in options else [])
    with tarfile.open(tmp_path / "s" / manifest.shards[0].name) as tar:
        member = tar.extractfile("000000000.input_ids.npy")
        assert np.load(io.BytesIO(member.read())).dtype == np.uint16
    # made anew, by their archives alone, and once more as input
    for path in (tmp_path / "s").glob("*.npy"):
        path.unlink()
    again = index_folder(tmp_path / "s")[0]
    assert all(again.split(s) == manifest.split(s) for s in ("train", "test"))
    assert (again.label, again.texts) == (manifest.label, texts)
    copied = write_shards(open_samples(str(tmp_path / "s")), tmp_path / "t", 100)
    assert copied.texts == texts and copied.label == manifest.label
    same(stream_of(config), stream_of(shards_config(tmp_path / "t", config)))


@pytest.mark.parametrize("pack", [True, False])
def test_files_in_shards_are_what_they_are_in_memory(pack, tmp_path):
    options = {"length": 12, "pack": pack}
    path = str(files(tmp_path / "f"))
    config = StreamConfig(source="text", path=path, options=options, **STREAM)
    assert both_ways(config, tmp_path / "s").texts.packed is pack
    if pack:
        transforms = ["tests.unit.data.test_token_shards:turned"]
        ours = stream_of(shards_config(tmp_path / "s", config), transforms=transforms)
        theirs = stream_of(config, transforms=transforms)
        ids = theirs.experiences[1].train[:5]
        assert torch.equal(ours.read(ids).x, theirs.read(ids).x)


def turned(sample):
    return {name: v[::-1] if getattr(v, "ndim", 0) else v for name, v in sample.items()}


def test_more_is_added_only_if_it_is_of_the_same_kind(tmp_path):
    path = lines(tmp_path / "t.jsonl")
    config = StreamConfig(
        source="jsonl", path=str(path), options={"length": 9}, **STREAM | {"experiences": 1}
    )
    write_shards(SourceSamples(config), tmp_path / "s", 100)
    longer = config.model_copy(update={"options": {"length": 11}})
    assert append_shards(SourceSamples(longer), tmp_path / "s").texts.longest == 11
    domains = config.model_copy(update={"options": {"domain": "where"}, "experiences": 2})
    with pytest.raises(DataError, match=r"has texts with domains = \[\] .* to be added has \['x'"):
        append_shards(SourceSamples(domains), tmp_path / "s")
    with pytest.raises(DataError, match="has labels in 'domain', not 'cls'"):
        append_shards(SourceSamples(StreamConfig(source="digits")), tmp_path / "s")


def rewritten(folder, name="labels and domains", changes=None, **texts):
    """Make shards of one sample each; put members or words of the manifest in others' place."""
    options, experiences = LINES[name]
    config = StreamConfig(
        source="jsonl",
        path=str(lines(folder / "t.jsonl")),
        options=options,
        **STREAM | {"experiences": experiences},
    )
    manifest = write_shards(SourceSamples(config), folder / "s", 100)
    tar = folder / "s" / manifest.shards[0].name
    if changes is not None:
        with tarfile.open(tar) as file:
            members = {m.name: file.extractfile(m).read() for m in file}
        parts = {n: d for n, d in (members | changes).items() if d is not None}
        tar.write_bytes(b"".join(member_bytes(n, parts[n]) for n in sorted(parts)) + END)
        index_folder(folder / "s")
    manifest = read_shards(folder / "s")
    for key, value in texts.items():
        setattr_ = object.__setattr__
        setattr_(manifest.texts, key, value)
    write_manifest(folder / "s", manifest)
    return shards_config(folder / "s", config)


def npy(values, dtype="uint16"):
    out = io.BytesIO()
    np.save(out, np.array(values, dtype=dtype))
    return out.getvalue()


TOKENS = "000000000.input_ids.npy"
WRONG = {
    "no tokens": ({TOKENS: None}, r"sample '000000000'.* no member 'input_ids.npy' beside"),
    "too large": ({TOKENS: npy([3, 300])}, r"'000000000'.*token id 300 is not in 0…256"),
    "negative": ({TOKENS: npy([3, -1], "int8")}, "token id -1 is not in 0…256"),
    "floats": ({TOKENS: npy([3.0], "float32")}, "holds float32 of shape .* no list of token ids"),
    "too long": ({TOKENS: npy([3] * 10)}, "it has 10 tokens; 1 to 9 are needed"),
    "no npy": ({TOKENS: b"xyz"}, "member 'input_ids.npy' cannot be decoded"),
}


@pytest.mark.parametrize("access", ["indexed", "stream"])
@pytest.mark.parametrize("changes, message", WRONG.values(), ids=WRONG)
def test_a_sample_that_is_no_text_is_named(changes, message, access, tmp_path):
    stream = stream_of(rewritten(tmp_path, changes=changes), access=access)
    with pytest.raises(DataError, match=message):
        for experience in stream.experiences:
            stream.read(np.sort(experience.train))


def test_labels_domains_and_manifests_that_do_not_fit_are_refused(tmp_path):
    for number, (changes, message) in enumerate(
        [
            ({"000000000.cls": b"3"}, "its label is 3, but shards.json says at most 3 - 1"),
            ({"000000000.cls": None}, "no member 'cls' beside"),
            ({"000000000.domain": None}, "no member 'domain' beside"),
        ]
    ):
        (folder := tmp_path / f"a{number}").mkdir()
        with pytest.raises(DataError, match=rf"sample '000000000'.*{message}"):
            rewritten(folder, changes=changes)
    (tmp_path / "b").mkdir()
    config = rewritten(tmp_path / "b")
    three = config.model_copy(update={"experiences": 3})
    with pytest.raises(ConfigError, match=r"2 domains \(x, y\), but the stream has 3 experiences"):
        stream_of(three)
    index_path(tmp_path / "b" / "s" / "train-000000.tar").unlink()
    with pytest.raises(ConfigError, match=r"known by the index, and there is no '.*index.npy'"):
        stream_of(config, access="stream")
    (tmp_path / "c").mkdir()
    config = rewritten(tmp_path / "c", "language, domains", domains=["x"])
    with pytest.raises(DataError, match=r"sample 1 has domain 1, but shards.json names 1"):
        stream_of(config.model_copy(update={"experiences": 1}))
    manifest = tmp_path / "c" / "s" / "shards.json"
    manifest.write_text(
        manifest.read_text().replace('"classes": 0,\n  "dom', '"classes": 5,\n  "dom')
    )
    with pytest.raises(DataError, match=r"is damaged \(label of such texts is 'domain\*5\+cls'\)"):
        stream_of(config)
