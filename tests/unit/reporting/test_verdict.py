from dataclasses import replace
from pathlib import Path

import pytest

from distcl.errors import UsageError
from distcl.reporting.comparison import Arm, Outcome, Plan, Variant, outcome_of, parse_variant
from distcl.reporting.figures import FIGURES
from distcl.reporting.page import write_comparison
from distcl.reporting.verdict import as_json, conclude, table
from tests.folders import summary

OFF = "continual_learning.importance_weighting=false"
NOISE = (0.0, 0.002, -0.003, 0.001)


def arm(name, accuracy, diverged=(), metric="accuracy", units=300):
    outcomes = {
        seed: Outcome(
            seed,
            f"runs/{seed}",
            diverged=seed in diverged,
            metric=metric,
            figures=dict.fromkeys(f.key for f in FIGURES)
            | {
                "average_accuracy": accuracy + 0.01 * seed + (NOISE[seed] if name else 0.0),
                "average_forgetting": 0.1,
                "average_anytime_accuracy": accuracy,
            },
            cost={"units": units, "steps": 10, "trained": 100, "seconds": 1.0},
            curve=(0.5, accuracy),
        )
        for seed in range(4)
    }
    return Arm(Variant(name or "as given", (name,) if name else ()), outcomes=outcomes)


def result(*arms):
    variants = tuple(a.variant for a in arms)
    plan = Plan(Path("a.toml"), variants, tuple(range(4)), Path("out"))
    return conclude(plan, list(arms))


@pytest.mark.parametrize(
    ("arms", "begins", "ends"),
    [
        ([("", 0.7), (OFF, 0.72)], "Uniform is better here by 2.0 points (", "importance off."),
        ([("", 0.7), (OFF, 0.68)], "Prioritized sampling is better here by 2.0", "importance on."),
        ([("", 0.7), (OFF, 0.7)], "No difference is shown here: uniform minus", "more --seeds."),
        ([("", 0.7), (OFF[:-5] + "true", 0.72)], "Prioritized sampling is better", "on."),
        (
            [("", 0.7), ("a.b=1", 0.72), ("a.b=2", 0.75)],
            "'a.b=2' is better here by 5.0 points (95 % interval 4.7 to 5.3, p < 0.0001, n = 4)",
            "set it.",
        ),
        (
            [("", 0.7), ("a.b=1", 0.6), ("a.b=2", 0.65)],
            "The configuration as it is is better here than any of the others by 5.0 points",
            "against 'a.b=1'; leave it.",
        ),
        (
            [("", 0.7), ("a.b=1", 0.7), ("a.b=2", 0.032)],
            "The configuration as it is is better here by 66.8 points (95 % interval 66.5 to",
            "against 'a.b=2'; no difference is shown of 'a.b=1'; leave it.",
        ),
        (
            [("", 0.7), ("a.b=1", 0.75), ("a.b=2", 0.032), ("a.b=3", 0.7), ("a.b=4", 0.8)],
            "'a.b=4' is better here by 10.0 points (",
            "; no difference is shown of 'a.b=3'; the best is 'a.b=4': set it.",
        ),
    ],
)
def test_a_verdict_is_a_sentence_with_size_interval_and_advice(arms, begins, ends):
    verdict = result(*(arm(name, accuracy) for name, accuracy in arms)).verdict
    assert verdict.startswith(begins) and verdict.endswith(ends), verdict


def test_every_significant_difference_is_named():
    effects = {"a.b=1": 0.75, "a.b=2": 0.6, "a.b=3": 0.032, "a.b=4": 0.8, "a.b=5": 0.7}
    verdict = result(arm("", 0.7), *(arm(name, mean) for name, mean in effects.items())).verdict
    assert "so is 'a.b=1' by 5.0 points (" in verdict
    assert "worse is 'a.b=2' by 10.0 points (" in verdict
    assert "worse is 'a.b=3' by 66.8 points (" in verdict


def test_pairs_with_a_diverged_run_are_left_out_and_named():
    found = result(arm("", 0.7), arm(OFF, 0.72, diverged=(1,)))
    assert found.differences[0].accuracy.n == 3
    assert found.verdict.endswith(f"Diverged, so left out: 1 of '{OFF}'.")
    assert table(found.groups)[1][1][1] == "3 (1 diverged)"
    all_lost = result(arm("", 0.7), arm(OFF, 0.72, diverged=range(4)))
    assert all_lost.verdict.startswith("There are fewer than two pairs")
    assert as_json(all_lost)["differences"][0]["p_holm"] is None


def test_a_cost_that_is_not_equal_is_told():
    found = result(arm("", 0.7), arm(OFF, 0.72, units=310))
    assert "could not be made equal" in found.verdict


def test_in_regression_differences_are_no_points():
    found = result(arm("", 0.7, metric="r2"), arm(OFF, 0.72, metric="r2"))
    assert "better here by 0.020 R² (" in found.verdict


@pytest.mark.parametrize(
    ("ours", "theirs", "begins", "ends"),
    [
        (3.5, 3.25, "Uniform is better here by 0.250 bits per byte (95 % interval 0.2", "off."),
        (3.5, 4.0, "Prioritized sampling is better here by 0.500 bits per byte (95 % int", "on."),
        (3.5, 3.5, "No difference is shown here: uniform minus prioritized sampling is", "seeds."),
    ],
)
def test_where_less_is_better_the_lower_one_is(ours, theirs, begins, ends):
    arms = (arm("", ours, metric="bits_per_byte"), arm(OFF, theirs, metric="bits_per_byte"))
    verdict = result(*arms).verdict
    assert verdict.startswith(begins) and verdict.endswith(ends), verdict
    assert (", less is better (" in verdict) == (ours == theirs)


def test_of_several_the_best_is_the_lowest_and_a_score_of_ones_own_says_which_way():
    arms = [arm(name, mean, metric="mine") for name, mean in (("", 3.0), ("a", 2.5), ("b", 2.0))]
    assert "'b' is better here by" not in (found := result(*arms)).verdict
    assert as_json(found)["higher_is_better"]
    for one in arms:
        one.outcomes = {k: replace(o, higher_is_better=False) for k, o in one.outcomes.items()}
    verdict = (found := result(*arms)).verdict
    assert verdict.startswith("'b' is better here by ") and "so is 'a' by 0.5" in verdict
    assert verdict.endswith("the best is 'b': set it.")
    plain = as_json(found)
    assert (plain["metric"], plain["higher_is_better"]) == ("mine", False)


@pytest.mark.parametrize("other", ["accuracy", "mine"])
def test_different_scores_are_not_compared(tmp_path, other):
    arms = [arm("", 0.7, metric="mine"), arm("a.b=1", 0.2, metric=other)]
    less = {k: replace(o, higher_is_better=False) for k, o in arms[0].outcomes.items()}
    arms[0].outcomes = less  # of 'mine' it was changed in between
    found = result(*arms)
    ways = ", ".join(sorted([f"{other} (more is better)", "mine (less is better)"]))
    assert found.verdict == f"The variants are judged by different scores, {ways}: no verdict."
    plain = as_json(found)
    assert plain["differences"] == [] and plain["higher_is_better"] is None
    write_comparison(found, tmp_path / "r.html", tmp_path)
    assert "no verdict" in (tmp_path / "r.html").read_text()


def test_the_page_says_which_way_is_good(tmp_path):
    found = result(arm("", 3.5, metric="loss"), arm("a.b=1", 3.2, metric="loss"))
    write_comparison(found, tmp_path / "r.html", tmp_path)
    page = (tmp_path / "r.html").read_text()
    for shown in ("average loss (less is better)", "Below 0 is better.", "loss forgotten"):
        assert shown in page, shown


def test_the_page_has_the_verdict_and_the_plots(tmp_path):
    found = result(arm("", 0.7), arm("a.b='<b>'", 0.72))
    pictures = write_comparison(found, tmp_path / "r.html", tmp_path)
    page = (tmp_path / "r.html").read_text()
    assert [p.stem.removeprefix("compare-") for p in pictures] == [
        "differences",
        "curves",
        "accuracy",
        "forgetting",
    ]
    assert "is better here by 2.0 points" in page and "'<b>'" not in page


def test_what_a_run_came_to_is_read_from_its_summary():
    rows = [[0.9, None, 0.1], [0.8, 0.6, 0.2]]
    found = summary(rows, [{"steps": 5}], seed=3)
    found["experiences"] = [{"trained": k < 2} for k in range(3)]
    found["compute"] = {"scored": 4, "trained": 12, "units": 40}
    outcome = outcome_of(Path("runs/a"), found)
    assert outcome.curve == pytest.approx((0.9, 0.7))  # not of what was never trained on
    assert (outcome.seed, outcome.cost["steps"], outcome.cost["units"]) == (3, 35, 40)
    assert outcome.figures["worst_experience_accuracy"] == 0.2
    assert outcome.figures["forward_transfer"] == 0.25
    header, ((name, runs, *cells),) = table({"a": [outcome]})
    assert header[2] == "average accuracy, %" and header[-3:] == ["steps", "compute", "seconds"]
    assert (name, runs, cells[-3:]) == ("a", "1", ["35", "40", "10.0"])


def test_a_variant_may_set_several_keys():
    assert parse_variant("a.b=1; c.d = 'x'").overrides == ("a.b=1", "c.d = 'x'")
    assert parse_variant("er, gated: a.b=1; c.d=2") == Variant("er, gated", ("a.b=1", "c.d=2"))
    assert parse_variant("a.b=http://x").name == "a.b=http://x"
    with pytest.raises(UsageError, match="NAME: and that"):
        parse_variant("er: ")
    with pytest.raises(UsageError, match="must have the form"):
        parse_variant(" ; ")


def test_variants_have_folders_of_their_own():
    names = {Variant(n, (n,)).folder for n in ("a.b=1", "a.b='1'", "a.b=/1/", "x" * 99, "x" * 98)}
    assert len(names) == 5 and all("/" not in name and len(name) < 60 for name in names)
