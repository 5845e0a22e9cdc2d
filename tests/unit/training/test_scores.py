import itertools
import math

import numpy as np
import pytest
import torch
from sklearn import metrics

from distcl.config import ModelConfig
from distcl.errors import ConfigError
from distcl.losses import create_loss
from distcl.training.priorities import held_out_errors
from distcl.training.scores import NotScored, Score, create_scores
from distcl.types import DataSpec, Outputs

CLASSES = DataSpec((4,), 5)
LABELS = DataSpec((4,), 0, (3,))
VALUES = DataSpec((4,), 0, (2,))
N = 57

THEIR_SCORES = """
import torch
from distcl.training.scores import Score

def margin(outputs, y, power=1):
    first, second = outputs.softmax(1).topk(2, dim=1).values.unbind(1)
    return (first - second) ** power

def distance(outputs, y):
    return (outputs.argmax(1) - y).abs()

distance.higher_is_better = False

def undecided(outputs, y):
    return distance(outputs, y)

undecided.higher_is_better = "no"

def scalar(outputs, y):
    return distance(outputs, y).double().mean()

def accuracy(outputs, y):
    return outputs[:, 0]

class Spread(Score):
    def rows(self, outputs, y):
        return outputs.logits

    def value(self, rows):
        return float(rows.std())

class Mean(Score):
    higher_is_better = 1

    def rows(self, outputs, y):
        return outputs.logits

class Rowless(Score):
    pass

class NoScore:
    pass

def guard(outputs, y):
    return distance(outputs, y)

def imaginary(outputs, y):
    return distance(outputs, y) * 1j
"""


@pytest.fixture
def theirs(tmp_path, monkeypatch):
    (tmp_path / "their_scores.py").write_text(THEIR_SCORES)
    monkeypatch.syspath_prepend(str(tmp_path))


def make(name, loss="cross_entropy", spec=CLASSES, **options):
    config = ModelConfig(loss=loss, score=name, score_options={name: options} if options else {})
    (score,) = create_scores(config, spec).values()
    return score


def value(score, logits, y, cuts=(0, 20, 21, N)):
    """The score of samples whose rows are measured in parts, as ranks and chunks do."""
    loss = create_loss(score.loss)
    parts = [
        score.rows(Outputs(loss(logits[a:b], y[a:b]), logits[a:b]), y[a:b])
        for a, b in itertools.pairwise(cuts)
    ]
    return score.value(torch.cat(parts).double())


def drawn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def classified():
    logits, y = drawn(N, 5), torch.randint(0, 5, (N,), generator=torch.Generator().manual_seed(1))
    logits[:20] = (logits[:20] * 2).round() / 2  # ties
    return logits, y


def labelled():
    return drawn(N, 3), (drawn(N, 3, seed=1) > 0.3).double()


LOG_LOSS = {
    "loss": lambda mean: mean,
    "perplexity": math.exp,
    "bits_per_byte": lambda mean: mean / math.log(2),
}


@pytest.mark.parametrize("name", LOG_LOSS)
def test_scores_of_the_loss_equal_scikit_learns_log_loss(name):
    logits, y = classified()
    mean = metrics.log_loss(y, logits.softmax(1), labels=range(5))
    score = make(name)
    assert value(score, logits, y) == pytest.approx(LOG_LOSS[name](mean), rel=1e-12)
    assert not score.higher_is_better
    assert score.chance() == pytest.approx(LOG_LOSS[name](math.log(5)))
    assert score.error(LOG_LOSS[name](0.7)) > score.error(LOG_LOSS[name](0.6)) > 0


@pytest.mark.parametrize("k", [1, 2, 5])
def test_top_k_equals_scikit_learns(k):
    logits, y = drawn(N, 5), classified()[1]
    wanted = metrics.top_k_accuracy_score(y, logits, k=k, labels=range(5)) if k < 5 else 1.0
    assert value(make("top_k", k=k), logits, y) == pytest.approx(wanted, abs=1e-12)
    assert make("top_k", k=k).chance() == k / 5


@pytest.mark.parametrize("kept", [range(5), range(1, 4)])
def test_f1_and_auroc_equal_scikit_learns(kept):
    logits, y = classified()
    y = torch.tensor(list(kept))[y % len(kept)]  # some classes may not occur
    wanted = metrics.f1_score(y, logits.argmax(1), average="macro")
    assert value(make("f1_macro"), logits, y) == pytest.approx(wanted, abs=1e-12)
    each = [metrics.roc_auc_score(y == c, logits.softmax(1)[:, c]) for c in kept]
    assert value(make("auroc"), logits, y) == pytest.approx(np.mean(each), abs=1e-12)


def test_of_binary_labels_f1_and_auroc_are_means_over_labels():
    logits, y = labelled()
    f1, auroc = (make(name, "bce", LABELS) for name in ("f1_macro", "auroc"))
    wanted = metrics.f1_score(y, logits > 0, average="macro")
    assert value(f1, logits, y) == pytest.approx(wanted, abs=1e-12)
    wanted = metrics.roc_auc_score(y, logits, average="macro")
    assert value(auroc, logits, y) == pytest.approx(wanted, abs=1e-12)


def test_accuracy_and_r2_are_those_of_scikit_learn():
    logits, y = classified()
    assert value(make("accuracy"), logits, y) == metrics.accuracy_score(y, logits.argmax(1))
    outputs, targets = drawn(N, 2), drawn(N, 2, seed=1)
    wanted = metrics.r2_score(targets, outputs, multioutput="variance_weighted")
    assert value(make("r2", "mse", VALUES), outputs, targets) == pytest.approx(wanted, abs=1e-12)
    assert list(create_scores(ModelConfig(), CLASSES)) == ["accuracy"]
    assert list(create_scores(ModelConfig(loss="mse"), VALUES)) == ["r2"]
    assert list(create_scores(ModelConfig(loss="bce"), LABELS)) == ["accuracy"]


def test_each_token_counts_once_whichever_sample_it_is_of_and_those_left_out_never():
    lengths = torch.tensor([1, 6, 3, 0, 2])
    logits, y = drawn(5, 4, 6), torch.randint(0, 4, (5, 6), generator=torch.manual_seed(0))
    valid = torch.arange(6) < lengths[:, None]
    y = y.where(valid, torch.tensor(-100))
    flat, labels = logits.movedim(1, -1)[valid], y[valid]
    losses = -flat.log_softmax(1)[torch.arange(len(labels)), labels]
    of_samples = torch.stack([part.mean() for part in losses.split(lengths.tolist())])
    right = (flat.argmax(1) == labels).double()
    shares = torch.stack([part.mean() for part in right.split(lengths.tolist())])

    spec = DataSpec((6,), 4, (6,))
    rows = make("perplexity", spec=spec).rows(Outputs(of_samples, logits), y)
    assert rows[:, 1].tolist() == lengths.tolist() and of_samples[3].isnan()
    perplexity = make("perplexity", spec=spec).value(rows)
    assert perplexity == pytest.approx(float(losses.mean().exp()), rel=1e-12)
    assert perplexity != pytest.approx(float(of_samples.nanmean().exp()), rel=1e-3)
    from distcl.training import scores

    rows = scores._counted(1 - shares, "cross_entropy", y)
    assert make("token_accuracy", spec=spec).value(rows) == pytest.approx(float(right.mean()))
    with pytest.raises(NotScored, match="all of them are -100"):
        make("loss", spec=spec).value(rows[3:4])


def test_a_loss_beyond_all_bounds_is_an_infinite_perplexity():
    assert make("perplexity").value(torch.tensor([[1e5, 1.0]]).double()) == math.inf


def test_a_score_of_ones_own_is_a_function_whose_mean_counts(theirs):
    logits, y = classified()
    first, second = np.sort(logits.softmax(1).numpy(), axis=1).T[[-1, -2]]
    own = make("their_scores:margin")
    assert value(own, logits, y) == pytest.approx(np.mean(first - second)) and own.higher_is_better
    own = make("their_scores:margin", power=2, higher_is_better=False)
    assert value(own, logits, y) == pytest.approx(np.mean((first - second) ** 2))
    assert not own.higher_is_better and own.error(3.0) == 3.0 and own.chance() is None
    own = make("their_scores:distance")  # whole numbers; says itself that less is better
    distances = (logits.argmax(1) - y).abs().double()
    assert value(own, logits, y) == pytest.approx(float(distances.mean()))
    assert not own.higher_is_better
    assert value(make("their_scores:Spread"), logits, y) == pytest.approx(float(logits.std()))
    several = ModelConfig(score=["their_scores:margin", "accuracy"])
    assert list(create_scores(several, CLASSES)) == ["margin", "accuracy"]


@pytest.mark.parametrize(
    ("name", "loss", "spec", "options", "message"),
    [
        ("f1_macro", "mse", VALUES, {}, "'f1_macro' needs class labels, which .*'mse' on"),
        ("perplexity", "mse", VALUES, {}, "'perplexity' needs class labels.*'r2' or 'loss'"),
        ("r2", "cross_entropy", CLASSES, {}, "'r2' needs regression.*class labels is not"),
        ("r2", "bce", LABELS, {}, "'r2' needs regression.*'bce' is not; choose 'accuracy'"),
        ("token_accuracy", "bce", LABELS, {}, "'token_accuracy' .*'bce'"),
        ("top_k", "bce", LABELS, {}, "'top_k' needs one class a sample.*'bce'"),
        ("top_k", "cross_entropy", CLASSES, {"k": 6}, "k = 6 is more than the 5 classes"),
        ("top_k", "cross_entropy", CLASSES, {"k": 0}, "k: must be at least 1, not 0"),
        ("top_k", "cross_entropy", CLASSES, {"n": 2}, "'top_k' has no option 'n'"),
        ("auroc", "cross_entropy", DataSpec((6,), 4, (6,)), {}, r"targets have shape \[6\]"),
        ("their_scores:margin", "cross_entropy", CLASSES, {"powr": 2}, "did you mean 'power'"),
        ("their_scores:undecided", "cross_entropy", CLASSES, {}, "must be true or false"),
        ("their_scores:accuracy", "cross_entropy", CLASSES, {}, "told as 'accuracy'"),
        ("their_scores:guard", "cross_entropy", CLASSES, {}, "told as 'guard', which has another"),
        ("their_scores:Rowless", "cross_entropy", CLASSES, {}, "has no method rows"),
        ("their_scores:Mean", "cross_entropy", CLASSES, {}, "higher_is_better must be true or"),
        ("their_scores:NoScore", "cross_entropy", CLASSES, {}, "no distcl.training.scores.Score"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(theirs, name, loss, spec, options, message):
    with pytest.raises(ConfigError, match=message):
        make(name, loss, spec, **options)


def test_outputs_and_samples_that_do_not_fit_are_refused(theirs):
    logits, y = classified()
    with pytest.raises(ConfigError, match=r"one number per sample, shape \[20\].*shape \[\]"):
        value(make("their_scores:scalar"), logits, y)
    with pytest.raises(ConfigError, match=r"shape \[20\], complex numbers"):
        value(make("their_scores:imaginary"), logits, y)
    with pytest.raises(NotScored, match="all 57 held-out samples are of one class"):
        value(make("auroc"), logits, y * 0)
    with pytest.raises(ConfigError, match="k = 5 is more than the 2 classes"):
        value(make("top_k"), logits[:, :2], y % 2)
    with pytest.raises(ConfigError, match=r"needs outputs \[B, C\] and class labels \[B\]"):
        make("f1_macro").rows(Outputs(y, {"a": logits}), y)


def test_names_are_checked_as_they_are_read():
    for wrong in ("perplexty", ["accuracy", "perplexty"]):
        with pytest.raises(ValueError, match="unknown score 'perplexty', did you mean"):
            ModelConfig(score=wrong)
    with pytest.raises(ValueError, match=r"'top_k' is not in model\.score = 'loss'"):
        ModelConfig(score="loss", score_options={"top_k": {"k": 3}})
    with pytest.raises(ConfigError, match="names 'loss' twice"):
        create_scores(ModelConfig(score=["loss", "loss"]), CLASSES)


def test_the_guard_compares_errors_that_grow_from_zero():
    from distcl.training.accuracy_matrix import AccuracyMatrix
    from distcl.types import Experience

    ids = np.arange(3)
    experiences = [Experience(k, ids, ids) for k in range(3)]

    def errors(score, row):
        matrix = AccuracyMatrix(score.higher_is_better)
        matrix.append(row, 2)
        return [error for _, error in held_out_errors(matrix, experiences, score)]

    assert errors(make("accuracy"), [0.75, 0.5]) == [0.25, 0.5, None]
    assert errors(make("loss"), [0.75, 0.5]) == [0.75, 0.5, None]
    assert errors(make("perplexity"), [math.e, 1.0]) == [1.0, 0.0, None]

    class Reward(Score):
        def rows(self, outputs, y):
            return outputs.loss[:, None]

    assert errors(Reward(CLASSES, "cross_entropy"), [7.0, 0.5]) == [None] * 3
