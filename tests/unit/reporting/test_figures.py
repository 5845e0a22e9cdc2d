import numpy as np
import pytest
from matplotlib.colors import to_rgb

from distcl import registry
from distcl.config import ModelConfig
from distcl.reporting import plots
from distcl.reporting.figures import figures_of, stream_end, words_of
from distcl.training.scores import create_scores
from distcl.types import DataSpec


def test_the_words_of_every_score_say_the_way_that_the_score_does():
    for part in registry.parts("score"):
        loss, spec = ("mse", DataSpec((2,), 0, (1,))) if part.name == "r2" else ("bce", None)
        spec = spec or DataSpec((2,), 9)
        loss = "cross_entropy" if spec.classes else loss
        (score,) = create_scores(ModelConfig(score=part.name, loss=loss), spec).values()
        assert words_of(part.name).higher == score.higher_is_better, part.name
        assert words_of(part.name).digits < 4 or part.name == "loss"


@pytest.mark.parametrize(
    ("metric", "value", "shown"),
    [
        ("accuracy", 0.98765, "98.8"),
        ("r2", 0.61, "0.610"),
        ("r2", -1234.5, "-1234"),
        ("perplexity", 9.8765, "9.877"),
        ("perplexity", 98.765, "98.77"),
        ("perplexity", 98765.4, "98765"),
        ("perplexity", 1.25e30, "1.2e+30"),
        ("token_accuracy", 0.5, "50.0"),
        ("bits_per_byte", None, "–"),
        ("mine", 0.12345, "0.1235"),
    ],
)
def test_a_number_has_the_digits_that_it_needs(metric, value, shown):
    assert words_of(metric).number(value) == shown


def test_names_and_axes_say_which_way_is_good():
    assert words_of("accuracy").label == "accuracy, %"
    assert words_of("bits_per_byte").label == "bits per byte (less is better)"
    assert words_of("mine", higher=False).label == "mine (less is better)"
    assert words_of("accuracy", "r2").name == "score"
    found = figures_of({"metric": "mine", "higher_is_better": False, "average_accuracy": 2.0})
    assert found == [
        ("average mine", "2.0000", "", "over all experiences, at the end; less is better")
    ]
    summary = {"metric": "loss", "stream_end": {"samples": 9, "loss": 2.0}}
    assert stream_end(summary)[0][:2] == ("loss at the end", "2.0000")


@pytest.mark.parametrize(("metric", "best"), [("accuracy", 2), ("loss", 0), ("perplexity", 0)])
def test_dark_cells_of_the_matrix_are_the_good_ones(metric, best):
    values = np.array([[0.2, 0.5, 0.9]]) if metric != "perplexity" else np.array([[2, 40.0, 900]])
    (axes,) = plots.matrix(values.tolist(), ["a"], words_of(metric)).axes
    dark = [sum(to_rgb(cell.get_facecolor()[:3])) for cell in axes.patches]
    assert len(dark) == 3 and int(np.argmin(dark)) == best
    assert int(np.argmax(dark)) == 2 - best
    if metric == "perplexity":  # what lies between is told apart from the worst
        assert dark[1] < 0.9 * dark[2]


def test_a_matrix_of_one_value_or_none_is_drawn():
    for rows in ([[2.0]], [[None, 2.0]]):
        for metric in ("accuracy", "loss"):
            plots.matrix(rows, ["a"], words_of(metric))
