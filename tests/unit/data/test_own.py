"""Datasets of torch's from a function of the user's: what is read, and whose fault it is."""

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset, IterableDataset

from distcl.config import StreamConfig
from distcl.data.stream import create_stream
from distcl.errors import ConfigError, DataError, UserCodeError
from distcl.types import unpack_ids

N = 60
X = torch.randn(N, 4, generator=torch.Generator().manual_seed(0))


class Rows(Dataset):
    def __init__(self, n=N, fault="", classes=()):
        self.n, self.fault = n, fault
        self.targets = [k % 3 for k in range(n)]
        if classes:
            self.classes = classes
        site = np.array(["a", "b"])[np.arange(n) // 7 % 2]
        self.columns = {"site": site, "list": site.tolist(), "ones": torch.arange(n) // 7 % 2}
        if fault in ("column", "groups"):
            self.columns["site"] = site[: -1 if fault == "column" else n]
            self.groups = None if fault == "column" else site

    def __len__(self):
        return self.n

    def __getitem__(self, k):
        if self.fault == "raises" and k == 11:
            raise KeyError("no such file")
        if self.fault == "shape" and k == 11:
            return torch.zeros(5), k % 3
        if self.fault == "lone":
            return X[k], torch.tensor([k % 3])
        if self.fault == "label":
            return X[k], k - 4
        if self.fault == "triple":
            return X[k], 0, 0
        if self.fault == "text":
            return "a text", "a label"
        return X[k], (0.5 if self.fault == "regression" else k % 3)


class Endless(IterableDataset):
    def __iter__(self):
        return iter(())


def one(**keys):
    return Rows(**keys)


def pair(held=20):
    return Rows(), Rows(held)


def stream(function, experiences=1, **options):
    options = {"dataset": f"{__name__}:{function}", **options}
    config = StreamConfig(source="torch", options=options, experiences=experiences, drift="none")
    return create_stream(config, 0)


@pytest.mark.parametrize("labels", ["", "targets"])
def test_one_dataset_holds_out_a_share_of_each_class_and_experience(labels):
    made = stream("one", "key:site", labels=labels, classes=["x", "y", "z"])
    assert [e.name for e in made.experiences] == ["a", "b"]
    assert made.spec.class_names == ("x", "y", "z") and made.spec.x_shape == (4,)
    rows = {tuple(x): k for k, x in enumerate(X.tolist())}
    seen = []
    for e in made.experiences:
        for ids in (e.train, e.test):
            batch = made.read(ids)
            at = [rows[tuple(x)] for x in batch.x.tolist()]
            assert batch.y.tolist() == [k % 3 for k in at]
            assert {"ab"[k // 7 % 2] for k in at} == {e.name}
            seen += at
    assert sorted(seen) == list(range(N))


def test_a_pair_is_train_and_held_out_and_options_are_keywords():
    made = stream("pair", "order:3", held=12)
    assert [len(e.train) for e in made.experiences] == [20] * 3
    assert [len(e.test) for e in made.experiences] == [4] * 3
    assert sorted(unpack_ids(made.experiences[0].train)[1]) == list(range(20))
    assert stream("one", fault="regression").spec.classes == 0


def test_a_list_of_one_label_is_told(caplog):
    assert stream("one", fault="lone").spec.y_shape == (1,)
    assert "Rows: y is a tensor [1], which counts as several labels" in caplog.text


def test_columns_may_be_lists_and_tensors():
    wanted = [e.train.tolist() for e in stream("one", "key:site").experiences]
    for column in ("list", "ones"):
        made = stream("one", f"key:{column}")
        assert [e.train.tolist() for e in made.experiences] == wanted


@pytest.mark.parametrize(
    ("function", "options", "error", "message"),
    [
        ("one", {"fault": "raises"}, UserCodeError, r"Rows, sample 11: KeyError: .*test_own\.py"),
        ("one", {"fault": "shape"}, DataError, r"Rows: sample 11 has shapes x \[5\], y \[\], but"),
        ("one", {"fault": "label"}, DataError, "Rows, sample 0: label -4 is out of range"),
        ("one", {"fault": "triple"}, DataError, r"a sample must be a pair \(x, y\), see sample 0"),
        ("one", {"fault": "text"}, DataError, "Rows, sample 0: y is a "),
        ("one", {"fault": "column"}, DataError, "Rows: its column 'site' has 59 values; .* 60 s"),
        (
            "one",
            {"fault": "groups"},
            DataError,
            r"Rows: its groups have shape \(60,\) and type <U1",
        ),
        ("one", {"classes": ["x", "y"]}, DataError, "sample 2: label 2 .* 2 names of classes"),
        ("one", {"labels": "target"}, ConfigError, "Rows has no attribute 'target'"),
        ("one", {"m": 3}, TypeError, "unexpected keyword"),
        ("pair", {"hold": 3}, ConfigError, "no option 'hold', did you mean 'held'.*takes: held"),
        ("Endless", {}, ConfigError, "returns a Endless; a map-style dataset"),
        ("two", {}, ConfigError, "test_own:two' cannot be imported"),
    ],
)
def test_faults_are_told_as_the_users(function, options, error, message):
    with pytest.raises(error, match=message):
        stream(function, **options)
