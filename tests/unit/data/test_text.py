"""Sources of token ids: what a sample is, which domain it belongs to, what is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from distcl.config import ModelConfig, StreamConfig
from distcl.data.sources.records import jsonl
from distcl.data.sources.text import text
from distcl.data.sources.tokens import Bytes
from distcl.data.stream import create_stream
from distcl.errors import ConfigError, DataError
from distcl.models import create_model

END = Bytes.end


def config(path="", experiences=1, **more):
    options = more.pop("options", {})
    return StreamConfig(
        source="text",
        path=str(path),
        drift="none",
        experiences=experiences,
        options=options,
        **more,
    )


def folder(path):
    for name, files in {"a": ["abcdefg", "hij"], "b": ["klmnopqrstuv"]}.items():
        (path / name).mkdir()
        for k, content in enumerate(files):
            (path / name / f"{k}.txt").write_text(content)
    (path / "a" / ".hidden").write_text("never read")
    return path


def samples(*sources):
    """Tokens and domain of every sample, in any order."""
    found = []
    for source in sources:
        batch = source.read(np.arange(len(source)))
        rows = batch.x if isinstance(batch.x, torch.Tensor) else batch.x["input_ids"]
        found += zip(rows.tolist(), source.info.groups.tolist(), strict=True)
    return sorted(found)


def test_documents_are_packed_one_after_the_other_with_an_end_between(tmp_path):
    train, test = text(config(folder(tmp_path), 2, test_fraction=0.3), length=4)
    assert samples(train, test) == sorted(
        [
            ([*b"abcd"], 0), ([*b"efg", END], 0), ([*b"hij", END], 0),
            ([*b"klmn"], 1), ([*b"opqr"], 1), ([*b"stuv"], 1),
        ]
    )  # fmt: skip
    assert len(test) == 2 and train.info.group_names == ("a", "b") and train.info.classes == 257
    batch = train.read(np.array([1, 0]))
    assert batch.y.dtype == torch.int64 and torch.equal(batch.x, batch.y)


def test_unpacked_documents_are_cut_one_by_one_and_padded_to_the_longest_of_a_batch(tmp_path):
    train, test = text(config(folder(tmp_path), 2, test_fraction=0.3), length=6, pack=False)
    found = [source.read(np.array([k])) for source in (train, test) for k in range(len(source))]
    assert sorted(b.y[0].tolist() for b in found) == sorted(
        [[*b"abcdef"], [ord("g"), END], [*b"hij", END], [*b"klmnop"], [*b"qrstuv"]]
    )
    batch = train.read(np.arange(len(train)))
    there = batch.x["attention_mask"] == 1
    assert batch.x["input_ids"].shape[1] == 6
    assert (batch.y[~there] == -100).all() and (batch.y[there] >= 0).all()
    assert (batch.x["input_ids"][~there] == END).all()


def test_each_domain_is_an_experience_of_its_own_name(tmp_path):
    options = {"length": 4, "domains": ["a", "b/*.txt"]}
    stream = create_stream(config(folder(tmp_path), 2, options=options, test_fraction=0.3), 0)
    assert [e.name for e in stream.experiences] == ["a", "b/*.txt"]
    assert stream.read(stream.experiences[1].train).x.min() >= ord("k")
    assert stream.spec.classes == 257 and stream.spec.y_shape == (4,)


def test_built_in_texts_are_there_and_can_be_cut_short():
    options = {"length": 32, "domains": ["python:topics", "python:library", "python:names"]}
    stream = create_stream(config("", 3, options=options | {"max_bytes": 20_000}), 0)
    sizes = [len(e.train) + len(e.test) for e in stream.experiences]
    assert all(600 < n <= 640 for n in sizes)
    assert b"LATIN SMALL LETTER" in bytes(
        t for t in stream.read(stream.experiences[2].train).x.flatten().tolist() if t < END
    )


def test_lines_of_json_are_texts_with_labels_and_domains(tmp_path):
    path = tmp_path / "d.jsonl"
    rows = [("good day", "pos", "x"), ("bad", "neg", "y"), ("fine", "pos", "x"), ("no", "neg", "y")]
    rows *= 3
    path.write_text(
        "\n\n".join(json.dumps({"text": t, "label": n, "where": d}) for t, n, d in rows)
    )
    train, test = jsonl(config(path, 2, test_fraction=0.4), label="label", domain="where", length=5)
    assert train.info.class_names == ("neg", "pos") and train.info.group_names == ("x", "y")
    assert len(train) + len(test) == 12
    batch = train.read(np.arange(len(train)))
    assert batch.y.shape == (len(train),) and batch.x["input_ids"].shape[1] == 5
    assert set(batch.y[train.info.groups == 0].tolist()) == {1}
    language, _ = jsonl(config(path), length=5)
    assert language.info.known_labels() is None and language.info.classes == 257


def refused(error, message, call, *args, **more):
    with pytest.raises(error, match=message):
        call(*args, **more)


def test_what_cannot_work_is_refused_with_its_name(tmp_path):
    path = folder(tmp_path)
    refused(ConfigError, r"2 domains \(a, b\), but the stream has 3", text, config(path, 3))
    refused(
        DataError, r"domain 'a' has 12 tokens, too few for 64", text, config(path, 2), length=64
    )
    refused(ConfigError, "length = 1: a sample needs", text, config(path, 2), length=1)
    refused(DataError, r"'nothing/\*' matches no file", text, config(path), domains=["nothing/*"])
    refused(DataError, "there is no '.*gone'", text, config(tmp_path / "gone"))
    (path / "c").mkdir()
    (path / "c" / "x.bin").write_bytes(b"\0\1")
    refused(DataError, "x.bin' is no text", text, config(path, 3), length=4)
    broken = tmp_path / "b.jsonl"
    broken.write_text('{"text": "ab"}\n{"text": 3}\n')
    refused(DataError, "line 2: 'text' is no text", jsonl, config(broken))
    broken.write_text('{"text": "ab"}\n{"tex')
    refused(DataError, r"line 2: JSONDecodeError", jsonl, config(broken))
    broken.write_text('{"text": "ab", "label": -1}\n')
    refused(DataError, "line 1: label -1 is out of range", jsonl, config(broken), label="label")


def test_a_tokenizer_file_is_used_and_one_without_an_end_is_refused(tmp_path):
    tokenizers = pytest.importorskip("tokenizers", reason="the package tokenizers is not installed")
    (tmp_path / "texts").mkdir()
    path = folder(tmp_path / "texts")
    words = {"[UNK]": 0, "abcdefg": 1, "hij": 2, "klmnopqrstuv": 3, "</s>": 4}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    made.save(str(tmp_path / "tokenizer.json"))
    more = {"length": 2, "tokenizer": str(tmp_path), "domains": ["*/*.txt"]}
    gone = {"tokenizer": str(path / "tok.json")}
    refused(ConfigError, "no file .*tok.json", text, config(path, 2), **gone)
    train, test = text(config(path, test_fraction=0.3), **more)
    assert samples(train, test) == [([1, 4], 0), ([2, 4], 0), ([3, 4], 0)]
    assert train.info.classes == 5
    refused(ConfigError, "has no token '<end>'", text, config(path), **more, end="<end>")


def test_ids_of_a_tokenizer_may_have_gaps(tmp_path):
    """The largest id counts, not how many there are: above 255 it would not fit into a byte."""
    tokenizers = pytest.importorskip("tokenizers", reason="the package tokenizers is not installed")
    (tmp_path / "texts").mkdir()
    path = folder(tmp_path / "texts")
    words = {"[UNK]": 0, "abcdefg": 300, "hij": 2, "klmnopqrstuv": 513, "</s>": 4}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    made.save(str(tmp_path / "tokenizer.json"))
    more = {"length": 2, "tokenizer": str(tmp_path), "domains": ["*/*.txt"]}
    train, test = text(config(path, test_fraction=0.3), **more)
    assert samples(train, test) == [([2, 4], 0), ([300, 4], 0), ([513, 4], 0)]
    assert train.info.classes == train.info.tokens == 514


def write(path, *lines):
    path.write_text(
        "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    )
    return config(path)


@pytest.mark.parametrize(
    ("line", "message", "more"),
    [
        ('{"text": "a\\ud800b"}', "line 2: UnicodeEncodeError", {}),
        ('{"text": "ab", "label": "\\ud800"}', "line 2: UnicodeEncodeError", {"label": "label"}),
        (f'{{"text": "ab", "label": {10**20}}}', "line 2: label 10+ is out", {"label": "label"}),
        ('{"text": "ab", "label": 1048576}', "line 2: label 1048576 is out", {"label": "label"}),
        ("[" * 100_000, "line 2: RecursionError", {}),
    ],
    ids=["text", "label", "huge", "too many", "nested"],
)  # fmt: skip
def test_a_line_that_cannot_be_a_sample_is_named(tmp_path, line, message, more):
    lines = write(tmp_path / "d.jsonl", {"text": "ab", "label": 0 if "00" in line else "a"}, line)
    refused(DataError, message, jsonl, lines, **more)


def test_a_text_that_is_its_end_alone_has_nothing_to_foretell(tmp_path):
    tokenizers = pytest.importorskip("tokenizers", reason="the package tokenizers is not installed")
    words = {"[UNK]": 0, "ab": 1, "</s>": 2}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.save(str(tmp_path / "tokenizer.json"))
    texts = [{"text": t, "label": k} for t, k in (("ab", 0), (" ", 0), ("ab", 1), ("ab ab", 1))]
    lines, more = write(tmp_path / "d.jsonl", *texts), {"tokenizer": str(tmp_path)}
    refused(DataError, "line 2: 'text' has no token but its end", jsonl, lines, **more)
    train, test = jsonl(lines, **more, label="label")  # a label can be learned all the same
    assert len(train) + len(test) == 4


def test_domains_may_be_globs_of_any_folder(tmp_path):
    path = folder(tmp_path)
    one, two = str(path / "a" / "*.txt"), "b/**/*.txt"
    train, _ = text(config("", 1, test_fraction=0.3), length=4, domains=[one])
    assert train.info.group_names == (one,)
    train, _ = text(config(path, 1, test_fraction=0.3), length=4, domains=[two])
    assert train.info.group_names == (two,)
    gone = str(path / "c" / "*.txt")
    refused(DataError, "c/.*txt' matches no file", text, config(), domains=[gone])


def test_a_domain_with_nothing_to_hold_out_is_named(tmp_path):
    path = folder(tmp_path)
    message = "domain 'a' of '.*' has only one sample, so none can be held out"
    refused(DataError, message, text, config(path, 2), length=12)
    texts = [
        {"text": "ab", "where": w, "label": k} for w, k in (("x", 0), ("x", 0), ("y", 0), ("y", 1))
    ]
    lines = write(tmp_path / "d.jsonl", *texts).model_copy(update={"experiences": 2})
    message = "domain 'y' of '.*d.jsonl' has no two samples of one label"
    refused(DataError, message, jsonl, lines, label="label", domain="where")
    one = write(tmp_path / "one.jsonl", {"text": "ab"})
    refused(DataError, "'.*one.jsonl' has only one sample", jsonl, one)


def test_what_is_read_of_a_domain_ends_with_a_whole_character(tmp_path, caplog):
    mixed = "aé€😀z".encode() * 2
    for name, content in {"0": b"abcdefgh", "1": mixed, "2": b"never read"}.items():
        (tmp_path / name).write_bytes(content)
    path = config(tmp_path, test_fraction=0.3)
    more = {"length": 40, "domains": ["."], "pack": False}
    for most in range(9, 8 + len(mixed) + 1):
        read = sorted(bytes(row[:-1]) for row, _ in samples(*text(path, **more, max_bytes=most)))
        whole = mixed[: most - 8].decode(errors="ignore").encode()
        assert read == sorted([b"abcdefgh", whole])
    refused(ConfigError, "stream.options.max_bytes: .*-1", text, path, max_bytes=-1)


def test_what_is_left_out_is_said(tmp_path, caplog):
    path = config(folder(tmp_path), 2, test_fraction=0.3)
    with caplog.at_level("INFO", "distcl"):
        text(path, length=4)
        text(path, length=4, max_bytes=11)
    assert [record.getMessage() for record in caplog.records] == [
        "[data] domain 'b': 1 of 13 tokens are left over",
        "[data] domain 'b' is cut after 11 bytes (max_bytes)",
    ]


def test_domains_are_a_list(tmp_path):
    path = folder(tmp_path)
    refused(ConfigError, "stream.options.domains: .* not 'ab'", text, config(path, 2), domains="ab")


def test_texts_that_are_cut_are_counted_and_the_longest_is_told(tmp_path, caplog):
    lines = write(tmp_path / "d.jsonl", *({"text": "a" * n} for n in (3, 5, 9)))
    with caplog.at_level("INFO", "distcl"):
        train, test = jsonl(lines, length=6)
    assert "1 of 3 texts are cut after 6 tokens" in caplog.text
    assert train.info.longest == test.info.longest == 6
    stream = create_stream(
        lines.model_copy(update={"source": "jsonl", "options": {"length": 9}}), 0
    )
    assert stream.spec.longest == 9


def test_a_decoder_shorter_than_the_longest_text_is_refused_as_it_is_made(tmp_path):
    lines = write(tmp_path / "d.jsonl", *({"text": "a" * n} for n in (3, 5, 9)))
    made = create_stream(lines.model_copy(update={"source": "jsonl"}), 0)
    for length, message in ((10, ""), (9, "length = 9, but the longest sample has 10 tokens")):
        model = ModelConfig(name="decoder", options={"length": length}), made.spec, 0
        if message:
            refused(ConfigError, message, create_model, *model)
        else:
            create_model(*model)
