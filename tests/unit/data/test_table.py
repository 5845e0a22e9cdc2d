"""Rows of CSV and Parquet as samples: columns, classes, standardizing, and what is refused."""

import datetime
from itertools import pairwise

import numpy as np
import pytest

from distcl.config import DataConfig, StreamConfig
from distcl.data.stream import create_sources, create_stream
from distcl.errors import ConfigError, DataError
from distcl.types import unpack_ids

pd = pytest.importorskip("pandas", reason="the extra 'table' is not installed")

N = 240
RNG = np.random.default_rng(0)
START = datetime.datetime(2024, 1, 1)
ROWS = pd.DataFrame(
    {
        "when": [(START + datetime.timedelta(hours=9 * k)).isoformat() for k in range(N)],
        "heat": RNG.normal(20, 4, N).round(3),
        "site": [("north", "south", "7")[k % 3] for k in range(N)],
        "load": RNG.integers(0, 90, N),
        "state": [("ok", "hot")[k % 2] for k in range(N)],
    }
).sample(frac=1, random_state=0)


def write(folder, frame=ROWS, name="rows.csv"):
    path = folder / name
    if path.suffix == ".parquet":
        pytest.importorskip("pyarrow", reason="the extra 'table' is not installed")
        frame.to_parquet(path)  # its index is no column
    else:
        frame.to_csv(path, index=False)
    return str(path)


def config(path, experiences="time:month", test_fraction=0.2, **options):
    base = {"target": "state", "time": "when", "categories": ["site"]}
    options = {k: v for k, v in (base | options).items() if v is not None}
    return StreamConfig(
        source="table",
        path=path,
        options=options,
        experiences=experiences,
        test_fraction=test_fraction,
    )


def sources(path, **keys):
    return create_sources(config(path, **keys), DataConfig())


def everything(source):
    return source.read(np.arange(len(source)))


@pytest.mark.parametrize("name", ["rows.csv", "rows.parquet", "rows.csv.gz", "rows.tsv"])
def test_x_is_standardized_over_training_rows_and_categories_are_one_hot(tmp_path, name):
    path = write(tmp_path, name=name)
    if name == "rows.tsv":
        ROWS.to_csv(path, index=False, sep="\t")
    train, test = sources(path)
    dense = ROWS.sort_values("when", kind="stable")
    hot = np.stack([dense["site"] == v for v in ("7", "north", "south")], 1)
    x = np.concatenate([dense[["heat"]], hot, dense[["load"]]], 1).astype(np.float64)
    y = (dense["state"] == "ok").to_numpy()
    # which rows are held out: of each class and month a fifth
    month = dense["when"].str[:7].to_numpy()
    held = {(m, c): sum((month == m) & (y == c)) for m in set(month) for c in (False, True)}
    assert len(test) == sum(max(1, round(0.2 * n)) for n in held.values())
    a, b = everything(train).x.numpy(), everything(test).x.numpy()
    assert a.dtype == b.dtype == np.float32 and len(a) + len(b) == N
    np.testing.assert_allclose(a[:, [0, 4]].mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(a[:, [0, 4]].std(0), 1, atol=1e-5)
    assert abs(b[:, [0, 4]].mean(0)).max() > 1e-3
    # undo it by a dense reference: the rows that are in train
    found = rows_of(a, b, x)
    mean, deviation = x[found[0]][:, [0, 4]].mean(0), x[found[0]][:, [0, 4]].std(0)
    for part, at in zip((a, b), found, strict=True):
        np.testing.assert_allclose(
            part[:, [0, 4]], (x[at][:, [0, 4]] - mean) / deviation, atol=1e-5
        )
        np.testing.assert_array_equal(part[:, 1:4], x[at][:, 1:4])
        assert (np.diff(at) > 0).all()  # in order of time
    for source, at in zip((train, test), found, strict=True):
        np.testing.assert_array_equal(everything(source).y.numpy(), y[at])
    assert train.info.class_names == ("hot", "ok")


def rows_of(a, b, x):
    """The rows of x that are in a and in b: ranks of a column survive standardizing."""
    both = np.concatenate([a, b])[:, 0].astype(np.float64)
    order = np.empty(len(x), dtype=int)
    order[np.argsort(both, kind="stable")] = np.argsort(x[:, 0], kind="stable")
    return order[: len(a)], order[len(a) :]


def test_months_are_experiences_in_order_whatever_the_order_of_the_rows(tmp_path):
    stream = create_stream(config(write(tmp_path)), 0)
    names = [e.name for e in stream.experiences]
    assert names == ["2024-01", "2024-02", "2024-03"]
    months = pd.Series(ROWS["when"]).str[:7].value_counts()
    for e in stream.experiences:
        assert len(e.train) + len(e.test) == months[e.name]
    assert stream.spec.class_names == ("hot", "ok")
    weeks = create_stream(config(write(tmp_path), "time:week"), 0)
    iso = {f"{t:%G-W%V}" for t in pd.to_datetime(ROWS["when"])}
    assert [e.name for e in weeks.experiences] == sorted(iso)


def test_a_column_or_order_makes_experiences_and_is_no_feature(tmp_path):
    path = write(tmp_path)
    stream = create_stream(config(path, "key:site", categories=None), 0)
    assert [e.name for e in stream.experiences] == ["7", "north", "south"]
    assert stream.spec.x_shape == (2,)
    assert {len(e.train) + len(e.test) for e in stream.experiences} == {80}
    five = create_stream(config(path, "order"), 0)
    ends = [unpack_ids(e.train)[1] for e in five.experiences]
    assert len(ends) == 5 and all(a.max() < b.min() for a, b in pairwise(ends))
    named = create_stream(
        config(path, "time:month:when", time=None, features=["heat"], categories=None), 0
    )
    assert len(named.experiences) == 3


def test_regression_several_targets_and_files_with_a_test_set_of_their_own(tmp_path):
    for k, part in enumerate(("a", "b", "held")):
        write(tmp_path, ROWS.iloc[k * 80 : k * 80 + 80], f"{part}.csv")
    options = {"target": ["heat", "load"], "features": ["site"], "test": ["held.csv"], "time": None}
    train, test = sources(str(tmp_path), experiences="order:2", **options)
    assert (len(train), len(test)) == (160, 80)
    np.testing.assert_allclose(everything(train).y, ROWS[["heat", "load"]][:160], rtol=1e-6)
    train, test = sources(str(tmp_path), experiences="order:2", standardize_target=True, **options)
    y = ROWS[["heat", "load"]].to_numpy()
    dense = (y - y[:160].mean(0)) / y[:160].std(0)
    np.testing.assert_allclose(everything(test).y, dense[160:], atol=1e-5)
    with pytest.raises(DataError, match=r"'x\*\.csv' matches no file in .*stream\.options"):
        sources(str(tmp_path), files=["x*.csv"])
    assert sum(map(len, sources(str(tmp_path), files=["[ab].csv"]))) == 160


def test_missing_values_are_filled_by_training_rows_if_that_is_asked_for(tmp_path):
    frame = ROWS.copy()
    frame["heat"] = frame["heat"].where(np.arange(N) % 7 != 0)
    frame["site"] = frame["site"].where(np.arange(N) % 5 != 0, "?")
    path = write(tmp_path, frame)
    with pytest.raises(DataError, match=r"rows\.csv', row 1: column 'heat' is missing .*\.fill"):
        sources(path)
    train, _ = sources(path, fill="mean", standardize=False, missing=["?"])
    x = everything(train).x.numpy()
    assert x.shape[1] == 5 and (x[:, 1:4].sum(1) == 0).any()
    values, counts = np.unique(x[:, 0], return_counts=True)
    mean = values[counts.argmax()]
    np.testing.assert_allclose(x[x[:, 0] != mean, 0].mean(), mean, rtol=1e-5)
    train, _ = sources(path, fill=-1, standardize=False, missing=["?"])
    assert (everything(train).x[:, 0] == -1).any()


def test_classes_are_numbered_where_that_is_asked_for(tmp_path):
    frame = ROWS.assign(state=np.where(np.arange(N) % 2, -1, 1))
    path = write(tmp_path, frame)
    with pytest.raises(ConfigError, match="a target is -1, no number of a class"):
        sources(path)
    train, _ = sources(path, task="classification")
    assert train.info.class_names == ("-1", "1") and set(everything(train).y.tolist()) == {0, 1}
    train, _ = sources(path, task="regression")
    assert set(everything(train).y.tolist()) == {-1.0, 1.0}


@pytest.mark.parametrize(
    ("change", "keys", "message"),
    [
        ({}, {"target": "stat"}, r"no column 'stat', did you mean 'state'\?.*options\.target"),
        ({}, {"categories": None}, r"row 1: column 'site' is '.*', no number"),
        ({}, {"experiences": "key:sit"}, r"no column 'sit', did you mean 'site'"),
        (
            {},
            {"time": "site", "categories": None},
            r"'site' is '.*', no date of the form ISO",
        ),
        ({}, {"time": None}, r"'time:month' needs stream\.options\.time"),
        ({"heat": np.inf}, {}, "row 1: column 'heat' is infinite"),
        ({"state": None}, {}, "row 1: column 'state' is missing"),
        ({"when": "12/24/2024"}, {}, r"'12/24/2024', no date of the form ISO"),
        ({}, {"features": ["state"], "categories": None}, "'state' is the target"),
        ({}, {"sep": ";"}, "has no option 'sep', did you mean 'separator'"),
        ({}, {"separator": ";"}, "it has when,heat,site,load,state"),
        ({}, {"fill": "median"}, r"stream\.options\.fill"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, change, keys, message):
    frame = ROWS.assign(**change)
    with pytest.raises((ConfigError, DataError), match=message):
        create_stream(config(write(tmp_path, frame), **keys), 0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "cannot be read"),
        ("a,b\n", "has no rows"),
        ("a,b\n1,2\n1,2,3\n", "cannot be read: .*line 3"),
        ("a,b\n1,2,3\n", "more fields than its header"),
        ("a,a\n1,2\n", "two columns 'a'"),
        (",a,b\n0,1,2\n", "column without a name, 0"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, text, message):
    path = tmp_path / "bad.csv"
    path.write_text(text)
    keys = {"target": "b", "time": None, "categories": None, "experiences": 1}
    with pytest.raises((ConfigError, DataError), match=rf"bad\.csv.*{message}"):
        sources(str(path), **keys)
    (tmp_path / "bad.parquet").write_text(text)
    with pytest.raises(DataError, match=r"bad\.parquet' cannot be read"):
        pytest.importorskip("pyarrow")
        sources(str(tmp_path / "bad.parquet"), **keys)


@pytest.mark.parametrize("task", ["heat", "flat"])
def test_a_constant_column_is_0_and_held_out_values_stay_near(tmp_path, task):
    write(tmp_path, ROWS.assign(flat=0.1), "a.csv")
    write(tmp_path, ROWS[:9].assign(flat=0.3), "b.csv")
    features = ["flat", "load"] if task == "heat" else ["load"]
    more = {"target": task, "features": features, "categories": None, "time": None}
    train, test = sources(
        str(tmp_path), experiences=1, test=["b.csv"], standardize_target=True, **more
    )
    of = (lambda s: everything(s).x[:, 0]) if task == "heat" else (lambda s: everything(s).y)
    assert (of(train) == 0).all()
    np.testing.assert_allclose(of(test), 0.2, rtol=1e-6)


def test_tables_of_a_list_have_the_same_columns_in_one_order(tmp_path):
    a = write(tmp_path, ROWS[["heat", "load", "state"]], "a.csv")
    b = write(tmp_path, ROWS[["load", "heat", "state"]], "b.csv")
    c = write(tmp_path, ROWS[["heat", "site", "state"]][ROWS["site"] == "7"], "c.csv")
    d = write(tmp_path, ROWS[["heat", "site", "state"]][ROWS["site"] != "7"][:120:2], "d.csv")

    def listed(*paths, **options):
        each = [{"path": p, "source": "table", "options": {"target": "state"} | options}
                for p in paths]  # fmt: skip
        return create_stream(StreamConfig(source="table", experiences=each), 0)

    with pytest.raises(DataError, match=r"b\.csv' has feature 'load' where .*a\.csv' has 'heat'"):
        listed(a, b)
    assert listed(a, b, features=["heat", "load"]).spec.x_shape == (2,)
    with pytest.raises(DataError, match=r"x \[|samples of .*d\.csv' are"):
        listed(c, d, categories=["site"])
    ROWS[["heat", "site", "state"]][ROWS["site"] == "north"].to_csv(d, index=False)
    with pytest.raises(DataError, match=r"d\.csv' has feature 'site=north' where .*'site=7'"):
        listed(c, d, categories=["site"])


def test_a_column_of_times_is_read_as_the_option_says_and_seconds_are_dates(tmp_path):
    when = pd.to_datetime(ROWS["when"])
    seconds = (when - pd.Timestamp(0)).dt.total_seconds().astype(int)
    path = write(tmp_path, ROWS.assign(when=when.dt.strftime("%d/%m/%Y"), secs=seconds))
    given = {"time": None, "features": ["heat"], "categories": None, "time_format": "%d/%m/%Y"}
    wanted = ["2024-01", "2024-02", "2024-03"]
    for how, more in (("month:when", given), ("month", {"time": "secs", "features": ["heat"]})):
        made = create_stream(config(path, f"time:{how}", **{"categories": None} | more), 0)
        assert [e.name for e in made.experiences] == wanted
    write(tmp_path, ROWS.assign(secs=seconds * 1000))
    with pytest.raises(DataError, match=r"row 1: column 'secs' is .*, are they milliseconds"):
        sources(path, time="secs", experiences="time:week", categories=None, features=["heat"])
    frame = ROWS.assign(when=when.dt.date, zone=when.dt.tz_localize("UTC"))
    packed = write(tmp_path, frame, "rows.parquet")
    for column in ("when", "zone"):
        made = create_stream(
            config(packed, f"time:month:{column}", **given | {"time_format": ""}), 0
        )
        assert [e.name for e in made.experiences] == wanted


def test_one_text_among_numbers_is_no_class_and_keys_of_files_are_one_kind(tmp_path):
    none = {"categories": None, "time": None, "experiences": 1, "features": ["load"]}
    path = write(tmp_path, ROWS.assign(heat=["?", *ROWS["heat"][1:]]))
    with pytest.raises(DataError, match=r"row 1: column 'heat' is '\?', no number, but others are"):
        sources(path, target="heat", **none)
    assert len(sources(path, target="heat", task="classification", **none)[0].info.class_names) > 9
    (tmp_path / "k").mkdir()
    for name, sites in (("a", [1, 2]), ("b", [1, "x"])):
        write(tmp_path / "k", ROWS.assign(site=sites * (N // 2)), f"{name}.csv")
    made = create_stream(config(str(tmp_path / "k"), "key:site", categories=None), 0)
    assert [e.name for e in made.experiences] == ["1", "2", "x"]


def test_lists_and_columns_of_one_name_in_parquet_are_named(tmp_path):
    path = write(tmp_path, ROWS.assign(tags=[[1, 2]] * N), "rows.parquet")
    none = {"categories": None, "time": None, "experiences": 1, "features": ["load"]}
    with pytest.raises(DataError, match=r"row 1: column 'tags' is a list"):
        sources(path, target="tags", **none)
    with pytest.raises(DataError, match="sample 0 has no usable 'tags'"):
        sources(path, **none | {"experiences": "key:tags"})
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table([[1, 2], [3, 4]], names=["a", "a"]), path)
    with pytest.raises(DataError, match=r"rows\.parquet' has two columns 'a'"):
        sources(path, target="a", **none)


def test_held_out_files_missing_numbers_and_keys_that_are_dates(tmp_path):
    (tmp_path / "k").mkdir()
    for name in "ab":
        write(tmp_path / "k", ROWS, f"{name}.csv")
    none = {"categories": None, "time": None, "features": ["load"]}
    found = sources(
        str(tmp_path / "k"), experiences=1, files=["*.csv"], test=["../k/b.csv"], **none
    )
    assert [len(s) for s in found] == [N, N]
    day = pd.to_datetime(ROWS["when"]).dt.floor("60D")
    frame = ROWS.assign(load=np.where(np.arange(N) % 3, ROWS["load"], -999), day=day)
    path = write(tmp_path, frame, "rows.parquet")
    made = create_stream(
        config(path, "key:day", missing=["-999"], fill=0, standardize=False, **none), 0
    )
    assert made.read(made.experiences[0].train).x.min() >= 0
    assert [e.name for e in made.experiences] == sorted({f"{d:%Y-%m-%d}" for d in day})
