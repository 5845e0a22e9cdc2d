"""Concepts that recur or change the shares of classes, and streams for regression."""

import numpy as np
import pytest
import torch
from scipy import stats

from distcl.config import StreamConfig
from distcl.config.load import load_config
from distcl.data.drift import LabelShift
from distcl.data.sources.arrays import ArraySource, arrays
from distcl.data.stream import DriftStream, create_stream
from distcl.errors import ConfigError, DataError
from distcl.types import DataSpec, pack_ids, unpack_ids

CLASSES = 5
N, N_TEST = 4000, 1000
RNG = np.random.default_rng(0)
LABELS = RNG.permutation(np.arange(N + N_TEST) % CLASSES)
X = RNG.random((N + N_TEST, 1, 3, 3), dtype=np.float32)


def stream(seed=0, y=LABELS, **keys):
    train, test = ArraySource(X[:N], y[:N]), ArraySource(X[N:], y[N:])
    return DriftStream(train, test, StreamConfig(**keys), seed)


def shares(made, ids):
    return np.bincount(made.read(ids).y.numpy(), minlength=CLASSES) / len(ids)


# -- recurring ---------------------------------------------------------------------------------


def test_concepts_recur_under_ids_of_their_own():
    made = stream(drift=["permute", "noise"], experiences=5, recurring=2)
    plain = stream(drift="permute", experiences=2)
    everything = np.concatenate([e.train for e in made.experiences])
    assert len(np.unique(everything)) == len(everything) == 5 * N
    only = stream(drift="permute", experiences=5, recurring=2)
    for e, experience in enumerate(only.experiences):
        number, rows, _ = unpack_ids(experience.train[:50])
        assert (number == e).all()
        same = plain.read(pack_ids(e % 2, rows))
        assert torch.equal(only.read(experience.train[:50]).x, same.x)


def test_a_gradual_return_fades_from_the_concept_before():
    keys = {"drift": "permute", "experiences": 4, "recurring": 2}
    made = stream(transition_fraction=0.5, **keys)
    for e in range(1, 4):
        ids = made.experiences[e].train
        x, base = made.read(ids).x, torch.from_numpy(X[unpack_ids(ids)[1]])
        undrifted = (x == base).flatten(1).all(1).numpy()
        older = undrifted if e % 2 else ~undrifted  # experience 2 returns to concept 0
        assert 0.4 < older[: N // 2].mean() < 0.6 and not older[N // 2 :].any()
        assert older[: N // 10].mean() > 0.8


@pytest.mark.parametrize("recurring", [1, 7])
def test_one_concept_never_changes_and_more_than_there_are_experiences_never_recur(recurring):
    keys = {"drift": "permute", "experiences": 3, "transition_fraction": 0.25}
    made, plain = stream(recurring=recurring, **keys), stream(**keys)
    ids = made.experiences[2].train[:40]
    base = torch.from_numpy(X[unpack_ids(ids)[1]])
    if recurring == 1:
        assert torch.equal(made.read(ids).x, base) and not made._older.any()
    else:
        assert torch.equal(made.read(ids).x, plain.read(ids).x)


def test_split_deals_its_classes_over_the_concepts_that_recur():
    made = stream(drift="split", experiences=4, recurring=2)
    seen = [set(made.read(e.test).y.tolist()) for e in made.experiences]
    assert seen[0] == seen[2] and seen[1] == seen[3]
    assert seen[0] | seen[1] == set(range(CLASSES)) and not seen[0] & seen[1]


# -- label shift -------------------------------------------------------------------------------


def test_label_shift_draws_another_prior_for_each_concept_held_out_samples_too():
    made = stream(drift="label_shift", experiences=6)
    assert len(made.experiences[0].train) == N
    priors = []
    for e in made.experiences[1:]:
        assert len(np.unique(e.train)) == len(e.train) >= N / CLASSES
        train, test = shares(made, e.train), shares(made, e.test)
        np.testing.assert_allclose(train, test, atol=0.02)
        assert abs(train - 1 / CLASSES).max() > 0.05
        priors.append(tuple(train))
    assert len(set(priors)) == 5


def test_listed_priors_are_met_by_the_largest_set_without_repetition():
    priors = [[1, 1, 1, 1, 1], [4, 2, 1, 1, 0], [0, 0, 0, 0, 9]]
    options = {"label_shift": {"priors": priors}}
    made = stream(drift="label_shift", experiences=3, drift_options=options)
    counts = [np.bincount(made.read(e.train).y, minlength=CLASSES) for e in made.experiences]
    total = np.bincount(LABELS[:N])
    np.testing.assert_allclose(counts[0], total.min(), atol=1)
    np.testing.assert_allclose(counts[1], total[0] * np.array([1, 0.5, 0.25, 0.25, 0]), atol=1)
    assert counts[2].tolist() == [0, 0, 0, 0, total[4]]


def test_drawn_priors_are_dirichlet_and_rows_of_a_class_equally_likely():
    spec, labels = DataSpec((2,), 2), np.arange(2000) % 2
    first, kept = [], np.zeros(2000)
    for seed in range(300):
        mask = LabelShift(1.0, seed, spec, 2).members(labels, 1)
        ones = int(mask[labels == 1].sum())
        first.append(ones / mask.sum())
        kept += mask
    assert stats.kstest(first, "uniform").pvalue > 0.01  # Dirichlet(1, 1)
    for label in (0, 1):
        counts = kept[labels == label]
        p = counts.mean() / 300
        assert abs(counts.std() / np.sqrt(300 * p * (1 - p))) < 1.5


def test_label_shift_is_decided_by_the_seed_and_scaled_by_severity():
    labels = LABELS[:N]
    spec = DataSpec((2,), CLASSES)

    def mask(seed, severity=1.0, concept=1):
        return LabelShift(severity, seed, spec, 3).members(labels, concept)

    assert np.array_equal(mask(1), mask(1)) and not np.array_equal(mask(1), mask(2))
    assert mask(1, severity=0.0).all() and mask(1, concept=0).all()
    sizes = [np.mean([mask(s, severity).mean() for s in range(30)]) for severity in (0.01, 0.3, 3)]
    assert sizes[0] > 0.75 and sizes == sorted(sizes, reverse=True)


def test_label_shift_goes_with_other_drifts_and_recurs():
    made = stream(drift=["label_shift", "permute"], experiences=4, recurring=2)
    np.testing.assert_allclose(
        shares(made, made.experiences[1].train), shares(made, made.experiences[3].train)
    )
    ids = made.experiences[3].train[:20]
    assert not torch.equal(made.read(ids).x, torch.from_numpy(X[unpack_ids(ids)[1]]))


def test_gradual_label_shift_moves_from_one_prior_to_the_next():
    priors = [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 1, 1]]
    made = stream(
        drift="label_shift",
        experiences=3,
        transition_fraction=1.0,
        samples_per_experience=400,
        drift_options={"label_shift": {"priors": priors}},
    )
    for e in (1, 2):
        ids = made.experiences[e].train
        assert len(np.unique(ids)) == len(ids)
        before, now = (np.array(priors[k]) / sum(priors[k]) for k in (e - 1, e))
        for part, share in zip(np.array_split(ids, 4), (7 / 8, 5 / 8, 3 / 8, 1 / 8), strict=True):
            wanted = share * before + (1 - share) * now
            np.testing.assert_allclose(shares(made, part), wanted, atol=0.13)


@pytest.mark.parametrize(
    ("priors", "message"),
    [
        ([[1, 1, 1, 1, 1]], r"must have 3 lists \(concepts\) of 5 numbers .* shape \[1, 5\]"),
        ([[1, 1]] * 3, r"shape \[3, 2\]"),
        ("even", "must be lists of numbers"),
        ([[1, 1, 1, 1, 1], [1], [1]], "must be lists of numbers"),
        ([[1, 1, 1, 1, -1]] * 3, "weights must be at least 0"),
        ([[0, 0, 0, 0, 0]] * 3, "not all 0 in one concept"),
        ([[1, 1, 1, 1, float("nan")]] * 3, "weights must be at least 0"),
    ],
)
def test_wrong_priors_are_named(priors, message):
    with pytest.raises(ConfigError, match=message) as caught:
        stream(
            drift="label_shift", experiences=3, drift_options={"label_shift": {"priors": priors}}
        )
    assert "stream.drift_options.label_shift.priors" in str(caught.value)


def test_drift_options_come_from_toml_and_must_belong_to_a_drift(tmp_path):
    path = tmp_path / "c.toml"
    path.write_text(
        "[stream]\ndrift = 'label_shift'\n[stream.drift_options.label_shift]\npriors = [[1, 2]]\n"
    )
    assert load_config(path).stream.drift_options == {"label_shift": {"priors": [[1, 2]]}}
    with pytest.raises(ConfigError, match=r"'label_shift' is not in stream\.drift = 'rotate'"):
        load_config(path, ["stream.drift=rotate"])
    with pytest.raises(ConfigError, match="drift 'rotate' has no option 'angle'"):
        stream(drift="rotate", drift_options={"rotate": {"angle": 3}})


# -- regression --------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (2,), (2, 3)])
@pytest.mark.parametrize("dtype", ["f4", "f8"])
def test_floating_point_y_makes_a_stream_for_regression(shape, dtype):
    y = RNG.random((N + N_TEST, *shape)).astype(dtype)
    made = stream(y=y, drift=["permute", "noise"], experiences=2, transition_fraction=0.25)
    assert made.spec == DataSpec((1, 3, 3), 0, shape)
    ids = np.concatenate([made.experiences[1].train[:30], made.experiences[0].test[:5]])
    _, rows, test = unpack_ids(ids)
    batch = made.read(ids)
    np.testing.assert_array_equal(batch.y.numpy(), y[rows + N * test])
    assert batch.y.numpy().dtype == dtype


@pytest.mark.parametrize("drift", ["split", "label_shift"])
def test_schedules_by_class_are_refused_by_name_in_regression(drift):
    y = RNG.random(N + N_TEST)
    with pytest.raises(ConfigError, match=rf"stream\.drift = '{drift}' needs class labels"):
        stream(y=y, drift=drift)


def test_regression_arrays_hold_out_a_share_and_name_bad_rows(tmp_path):
    path = tmp_path / "r.npz"
    x, y = RNG.random((50, 3)), RNG.random((50, 2))
    np.savez(path, x=x, y=y)
    config = StreamConfig(source="arrays", path=str(path), drift="permute", test_fraction=0.2)
    train, test = arrays(config)
    assert (len(train), len(test)) == (40, 10) and train.labels is None
    found = np.concatenate([s.read(np.arange(len(s))).y.numpy() for s in (train, test)])
    assert sorted(map(tuple, found)) == sorted(map(tuple, y))
    assert create_stream(config, 0).spec == DataSpec((3,), 0, (2,))
    for bad, message in ((y[:49], "x has 50 samples but y has 49"), (y[:, :0], "has shape")):
        np.savez(path, x=x, y=bad)
        with pytest.raises(DataError, match=message):
            arrays(config)
    y[7, 1] = np.inf
    np.savez(path, x=x, y=y)
    with pytest.raises(DataError, match=r"r\.npz': y has a value that is NaN or infinite at row 7"):
        arrays(config)


def test_a_source_without_labels_attribute_is_known_by_the_type_of_y():
    class Plain:
        def __init__(self, source):
            self.source = source

        def __len__(self):
            return len(self.source)

        def read(self, ids):
            return self.source.read(ids)

    floats, ints = ArraySource(X[:9], RNG.random(9)), ArraySource(X[:9], np.arange(9) % 2)
    config = StreamConfig(drift="none")
    assert DriftStream(Plain(floats), Plain(floats), config, 0).spec == DataSpec((1, 3, 3), 0)
    with pytest.raises(DataError, match="one of training and test samples has class labels"):
        DriftStream(Plain(floats), Plain(ints), config, 0)
    wide = ArraySource(X[:9], RNG.random((9, 2)))
    with pytest.raises(
        DataError, match=r"training targets have shape \(\) but test targets \(2,\)"
    ):
        DriftStream(Plain(floats), Plain(wide), config, 0)
