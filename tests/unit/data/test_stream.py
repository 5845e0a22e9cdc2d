import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distcl.config import StreamConfig
from distcl.data.drift import Drift, Rotate
from distcl.data.sources.arrays import ArraySource
from distcl.data.stream import DriftStream, create_stream
from distcl.errors import ConfigError, DataError
from distcl.types import SourceInfo, pack_ids, unpack_ids

N, N_TEST, CLASSES = 120, 30, 6
IMAGES = np.random.default_rng(0).random((N + N_TEST, 1, 5, 5), dtype=np.float32)
LABELS = np.random.default_rng(1).permutation(np.arange(N + N_TEST) % CLASSES)


def stream(seed=0, **keys):
    keys.setdefault("experiences", 3)
    train = ArraySource(IMAGES[:N], LABELS[:N], "train")
    test = ArraySource(IMAGES[N:], LABELS[N:], "test")
    return DriftStream(train, test, StreamConfig(**keys), seed)


def rows_of(ids):
    return unpack_ids(ids)[1]


def test_an_abrupt_stream_shuffles_all_rows_in_every_experience():
    made = stream(drift="rotate")
    assert len(made) == 3 * N
    assert made.spec.x_shape == (1, 5, 5) and made.spec.classes == CLASSES
    orders = []
    for e, experience in enumerate(made.experiences):
        number, rows, test = unpack_ids(experience.train)
        assert experience.index == e and experience.name == f"rotate {e}"
        assert (number == e).all() and not test.any()
        assert sorted(rows) == list(range(N))
        orders.append(tuple(rows))
        assert np.array_equal(experience.test, pack_ids(e, np.arange(N_TEST), test=True))
    assert len(set(orders)) == 3


@pytest.mark.parametrize("keys", [{}, {"transition_fraction": 0.25}, {"samples_per_experience": 7}])
def test_the_seed_alone_decides(keys):
    def everything(seed):
        made = stream(seed, drift=["split", "affine"], **keys)
        ids = np.concatenate([e.train for e in made.experiences])
        return ids, made.read(ids).x

    first, again, other = everything(3), everything(3), everything(4)
    assert np.array_equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert not np.array_equal(first[0], other[0])


def test_reading_is_the_base_row_under_the_drift_of_its_experience():
    made = stream(drift="rotate")
    rotate = Rotate(1.0, 0, made.spec, 3)
    rng = np.random.default_rng(2)
    ids = rng.permutation(
        np.concatenate([part for e in made.experiences for part in (e.train, e.test)])
    )
    batch = made.read(ids)
    assert np.array_equal(batch.ids.numpy(), ids) and batch.total == len(ids)
    experience, rows, test = unpack_ids(ids)
    base = rows + N * test
    assert np.array_equal(batch.y.numpy(), LABELS[base])
    for e in range(3):
        here = experience == e
        expected = rotate.apply(torch.from_numpy(IMAGES[base[here]]), e, ids[here])
        assert torch.equal(batch.x[torch.from_numpy(here)], expected)


WHOLE = {
    name: stream(drift=drift, transition_fraction=gradual, severity=0.7)
    for name, drift, gradual in (
        ("abrupt", ["rotate", "noise", "blur"], 0.0),
        ("gradual", ["permute", "noise", "affine"], 0.25),
        ("split", ["split", "noise"], 0.25),
    )
}


@pytest.mark.parametrize("name", WHOLE)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_an_id_alone_determines_its_sample(name, data):
    made = WHOLE[name]
    every = np.concatenate([part for e in made.experiences for part in (e.train, e.test)])
    places = data.draw(st.lists(st.integers(0, len(every) - 1), max_size=40))
    ids = every[places]
    batch = made.read(ids)
    assert batch.x.shape == (len(ids), 1, 5, 5) and batch.y.shape == (len(ids),)
    for i, one in enumerate(ids):
        alone = made.read(np.array([one]))
        assert torch.equal(alone.x[0], batch.x[i]) and alone.y[0] == batch.y[i]


def test_reading_nothing_and_reading_a_list():
    made = stream(drift=["rotate", "noise"])
    nothing = made.read(np.empty(0, dtype=np.int64))
    assert nothing.x.shape == (0, 1, 5, 5) and nothing.y.shape == (0,) and nothing.total == 0
    ids = made.experiences[1].train[:3]
    assert torch.equal(made.read(ids.tolist()).x, made.read(ids).x)


def test_split_gives_each_experience_its_own_classes():
    made = stream(drift="split")
    seen = []
    for e in made.experiences:
        train, test = (set(made.read(part).y.tolist()) for part in (e.train, e.test))
        assert train == test and len(train) == 2
        seen += sorted(train)
    assert sorted(seen) == list(range(CLASSES))
    rows = np.concatenate([rows_of(e.train) for e in made.experiences])
    assert sorted(rows) == list(range(N))


def test_a_subset_of_each_experience():
    made = stream(drift="rotate", samples_per_experience=50)
    whole = stream(drift="rotate")
    for some, every in zip(made.experiences, whole.experiences, strict=True):
        assert np.array_equal(some.train, every.train[:50])
        assert np.array_equal(some.test, every.test)
    with pytest.raises(ConfigError, match="samples_per_experience = 121, but experience 1 has 120"):
        stream(drift="rotate", samples_per_experience=121)
    with pytest.raises(ConfigError, match="samples_per_experience = 60, but experience 1 has"):
        stream(drift="split", samples_per_experience=60)


def test_gradual_drift_fades_from_the_concept_before():
    train = ArraySource(np.random.default_rng(0).random((4000, 1, 3, 3)), np.arange(4000) % 2)
    config = StreamConfig(experiences=2, drift="rotate", transition_fraction=0.5)
    made = DriftStream(train, train, config, 0)
    ids = made.experiences[1].train
    assert len(np.unique(ids)) == 4000
    undrifted = torch.from_numpy(train._x[rows_of(ids)])
    older = (made.read(ids).x == undrifted).flatten(1).all(dim=1).numpy()
    assert not older[2000:].any()
    shares = older[:2000].reshape(10, 200).mean(axis=1)
    np.testing.assert_allclose(shares, 0.95 - 0.1 * np.arange(10), atol=0.1)
    assert not made._older[0].any()
    held_out = made.experiences[1].test
    moved = made.read(held_out).x != torch.from_numpy(train._x[rows_of(held_out)])
    assert moved.flatten(1).any(dim=1).all()


def test_gradual_split_begins_with_the_classes_before():
    made = stream(drift="split", transition_fraction=0.5)
    plain = stream(drift="split")
    for e in (1, 2):
        ids = made.experiences[e].train
        assert len(ids) == len(plain.experiences[e].train) and len(np.unique(ids)) == len(ids)
        y = made.read(ids).y.numpy()
        before = np.isin(y, plain.read(plain.experiences[e - 1].test).y.numpy())
        now = np.isin(y, plain.read(plain.experiences[e].test).y.numpy())
        assert (before ^ now).all()
        half = len(ids) // 2
        assert before[:half].mean() > 0.25 and not before[half:].any()
        assert np.array_equal(made._older[e, rows_of(ids)], before)
        assert np.array_equal(np.sort(made.experiences[e].test), np.sort(plain.experiences[e].test))


def test_gradual_split_that_needs_more_rows_than_there_are_is_refused():
    y = np.repeat([0, 1], [5, 195])
    source = ArraySource(np.arange(200.0)[:, None], y)
    config = StreamConfig(drift="split", experiences=2, transition_fraction=1.0)
    refused = []
    for seed in range(12):  # which class comes first depends on the seed
        try:
            DriftStream(source, source, config, seed)
        except ConfigError as error:
            assert "samples of experience 1 in experience 2, but there are 5" in str(error)
            refused.append(seed)
    assert 0 < len(refused) < 12


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (pack_ids(3, [0])[0], "experience 4 of 3, train row 0 of 120"),
        (pack_ids(1, [N])[0], "experience 2 of 3, train row 120 of 120"),
        (pack_ids(2, [N_TEST], test=True)[0], "experience 3 of 3, test row 30 of 30"),
        (-5, "sample -5 is not in the stream"),
    ],
)
@pytest.mark.parametrize("gradual", [0.0, 0.25])
def test_an_id_that_is_not_in_the_stream_is_named(bad, message, gradual):
    made = stream(drift="rotate", transition_fraction=gradual)
    ids = np.concatenate([made.experiences[0].train[:3], [bad]])
    with pytest.raises(DataError, match=message) as caught:
        made.read(ids)
    assert str(bad) in str(caught.value)


# -- a user's own parts ------------------------------------------------------------------------


class Plain:
    """A source without labels of its own."""

    def __init__(self, x, y):
        self.x, self.y = x, y

    def __len__(self):
        return len(self.y)

    def read(self, ids):
        return ArraySource(self.x, self.y).read(ids)


def test_a_users_source_and_drift_are_one_class_each(tmp_path, monkeypatch):
    (tmp_path / "my_parts.py").write_text(
        """
import numpy as np
from distcl.data.sources.arrays import ArraySource
from distcl.data.drift import Drift

class Invert(Drift):
    def apply(self, x, concept, ids):
        return 1 - x if concept % 2 else x

def ramps(config):
    x = np.linspace(0, 1, 40).reshape(20, 2)
    return ArraySource(x, np.arange(20) % 2), ArraySource(x[:4], np.arange(4) % 2)

def broken(config):
    return ramps(config)[0]

def not_a_drift(severity, seed, spec, experiences):
    return 3
"""
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_parts", raising=False)
    config = StreamConfig(source="my_parts:ramps", drift="my_parts:Invert", experiences=3)
    made = create_stream(config, 0)
    x = [made.read(pack_ids(e, [0, 19])).x for e in range(3)]
    assert torch.equal(x[0], x[2]) and torch.equal(x[1], 1 - x[0])
    with pytest.raises(ConfigError, match="my_parts:broken' must return two sources"):
        create_stream(config.model_copy(update={"source": "my_parts:broken"}), 0)
    with pytest.raises(ConfigError, match="my_parts:not_a_drift' is not a distcl"):
        create_stream(config.model_copy(update={"drift": "my_parts:not_a_drift"}), 0)


def test_labels_of_a_source_without_them_are_read_once():
    train, test = Plain(IMAGES[:N], LABELS[:N]), Plain(IMAGES[N:], LABELS[N:])
    made = DriftStream(train, test, StreamConfig(drift="split", experiences=3), 0)
    for mine, theirs in zip(made.experiences, stream(drift="split").experiences, strict=True):
        assert np.array_equal(mine.train, theirs.train)


class Crop(Drift):
    def apply(self, x, concept, ids):
        return x[..., :-1]


def test_a_drift_that_changes_the_shape_is_refused():
    made = stream(drift=f"{__name__}:Crop")
    with pytest.raises(ConfigError, match=r"Crop' turned x \[3, 1, 5, 5\] into \[3, 1, 5, 4\]"):
        made.read(made.experiences[1].train[:3])


# -- what does not fit together ----------------------------------------------------------------


def pytree_stream(drift, x):
    source = ArraySource(x, LABELS)
    return DriftStream(source, source, StreamConfig(drift=drift, experiences=2), 0)


def test_pytrees_split_but_several_tensors_do_not_drift():
    x = {"image": IMAGES, "length": np.arange(len(IMAGES))}
    made = pytree_stream("split", x)
    assert made.spec.x_shape == ()
    ids = np.concatenate([e.train[:3] for e in made.experiences])[::-1]
    batch = made.read(ids)
    assert batch.x["length"].tolist() == rows_of(ids).tolist()
    assert torch.equal(batch.x["image"], torch.from_numpy(IMAGES[rows_of(ids)]))
    with pytest.raises(ConfigError, match=r"stream.drift = 'noise' changes one tensor.* have 2"):
        pytree_stream("noise", x)


def test_a_pytree_of_one_tensor_drifts():
    made = pytree_stream("rotate", {"image": IMAGES})
    ids = np.concatenate([e.train[:3] for e in made.experiences])
    expected = stream(drift="rotate", experiences=2)
    assert set(made.read(ids).x) == {"image"}
    inside = ids[rows_of(ids) < N]
    assert torch.equal(made.read(inside).x["image"], expected.read(inside).x)


def test_token_ids_do_not_drift():
    with pytest.raises(
        ConfigError, match=r"'permute' needs floating-point samples, not torch.int64"
    ):
        pytree_stream("permute", {"tokens": np.arange(600).reshape(150, 4)})


def test_train_and_test_of_different_shape_are_refused():
    train, test = ArraySource(IMAGES, LABELS), ArraySource(IMAGES[:, :, 1:], LABELS)
    with pytest.raises(DataError, match=r"shape \[\(1, 5, 5\)\] but test samples \[\(1, 4, 5\)\]"):
        DriftStream(train, test, StreamConfig(), 0)


def test_a_class_without_test_samples_leaves_its_experience_empty():
    train = ArraySource(IMAGES[:8], np.repeat([0, 1], 4))
    test = ArraySource(IMAGES[:8], np.zeros(8, np.int64))
    with pytest.raises(DataError, match=r"experience \d has no test samples"):
        DriftStream(train, test, StreamConfig(drift="split", experiences=2), 0)


def test_labels_that_are_not_classes_are_refused():
    source = Plain(IMAGES, LABELS)
    source.info = SourceInfo(labels=LABELS / 2)
    with pytest.raises(DataError, match=r"labels of the train source have type float64"):
        DriftStream(source, source, StreamConfig(), 0)
    source.info = SourceInfo(labels=LABELS - 2)
    with pytest.raises(DataError, match=r"label -2 of the train source, row \d+, is negative"):
        DriftStream(source, source, StreamConfig(), 0)


def test_what_a_source_says_of_itself_chooses_its_samples():
    n = len(LABELS)
    usable, groups = np.arange(n) % 3 > 0, np.arange(n) * 2 // n
    source, config = Plain(IMAGES, LABELS), StreamConfig(drift="none", experiences=2)
    names = tuple(f"class {k}" for k in range(LABELS.max() + 1))
    source.info = SourceInfo(
        labels=lambda: LABELS, class_names=names, usable=lambda: usable, groups=groups
    )
    made = DriftStream(source, Plain(IMAGES, LABELS), config, 0)
    assert made.spec.class_names == names and made.info.unusable == (~usable).sum()
    for e, experience in enumerate(made.experiences):
        rows = np.sort(unpack_ids(experience.train)[1])
        assert rows.tolist() == np.flatnonzero(usable & (groups == e)).tolist()
        assert len(experience.test) == n
    source.info = {"labels": LABELS}
    with pytest.raises(ConfigError, match=r"Plain\.info is no distcl\.types\.SourceInfo"):
        DriftStream(source, source, config, 0)


@pytest.mark.parametrize(
    ("said", "says"),
    [
        ({"usable": [True, False]}, r"usable of the train source have type bool and shape \(2,\)"),
        ({"usable": np.ones(len(LABELS), int)}, r"usable .* type int64 .*; bool of shape"),
        ({"groups": [0, 1]}, r"groups of the train source .* shape \(2,\); integers of"),
        ({"groups": LABELS / 2}, "groups of the train source have type float64"),
        ({"classes": -5}, "classes of the train source are -5"),
        ({"sequential": True}, "says sequential = True, but has no method 'shards_of'"),
        ({"live_seconds": 1.0}, "says live_seconds, but has no method 'arrived'"),
    ],
)
def test_what_a_source_cannot_say_of_itself_is_named(said, says):
    source = Plain(IMAGES, LABELS)
    source.info = SourceInfo(**said)
    with pytest.raises((ConfigError, DataError), match=says):
        DriftStream(source, Plain(IMAGES, LABELS), StreamConfig(), 0)


def test_more_classes_than_a_source_says_and_what_is_no_batch_are_named():
    source = Plain(IMAGES, LABELS)
    source.info = SourceInfo(classes=2)
    made = DriftStream(source, source, StreamConfig(drift="none", experiences=1), 0)
    row = int(np.flatnonzero(LABELS >= 2)[0])
    with pytest.raises(DataError, match=f"row {row} of the train source has label {LABELS[row]}"):
        made.read(np.array([row]))
    source.read = lambda ids: (IMAGES[ids], LABELS[ids])
    with pytest.raises(DataError, match="the train source returns a tuple, not a Batch"):
        DriftStream(source, source, StreamConfig(), 0)


def test_digits_with_every_default():
    made = create_stream(StreamConfig(), 0)
    assert len(made.experiences) == 5 and made.spec.classes == 10
    assert made.read(made.experiences[4].train[:64]).x.shape == (64, 1, 8, 8)
