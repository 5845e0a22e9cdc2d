"""``stream.experiences``: order, columns, time, groups of a source's own, and lists of sources."""

import json

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

from distcl.config import StreamConfig
from distcl.config.load import load_config
from distcl.data.ids import column_of, info_part
from distcl.data.shards.inputs import SourceSamples
from distcl.data.sources.arrays import ArraySource
from distcl.data.sources.grouping import regrouped
from distcl.data.sources.joined import JoinedSource
from distcl.data.stream import DriftStream, create_stream
from distcl.errors import ConfigError, DataError
from distcl.types import SourceInfo, unpack_ids
from tests.files import shard_folder

N, N_TEST = 90, 30
RNG = np.random.default_rng(0)
X = RNG.random((N + N_TEST, 3), dtype=np.float32)
Y = np.arange(N + N_TEST) % 2
SITE = np.array(["ab", "a", "c"], dtype=object)[np.arange(N + N_TEST) % 3]
DAY = np.datetime64("2024-01-30") + np.arange(N + N_TEST) % 30 * 2


def source(rows, **info):
    columns = {"site": SITE[rows], "day": lambda: DAY[rows], "seconds": rows % 10 * 1e5}
    return ArraySource(X[rows], Y[rows], "here", SourceInfo(**{"columns": columns, **info}))


def stream(experiences, test=None, **info):
    train = source(np.arange(N), **info)
    held = test or source(np.arange(N, N + N_TEST), **info)
    return DriftStream(train, held, StreamConfig(experiences=experiences), 0)


def rows_of(made):
    return [
        (sorted(unpack_ids(e.train)[1].tolist()), unpack_ids(e.test)[1].tolist())
        for e in made.experiences
    ]


def parts(groups):
    """Rows of train and of test, by the sorted values of [N + N_TEST]."""
    return [
        (np.flatnonzero(groups[:N] == v).tolist(), np.flatnonzero(groups[N:] == v).tolist())
        for v in sorted(set(groups))
    ]


def test_experiences_are_values_of_a_column_periods_of_time_or_stretches():
    made = stream("key:site")
    assert rows_of(made) == parts(SITE)
    assert [e.name for e in made.experiences] == ["a", "ab", "c"]
    months = stream("time:month")
    assert rows_of(months) == parts(DAY.astype("datetime64[M]").astype(str))
    assert [e.name for e in months.experiences] == ["2024-01", "2024-02", "2024-03"]
    weeks = stream("time:week")
    assert [e.name for e in weeks.experiences][:2] == ["2024-W05", "2024-W06"]
    days = stream("time:day:seconds")
    assert [e.name for e in days.experiences][:3] == ["1970-01-01", "1970-01-02", "1970-01-03"]
    order = stream("order:4")
    both = np.concatenate([np.arange(N) * 4 // N, np.arange(N_TEST) * 4 // N_TEST])
    assert rows_of(order) == parts(both)
    assert all(e.train.dtype == np.int64 for e in order.experiences)


def test_groups_of_a_source_are_honoured_and_never_dropped():
    groups = np.arange(N) % 4
    with_groups = TensorDataset(torch.from_numpy(X[:N]), torch.from_numpy(Y[:N]))
    with_groups.groups = groups.tolist()
    with_groups.classes = ["no", "yes"]
    held = source(np.arange(N, N + N_TEST), groups=np.arange(N_TEST) % 4, class_names=["no", "yes"])
    made = DriftStream(with_groups, held, StreamConfig(experiences="groups"), 0)
    assert [rows[0] for rows in rows_of(made)] == [
        np.flatnonzero(groups == k).tolist() for k in range(4)
    ]
    assert made.spec.class_names == ("no", "yes")
    same = DriftStream(with_groups, held, StreamConfig(experiences=4, drift="none"), 0)
    assert rows_of(same) == rows_of(made)
    with pytest.raises(ConfigError, match=r"has 4 groups, but the stream 3 concepts.*'groups'"):
        DriftStream(with_groups, held, StreamConfig(experiences=3, drift="none"), 0)
    with pytest.raises(ConfigError, match="has groups of its own: write 'groups', or their number"):
        DriftStream(with_groups, held, StreamConfig(experiences="order:2"), 0)
    with pytest.raises(ConfigError, match=r"'groups': here has none of its own"):
        stream("groups")


@pytest.mark.parametrize(
    ("experiences", "info", "message"),
    [
        ("key:sit", {}, r"here has no column 'sit', did you mean 'site'\?; it has site, day"),
        ("key:x", {"columns": {}}, "no column 'x'; it knows of none"),
        ("time:day", {"columns": {}}, r"no column of dates; name one as 'time:day:COLUMN'"),
        ("time:day:site", {}, "'ab' of sample 0 is no date"),
        ("order:31", {}, "30 samples cannot be 31 stretches"),
    ],
)
def test_what_a_source_cannot_be_cut_by_is_named(experiences, info, message):
    with pytest.raises((ConfigError, DataError), match=message):
        stream(experiences, **info)


def test_values_that_are_missing_or_only_held_out_are_named():
    with pytest.raises(DataError, match="here has samples of 'z', which training samples have not"):
        stream("key:site", source(np.arange(9), columns={"site": np.array([*"aaaaaaaaz"], object)}))


@pytest.mark.parametrize(
    ("experiences", "column", "message"),
    [
        ("key:site", np.array([1.0, 2.0, np.nan]), "here: sample 2 has no usable 'site'"),
        ("key:site", ["a", None, "b"], "here: sample 1 has no usable 'site'"),
        ("key:site", [1, 2, [3]], "here: sample 2 has no usable 'site'"),
        ("key:site", [1, 2], "its column 'site' has 2 values; one for each of the 3 samples"),
        ("key:site", lambda: [1, 2], "its column 'site' has 2 values; one for each of the 3"),
        (
            "time:week:site",
            [1, 2, 1.7e12],
            "170+.0 of sample 2 is no date: .*are they milliseconds",
        ),
    ],
)
def test_a_column_without_a_value_for_each_sample_is_named(experiences, column, message):
    info = SourceInfo("here", columns={"site": column})
    with pytest.raises(DataError, match=message):
        regrouped(StreamConfig(experiences=experiences), [info], [3])


def test_a_list_of_sources_is_an_experience_each_with_classes_by_name(tmp_path):
    for k, n in enumerate((40, 25)):
        np.savez(tmp_path / f"{'ab'[k]}.npz", x=X[:n] + k, y=Y[:n] * (k + 1))
    made = create_stream(
        StreamConfig(
            source="arrays",
            experiences=[str(tmp_path / "a.npz"), {"path": str(tmp_path / "b.npz")}],
        ),
        0,
    )
    assert [e.name for e in made.experiences] == ["a", "b"] and made.spec.classes == 3
    sizes = [len(e.train) + len(e.test) for e in made.experiences]
    assert sizes == [40, 25]
    second = made.read(made.experiences[1].train)
    assert second.x.min() >= 1 and set(second.y.tolist()) == {0, 2}
    mixed = np.concatenate([made.experiences[1].test[:2], made.experiences[0].train[:3]])
    for k, id_ in enumerate(mixed):
        one = made.read(np.array([id_]))
        assert torch.equal(one.x[0], made.read(mixed).x[k])
    a = source(np.arange(20), class_names=["cat", "dog"])
    b = source(np.arange(20, 40), class_names=["dog", "fox"])
    both = JoinedSource([a, b], ["a", "b"])
    assert both.info.class_names == ("cat", "dog", "fox")
    dense = np.concatenate([Y[:20], Y[20:40] + 1])
    np.testing.assert_array_equal(both.info.labels, dense)
    ids = RNG.permutation(40)
    np.testing.assert_array_equal(both.read(ids).y, dense[ids])
    np.testing.assert_array_equal(both.read(ids).x, X[ids])
    with pytest.raises(ConfigError, match="some of the sources name their classes, not all"):
        JoinedSource([a, source(np.arange(9))], ["a", "b"])
    with pytest.raises(DataError, match=r"samples of here are .*, but those of here"):
        JoinedSource([a, ArraySource(X[:9, :2], Y[:9], "here")], ["a", "b"])


def test_lines_of_json_go_by_a_field(tmp_path):
    lines = [{"text": f"{k * k}" * 3, "site": "ba"[k % 2]} for k in range(60)]
    (tmp_path / "n.jsonl").write_text("\n".join(map(json.dumps, lines)))
    made = create_stream(
        StreamConfig(source="jsonl", path=str(tmp_path / "n.jsonl"), experiences="key:site"), 0
    )
    assert [e.name for e in made.experiences] == ["a", "b"]
    assert {len(e.train) + len(e.test) for e in made.experiences} == {30}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("0", "is 0, but must be at least 1"),
        ('"5"', "'5' is no number, and none of order:N"),
        ("time:moth", "none of order:N, key:COLUMN, time:year"),
        ("[]", "has one or more"),
        ('[{ pth = "a" }]', r"stream\.experiences\.pth: unknown key, did you mean 'path'"),
    ],
)
def test_a_wrong_value_of_the_key_is_named(value, message):
    with pytest.raises(ConfigError, match=message):
        load_config(None, [f"stream.experiences={value}"])


def test_shards_hold_out_of_each_class_of_each_value_of_a_key(tmp_path):
    folder = shard_folder(tmp_path / "s", [6] * 4, facts=True)
    config = StreamConfig(source="shards", path=str(folder), experiences="key:site")
    made = create_stream(config, 0)
    assert [e.name for e in made.experiences] == ["0", "1"]
    for k, e in enumerate(made.experiences):
        x = made.read(np.concatenate([e.train, e.test])).x[:, 0]
        assert sorted(x.tolist()) == list(range(k, 24, 2))
        assert sorted(made.read(e.test).y.tolist()) == [0, 1, 2]
    bare = config.model_copy(update={"path": str(shard_folder(tmp_path / "b", [6]))})
    with pytest.raises(DataError, match="sample '0000', id 0: it has no json, where 'site' would"):
        create_stream(bare, 0)


def test_texts_of_several_sources_are_no_shards(tmp_path):
    for name in "ab":
        (tmp_path / name).write_text(name * 600)
    each = [{"path": str(tmp_path / name)} for name in "ab"]
    with pytest.raises(ConfigError, match="lists several sources of texts"):
        SourceSamples(StreamConfig(source="text", experiences=each))


def test_a_field_and_a_domain_are_not_both_given(tmp_path):
    (tmp_path / "n.jsonl").write_text('{"text": "ab", "site": "a", "kind": "b"}')
    config = StreamConfig(
        source="jsonl", path=str(tmp_path / "n.jsonl"), experiences="key:site",
        options={"domain": "kind"},
    )  # fmt: skip
    with pytest.raises(ConfigError, match=r"'key:site' and stream\.options\.domain = 'kind' both"):
        create_stream(config, 0)


def test_columns_of_some_rows_are_read_when_they_are_asked_for():
    info = info_part(SourceInfo(columns={"a": lambda: 1 / 0, "b": lambda: DAY}), np.array([3, 1]))
    np.testing.assert_array_equal(column_of(info, "b"), DAY[[3, 1]])
    with pytest.raises(ZeroDivisionError):
        column_of(info, "a")


def test_texts_of_a_list_have_one_tokenizer():
    with pytest.raises(DataError, match="tokenizer of here is other, that of here is bytes"):
        JoinedSource([source(np.arange(9), tokenizer=t) for t in ("bytes", "other")], ["a", "b"])


@pytest.mark.parametrize("value", ["null", "NaN", "[1]"])
def test_a_line_without_a_usable_field_is_named(value, tmp_path):
    path = tmp_path / "n.jsonl"
    path.write_text(f'{{"text": "ab", "site": "a"}}\n{{"text": "cd", "site": {value}}}')
    with pytest.raises(DataError, match=r"n\.jsonl', line 2: 'site' is .*, no domain"):
        create_stream(StreamConfig(source="jsonl", path=str(path), experiences="key:site"), 0)


def test_own_experiences_drift_by_themselves():
    assert load_config(None, ["stream.experiences=key:a"]).stream.drift == "none"
    kept = load_config(None, ["stream.experiences=key:a", "stream.drift=noise"])
    assert kept.stream.drift == "noise" and load_config().stream.drift == "rotate"
    with pytest.raises(ConfigError, match=r"stream\.recurring needs stream\.experiences to be a"):
        load_config(None, ["stream.experiences=key:a", "stream.recurring=2"])
