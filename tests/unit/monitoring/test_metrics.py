import numpy as np
import pytest
import torch
from scipy import stats

from distcl import registry
from distcl.config import MonitorConfig
from distcl.data.sources.arrays import ArraySource
from distcl.errors import ConfigError
from distcl.losses import create_loss
from distcl.monitoring.metrics import StreamMetric, create_metric
from distcl.types import Batch, DataSpec

CLASSES, VALUES = DataSpec((6,), 4), DataSpec((6,), 0, (2,))
RNG = np.random.default_rng(0)
X = RNG.normal(size=(40, 6)) * np.array([1, 2, 3, 4, 5, 0]) + 7
Y = RNG.integers(0, 4, 40)


def metric(name, spec=CLASSES, loss="cross_entropy", **options):
    return create_metric(MonitorConfig(metric=name, options=options), spec, loss)


def batch(y=Y, x=X):
    return Batch(torch.arange(len(y)), torch.from_numpy(x), torch.from_numpy(y), len(y))


def logits(*shape):
    return torch.from_numpy(RNG.normal(size=shape))


def test_loss_error_and_accuracy_of_classes():
    z = logits(40, 4)
    wrong = (z.argmax(1).numpy() != Y).astype(float)
    np.testing.assert_array_equal(metric("error").measure(batch(), z), wrong)
    np.testing.assert_array_equal(metric("accuracy").measure(batch(), z), 1 - wrong)
    expected = create_loss("cross_entropy")(z, torch.from_numpy(Y))
    assert torch.equal(metric("loss").measure(batch(), z), expected)
    assert metric("accuracy").good == "high" and metric("error").good == "low"


def test_loss_and_error_of_a_regression_are_its_loss():
    z, y = logits(40, 2), RNG.normal(size=(40, 2))
    for name in ("loss", "error"):
        found = metric(name, VALUES, "mse").measure(batch(y), z)
        np.testing.assert_allclose(found, ((z.numpy() - y) ** 2).mean(1))


@pytest.mark.parametrize("shape", [(40, 4), (40, 4, 3)])
def test_entropy_is_that_of_the_softmax_without_labels(shape):
    z = logits(*shape)
    unlabelled = Batch(torch.arange(40), None, None, 40)
    found = metric("entropy").measure(unlabelled, z)
    expected = stats.entropy(z.softmax(1).numpy(), axis=1).reshape(40, -1).mean(1)
    np.testing.assert_allclose(found, expected, rtol=1e-12)


@pytest.mark.parametrize("samples", [4096, 10])
def test_input_distance_equals_a_dense_reference(samples):
    made = metric("input_distance", samples=samples)
    assert not made.needs_model and not made.needs_labels
    source = ArraySource(X, Y)
    ids = np.arange(5, 35)
    made.begin(source, ids)
    seen = X[ids] if samples > 30 else X[5 + np.linspace(0, 29, 10).round().astype(int)]
    scale = seen.std(0) + seen.std(0).mean()
    expected = (np.abs(X - seen.mean(0)) / scale).mean(1)
    found = made.measure(Batch(torch.arange(40), torch.from_numpy(X), None, 40), None)
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_input_distance_of_several_tensors_and_of_constant_ones():
    made = metric("input_distance")
    x = {"a": X.reshape(40, 3, 2), "b": np.ones(40)}
    source = ArraySource(x, Y)
    made.begin(source, np.arange(40))
    found = made.measure(source.read(np.arange(3)), None)
    flat = np.hstack([X, np.ones((40, 1))])
    expected = np.abs(flat - flat.mean(0)) / (flat.std(0) + flat.std(0).mean())
    np.testing.assert_allclose(found, expected.mean(1)[:3])
    made.begin(ArraySource(np.ones((4, 6)), Y[:4]), np.arange(4))
    assert made.measure(batch(Y[:2], np.ones((2, 6))), None).tolist() == [0.0, 0.0]
    tokens = ArraySource({"tokens": np.arange(8).reshape(4, 2)}, Y[:4])
    with pytest.raises(ConfigError, match="'input_distance' needs floating-point inputs"):
        made.begin(tokens, np.arange(4))


@pytest.mark.parametrize(
    ("name", "spec", "loss", "message"),
    [
        ("accuracy", VALUES, "mse", "'accuracy' needs right and wrong .* model.loss = 'mse'"),
        ("entropy", VALUES, "mse", "'entropy' needs scores of classes, but model.loss = 'mse'"),
        ("entropy", VALUES, "bce", "'entropy' needs scores of classes, but model.loss = 'bce'"),
    ],
)
def test_a_metric_that_cannot_be_of_a_regression_is_refused_by_name(name, spec, loss, message):
    with pytest.raises(ConfigError, match=message):
        metric(name, spec, loss)


@pytest.mark.parametrize("name", [part.name for part in registry.parts("metric")])
def test_every_metric_is_a_stream_metric_with_a_description(name):
    made = metric(name)
    assert isinstance(made, StreamMetric) and type(made).__doc__
    if made.needs_labels:
        with pytest.raises(ConfigError, match=f"'{name}' needs labels, but monitor.label_delay"):
            create_metric(MonitorConfig(metric=name, label_delay=-1), CLASSES, "cross_entropy")
    else:
        create_metric(MonitorConfig(metric=name, label_delay=-1), CLASSES, "cross_entropy")
