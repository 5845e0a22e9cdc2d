"""Texts of Hugging Face datasets, written and read for real; skipped without the extra."""

import numpy as np
import pytest

from distcl.config import StreamConfig
from distcl.data.sources.records import hf_text, jsonl
from distcl.errors import ConfigError, DataError

datasets = pytest.importorskip("datasets", reason="the extra 'data' is not installed")
datasets.disable_progress_bars()

ROWS = {
    "text": ["good day", "bad", "so so", "fine", "no", "well"],
    "mood": [1, 0, 0, 1, 0, 1],
    "place": ["x", "x", "y", "y", "x", "y"],
    "input_ids": [[5, 7], [1, 2, 3], [9], [4, 4], [3, 3, 3, 3], [0, 1]],
}
MOODS = datasets.ClassLabel(names=["low", "high"])


def saved(folder, test=None, rows=ROWS, **features):
    made = datasets.Dataset.from_dict(rows)
    for name, kind in features.items():
        made = made.cast_column(name, kind)
    splits = {"train": made} | ({} if test is None else {"test": made.select(test)})
    datasets.DatasetDict(splits).save_to_disk(str(folder))
    return StreamConfig(source="hf_text", path=str(folder), drift="none", experiences=1)


def samples(*sources):
    found = []
    for source in sources:
        for row in range(len(source)):
            batch = source.read(np.array([row]))
            found.append((batch.x["input_ids"][0].tolist(), batch.y[0].tolist()))
    return found


def test_rows_are_the_samples_that_lines_of_json_are(tmp_path):
    config = saved(tmp_path / "d", test=[1, 4]).model_copy(update={"experiences": 2})
    train, test = hf_text(config, label="mood", domain="place", length=4)
    datasets.Dataset.from_dict(ROWS).to_json(str(tmp_path / "d.jsonl"))
    lines = StreamConfig(
        source="jsonl", path=str(tmp_path / "d.jsonl"), drift="none", experiences=2
    )
    every = samples(*jsonl(lines, label="mood", domain="place", length=4))
    assert sorted(samples(train)) == sorted(every)
    assert samples(test) == [([98, 97, 100, 256], 0), ([110, 111, 256], 0)]
    assert train.info.group_names == ("x", "y") and train.info.classes == 0
    assert (train.info.groups == [0, 0, 1, 1, 0, 1]).all() and train.info.longest == 4
    assert test.info.groups.tolist() == [0, 0]


def test_token_ids_are_taken_as_they_are_and_class_names_told(tmp_path):
    config = saved(tmp_path, mood=MOODS)
    train, test = hf_text(config, tokens="input_ids", label="mood", length=3)
    wanted = [(ids[:3], mood) for ids, mood in zip(ROWS["input_ids"], ROWS["mood"], strict=True)]
    assert sorted(samples(train, test)) == sorted(wanted)
    assert train.info.tokens == 10 and train.info.class_names == ("low", "high")


@pytest.mark.parametrize(
    ("rows", "options", "error", "message"),
    [
        (
            {},
            {"text": "txt"},
            ConfigError,
            r"no column 'txt', did you mean 'text'\?.*options\.text",
        ),
        ({}, {"tokens": "ids"}, ConfigError, r"no column 'ids'.*\(stream\.options\.tokens\)"),
        ({}, {"domain": "plce"}, ConfigError, r"'place'.*\(stream\.options\.domain\)"),
        ({}, {"test": "tst"}, ConfigError, r"no split 'tst'.*stream\.options\.test"),
        ({}, {"tokens": "input_ids", "end": "x"}, ConfigError, "they need no tokenizer"),
        ({}, {"tokens": "input_ids"}, DataError, r"train, row 2: 'input_ids' has no token but"),
        ({}, {"tokens": "text"}, DataError, r"row 0: 'text' is no list of token ids"),
        ({}, {"text": "mood"}, DataError, r"row 0: 'mood' is no text"),
        ({"text": ["a", None]}, {}, DataError, r"row 1: 'text' is no text"),
        ({"input_ids": [[1, -2]]}, {"tokens": "input_ids"}, DataError, r"row 0: .* 0 or more"),
        ({"input_ids": [[1, 2], []]}, {"tokens": "input_ids"}, DataError, r"row 1: 'input_ids'"),
        (
            {"input_ids": [[[1, 2], [3]]]},
            {"tokens": "input_ids"},
            DataError,
            r"row 0: .* 0 or more",
        ),
        (
            {"text": ["a", "b"], "mood": [1, None]},
            {"label": "mood"},
            DataError,
            r"row 1: .* is None",
        ),
        ({}, {"domain": "place"}, ConfigError, r"has 2 values of 'place' \(x, y\), but the stream"),
        ({}, {"length": 1}, ConfigError, "length = 1: a sample needs"),
    ],
)
def test_what_cannot_work_is_refused_with_its_name(rows, options, error, message, tmp_path):
    config = saved(tmp_path, rows=rows or ROWS)
    with pytest.raises(error, match=message):
        hf_text(config.model_copy(update={"options": options}), **options)


@pytest.mark.parametrize("kind", [None, "numpy", "torch"])
def test_rows_are_read_whatever_the_format_they_were_saved_in(kind, tmp_path):
    made = datasets.Dataset.from_dict(ROWS | {"text": ["x", "y"] * 3}).with_format(kind)
    made.save_to_disk(str(tmp_path))
    config = StreamConfig(source="hf_text", path=str(tmp_path), drift="none", experiences=1)
    train, test = hf_text(config, label="text")  # the same column twice
    assert sorted(samples(train, test)) == [([120, 256], 0)] * 3 + [([121, 256], 1)] * 3
    train, test = hf_text(config, tokens="input_ids", label="mood")
    assert len(train) + len(test) == 6
