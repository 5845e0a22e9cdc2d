import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import r2_score

from distcl import losses
from distcl.config import ModelConfig
from distcl.errors import ConfigError
from distcl.losses import create_loss, judged_by, per_sample_error, per_sample_squares, r_squared
from distcl.priority.signals import create_signal
from distcl.types import Batch, DataSpec, Outputs

THEIR_LOSSES = """
import torch
from torch import nn

def fine(outputs, y):
    return ((outputs[:, 0] - y) ** 2)

def scalar(outputs, y):
    return fine(outputs, y).mean()

def elementwise(outputs, y):
    return (outputs - y[:, None]) ** 2

def number(outputs, y):
    return 1.0

def nested(outputs, y):
    return fine(outputs["a"], y["b"])

class Module(nn.Module):
    def forward(self, outputs, y):
        return fine(outputs, y)
"""


def randn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def theirs(tmp_path, monkeypatch):
    (tmp_path / "their_losses.py").write_text(THEIR_LOSSES)
    monkeypatch.syspath_prepend(str(tmp_path))


def test_cross_entropy_is_minus_the_log_probability_of_the_label():
    loss, z, y = create_loss("cross_entropy"), randn(5, 4), torch.tensor([0, 3, 1, 2, 2])
    wanted = -(z.exp() / z.exp().sum(1, keepdim=True)).log()[torch.arange(5), y]
    torch.testing.assert_close(loss(z, y), wanted)
    torch.testing.assert_close(loss(z, F.one_hot(y, 4).double()), wanted)
    maps, labels = randn(2, 4, 3, 3), torch.randint(0, 4, (2, 3, 3))
    per_pixel = loss(maps.movedim(1, -1).reshape(-1, 4), labels.reshape(-1))
    torch.testing.assert_close(loss(maps, labels), per_pixel.reshape(2, 9).mean(1))


def test_mse_is_the_mean_squared_difference_of_a_samples_values():
    loss, a, b = create_loss("mse"), randn(5, 6), randn(5, 2, 3, seed=1)
    wanted = (a.reshape(5, 2, 3) - b).square().mean((1, 2))
    torch.testing.assert_close(loss(a, b), wanted)
    torch.testing.assert_close(loss(a[:, :1], b[:, 0, 0]), (a[:, 0] - b[:, 0, 0]) ** 2)


def test_bce_is_the_mean_over_labels():
    loss, z = create_loss("bce"), randn(5, 3)
    y = (randn(5, 3, seed=1) > 0).long()
    p = 1 / (1 + (-z).exp())
    wanted = -(y * p.log() + (1 - y) * (1 - p).log()).mean(1)
    torch.testing.assert_close(loss(z, y), wanted)
    torch.testing.assert_close(loss(z[:, :1], y[:, 0]), loss(z[:, :1], y[:, :1]))


@pytest.mark.parametrize("name", ["mse", "bce"])
def test_targets_of_another_size_are_refused(name):
    with pytest.raises(ConfigError, match=rf"'{name}' .*shape \[5, 3\] and targets \[5\]"):
        create_loss(name)(randn(5, 3), randn(5))


def test_empty_batches_give_no_losses():
    for name in ("cross_entropy", "torch.nn.functional:cross_entropy"):
        assert create_loss(name)(randn(0, 4), torch.empty(0, dtype=torch.long)).shape == (0,)
    for name in ("mse", "bce", "torch.nn:L1Loss"):
        assert create_loss(name)(randn(0, 4), randn(0, 4)).shape == (0,)
        assert create_loss(name)(randn(0, 1), randn(0)).shape == (0,)


@pytest.mark.parametrize("name", ["torch.nn:L1Loss", "torch.nn.functional:l1_loss"])
def test_torchs_own_losses_are_used_unreduced(name):
    a, b = randn(5, 6), randn(5, 2, 3, seed=1)
    torch.testing.assert_close(create_loss(name)(a, b), (a.reshape(5, 2, 3) - b).abs().mean((1, 2)))
    torch.testing.assert_close(
        create_loss(name)(a[:, :1], b[:, 0, 0]), (a[:, 0] - b[:, 0, 0]).abs()
    )
    z, y = randn(5, 4), torch.tensor([0, 3, 1, 2, 2])
    entropy = create_loss("torch.nn:CrossEntropyLoss")(z, y)
    torch.testing.assert_close(entropy, create_loss("cross_entropy")(z, y))


def test_a_users_own_loss(theirs):
    z, y = randn(5, 1), randn(5, seed=1)
    wanted = (z[:, 0] - y) ** 2
    torch.testing.assert_close(create_loss("their_losses:fine")(z, y), wanted)
    torch.testing.assert_close(create_loss("their_losses:Module")(z, y), wanted)
    torch.testing.assert_close(create_loss("their_losses:nested")({"a": z}, {"b": y}), wanted)


@pytest.mark.parametrize(
    ("name", "outputs", "message"),
    [
        ("scalar", (5, 1), r"without unreduced form: .*shape \[5\], but returned \[\]"),
        ("scalar", (1, 1), r"without unreduced form: .*shape \[1\], but returned \[\]"),
        ("elementwise", (5, 3), r"without unreduced form: .*shape \[5\], but returned \[5, 3\]"),
        ("elementwise", (5, 5), r"without unreduced form: .*shape \[5\], but returned \[5, 5\]"),
        ("number", (5, 1), "returned float, no tensor"),
    ],
)
def test_a_loss_without_unreduced_form_is_refused(theirs, name, outputs, message):
    loss = create_loss(f"their_losses:{name}")
    with pytest.raises(ConfigError, match=f"model.loss = 'their_losses:{name}' .*{message}"):
        loss(randn(*outputs), randn(outputs[0]))


def test_an_unknown_loss_is_refused_with_the_nearest(theirs):
    with pytest.raises(ConfigError, match="unknown loss 'crossentropy', did you mean"):
        create_loss("crossentropy")
    with pytest.raises(ValueError, match="unknown loss 'mae'"):
        ModelConfig(loss="mae")
    with pytest.raises(ConfigError, match="loss 'their_losses:absent' cannot be imported"):
        create_loss("their_losses:absent")


def test_error_of_classes_is_zero_or_one():
    z = torch.tensor([[2.0, 1.0, 0.0], [0.0, 1.0, 2.0], [0.0, 3.0, 1.0]])
    y = torch.tensor([0, 1, 1])
    error = per_sample_error(z, y, "cross_entropy")
    assert error.dtype is z.dtype
    assert error.tolist() == [0.0, 1.0, 0.0]
    assert per_sample_error(z, F.one_hot(y, 3).float(), "cross_entropy").tolist() == [0, 1, 0]
    two = torch.stack([z, z], 2)  # [B, C, 2]
    labels = torch.stack([y, torch.tensor([1, 1, 1])], 1)
    assert per_sample_error(two, labels, "cross_entropy").tolist() == [0.5, 1.0, 0.0]
    assert per_sample_error(z[:0], y[:0], "cross_entropy").shape == (0,)


def test_error_of_labels_is_whether_any_is_wrong():
    z = torch.tensor([[2.0, -1.0], [0.1, -0.1], [-3.0, -1.0]])
    y = torch.tensor([[1, 0], [1, 1], [1, 1]])
    assert per_sample_error(z, y, "bce").tolist() == [0.0, 1.0, 1.0]
    assert per_sample_error(z[:, :1], y[:, 0], "bce").tolist() == [0.0, 0.0, 1.0]


@pytest.mark.parametrize("name", ["mse", "torch.nn:L1Loss"])
def test_error_of_a_regression_is_its_loss(name):
    z = randn(5, 3).requires_grad_()
    error = per_sample_error(z, randn(5, 3, seed=1), name)
    torch.testing.assert_close(error, create_loss(name)(z, randn(5, 3, seed=1)).detach())
    assert not error.requires_grad


def test_error_with_class_labels_is_zero_or_one_whatever_the_loss():
    z, y = torch.tensor([[2.0, 1.0, 0.0], [0.0, 1.0, 2.0]]), torch.tensor([0, 1])
    assert per_sample_error(z, y, "torch.nn:MultiMarginLoss").tolist() == [0.0, 1.0]


CLASSES, VALUES, ONE = DataSpec((3,), 4), DataSpec((3,), 0, (4,)), DataSpec((3,), 0)


@pytest.mark.parametrize(
    ("name", "spec", "judgement"),
    [
        ("cross_entropy", CLASSES, "accuracy"),
        ("cross_entropy", VALUES, "accuracy"),  # probabilities
        ("torch.nn:MultiMarginLoss", CLASSES, "accuracy"),
        ("bce", VALUES, "accuracy"),
        ("bce", ONE, "accuracy"),
        ("mse", ONE, "r2"),
        ("mse", VALUES, "r2"),
        ("torch.nn:L1Loss", VALUES, "r2"),
    ],
)
def test_what_a_model_is_judged_by(name, spec, judgement):
    assert judged_by(name, spec) == judgement


@pytest.mark.parametrize(
    ("name", "spec", "message"),
    [
        ("mse", CLASSES, "model.loss = 'mse' needs floating-point targets, but .* class labels"),
        ("bce", CLASSES, "model.loss = 'bce' needs floating-point targets"),
        ("cross_entropy", ONE, r"'cross_entropy' needs class labels, but .* of shape \[\]"),
        ("cross_entropy", DataSpec((3,), 0, (1,)), r"needs class labels, but .* of shape \[1\]"),
    ],
)
def test_a_loss_that_does_not_fit_the_targets_is_refused(name, spec, message):
    with pytest.raises(ConfigError, match=message):
        judged_by(name, spec)


@pytest.mark.parametrize("shape", [(50,), (50, 1), (50, 3), (50, 2, 2)])
def test_r2_equals_scikit_learns_weighted_by_variance(shape):
    y, z = randn(*shape), randn(*shape, seed=1)
    values = r_squared(per_sample_squares(z.reshape(50, -1), y))
    table = y.reshape(50, -1), z.reshape(50, -1)
    expected = r2_score(*table, multioutput="variance_weighted")
    assert abs(values - expected) < 1e-12
    assert r_squared(per_sample_squares(y.reshape(50, -1), y)) == 1.0


def test_r2_of_constant_targets_and_of_outputs_that_do_not_fit():
    y = torch.full((4,), 2.0)
    assert r_squared(per_sample_squares(y, y)) == 1.0
    assert r_squared(per_sample_squares(y + 1, y)) == 0.0
    assert per_sample_squares(y[:0], y[:0]).shape == (0, 2)
    with pytest.raises(ConfigError, match="R² needs one output per target"):
        per_sample_squares(torch.zeros(4, 2), y)
    with pytest.raises(ConfigError, match="R² needs outputs and targets that are one tensor"):
        per_sample_squares({"a": y}, y)


TOKENS = torch.tensor([[3, 1, 2, 0], [2, 2, -100, -100]])


def reference(logits: torch.Tensor, y: torch.Tensor, shift: int) -> torch.Tensor:
    """Mean over a sample's own positions, one by one; outputs [B, T, V]."""
    found = []
    for z, t in zip(logits, y, strict=True):
        pairs = [(z[k], t[k + shift]) for k in range(len(t) - shift) if t[k + shift] != -100]
        found.append(torch.stack([-(a.log_softmax(0)[b]) for a, b in pairs]).mean())
    return torch.stack(found)


def test_losses_of_several_positions_are_the_mean_over_those_that_count():
    torch.manual_seed(0)
    logits = torch.randn(2, 4, 5, dtype=torch.float64)
    torch.testing.assert_close(losses.next_token(logits, TOKENS), reference(logits, TOKENS, 1))
    expected = reference(logits, TOKENS, 0)
    torch.testing.assert_close(losses.cross_entropy(logits, TOKENS), expected)
    torch.testing.assert_close(losses.cross_entropy(logits.movedim(-1, 1), TOKENS), expected)
    assert losses.count_positions("next_token", TOKENS).tolist() == [3, 1]
    assert losses.count_positions("cross_entropy", TOKENS).tolist() == [4, 2]
    assert losses.count_positions("cross_entropy", torch.tensor([1, 2])).tolist() == [1, 1]


def test_padding_changes_neither_loss_nor_error_nor_entropy():
    torch.manual_seed(0)
    logits = torch.randn(2, 4, 5, dtype=torch.float64)
    for loss in ("next_token", "cross_entropy"):
        both = losses.per_sample_error(logits, TOKENS, loss)
        alone = losses.per_sample_error(logits[1:, :2], TOKENS[1:, :2], loss)
        torch.testing.assert_close(both[1:], alone)
        for name in ("entropy", "fisher"):
            signal = create_signal(name, loss=loss, classes=5)
            batch = Batch(torch.arange(2), TOKENS, TOKENS, 2)
            scores = signal.score(batch, Outputs(torch.zeros(2), logits), None)
            short = Batch(torch.arange(1), TOKENS[1:, :2], TOKENS[1:, :2], 1)
            one = signal.score(short, Outputs(torch.zeros(1), logits[1:, :2]), None)
            torch.testing.assert_close(scores[1:], one)
            p = logits[0, : 4 - (loss == "next_token")].softmax(-1)
            each = -(p * p.log()).sum(-1) if name == "entropy" else (p * (1 - p)).sum(-1)
            torch.testing.assert_close(scores[0], each.mean())


def test_as_many_tokens_to_foretell_as_there_are_kinds_of_them_are_no_riddle():
    """Of next_token the classes are always last, also where both dimensions are as long."""
    logits, y = randn(2, 6, 5), torch.tensor([[3, 1, 2, 0, 4, 4], [2, 2, 1, -100, -100, -100]])
    error = per_sample_error(logits, y, "next_token")
    guesses = logits.argmax(-1)
    wanted = [(guesses[b, : n - 1] != y[b, 1:n]).double().mean() for b, n in ((0, 6), (1, 3))]
    torch.testing.assert_close(error, torch.stack(wanted))
    flat, gather = losses.one_by_one(logits, y, "next_token")
    p = logits[:, :-1].softmax(-1)
    each = -(p * p.log()).sum(-1)
    found = gather(-(flat.softmax(-1) * flat.log_softmax(-1)).sum(-1))
    torch.testing.assert_close(found, torch.stack([each[0].mean(), each[1, :2].mean()]))


@pytest.mark.parametrize(
    ("outputs", "y", "loss", "message"),
    [
        ((2, 5), (2, 4), "cross_entropy", r"outputs have shape \[2, 5\] and targets \[2, 4\]"),
        ((2, 4, 4), (2, 4), "cross_entropy", "could be the second dimension or the last"),
        ((2, 3, 5), (2, 4), "next_token", r"needs outputs \[B, T, V\] for tokens \[B, T\]"),
        ((2, 5), (2,), "next_token", r"needs outputs \[B, T, V\]"),
    ],
)
def test_labels_that_do_not_fit_the_outputs_are_refused(outputs, y, loss, message):
    with pytest.raises(ConfigError, match=message):
        losses.create_loss(loss)(torch.zeros(outputs), torch.zeros(y, dtype=torch.int64))
