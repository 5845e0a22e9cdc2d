"""Whole jobs judged by other scores than accuracy: the same at one rank and three."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sklearn import metrics

from distcl.checkpoint.export import evaluate
from distcl.checkpoint.store import read_manifest
from distcl.data.stream import create_stream
from distcl.errors import DistclError, DivergenceError, told
from distcl.job import execute as run_job
from distcl.models import create_model
from distcl.reporting.page import write_report
from distcl.reporting.status import read_status
from tests.forked import compare
from tests.small import SMALL, execute, small
from tests.spawn import run_ranks

EVERY = ["perplexity", "token_accuracy", "top_k", "f1_macro", "auroc", "loss", "bits_per_byte"]
OWN = "tests.scores_of_ones_own"
LESS = "{higher_is_better = false}"
MIRROR = (  # a round of it is taken back, and another checkpoint than the last is the best
    "stream.experiences=5",
    "stream.drift=permute",
    "training.accept=improves",
    "training.epochs=4",
    "training.pretrain_epochs=20",
    "optimizer.lr=0.5",
    "continual_learning.importance_weighting=false",
    "checkpoint.every_round=true",
    "checkpoint.keep=1",
)


def sets(names: list[str], *more: str) -> tuple[str, ...]:
    return (f"model.score={names!r}", "model.score_options={top_k={k=3}}", *more)


def dense(folder: Path, overrides: tuple[str, ...]) -> dict[str, list[float]]:
    """Every score of a run's final weights on each experience, by scikit-learn."""
    config = small(*overrides)
    stream = create_stream(config.stream, config.run.seed, config.data)
    model = create_model(config.model, stream.spec, config.run.seed, None).double().eval()
    model.load_state_dict(load_file(folder / "checkpoints" / "final.safetensors"))
    found: dict[str, list[float]] = {name: [] for name in EVERY}
    for experience in stream.experiences:
        batch = stream.read(experience.test).to(torch.device("cpu"), torch.float64)
        with torch.no_grad():
            logits, y = model(batch.x), batch.y
        p, classes = logits.softmax(1), range(10)
        loss = float(metrics.log_loss(y, p, labels=classes))
        values = {
            "perplexity": np.exp(loss),
            "loss": loss,
            "bits_per_byte": loss / np.log(2),
            "token_accuracy": metrics.accuracy_score(y, p.argmax(1)),
            "top_k": metrics.top_k_accuracy_score(y, p, k=3, labels=classes),
            "f1_macro": metrics.f1_score(y, p.argmax(1), average="macro"),
            "auroc": metrics.roc_auc_score(y, p, multi_class="ovr"),
        }
        for name, value in values.items():
            found[name].append(float(value))
    return found


def test_every_score_is_the_same_at_one_and_three_ranks_and_that_of_scikit_learn(
    tmp_path: Path,
) -> None:
    overrides = sets(EVERY, "run.precision=fp64", "training.eval_batch_size=7", "optimizer.lr=1.0")
    alone, three = (
        run_ranks(world, execute, "train", overrides, tmp_path / str(world))[0] for world in (1, 3)
    )
    assert alone["metric"] == "perplexity" and alone["higher_is_better"] is False
    assert list(alone["scores"]) == EVERY[1:]
    wanted = dense(tmp_path / "1", overrides)
    for name in EVERY:
        one, other = ({name: s, **s["scores"]}[name] for s in (alone, three))
        np.testing.assert_allclose(one["accuracy"], other["accuracy"], rtol=0, atol=1e-9)
        np.testing.assert_allclose(one["accuracy"][-1], wanted[name], rtol=1e-9)
    digests = [[r["draws_sha256"] for r in summary["rounds"]] for summary in (alone, three)]
    assert digests[0] == digests[1]
    lines = [json.loads(line) for line in (tmp_path / "3" / "metrics.jsonl").open()]
    logged = [[line[f"auroc/{j}"] for j in (1, 2, 3)] for line in lines if "perplexity/1" in line]
    np.testing.assert_array_equal(logged, three["scores"]["auroc"]["accuracy"])
    again = evaluate(tmp_path / "3")
    np.testing.assert_allclose(again["accuracy"], three["accuracy"][-1], rtol=1e-12)
    assert list(again["scores"]) == EVERY[1:]


def test_what_is_scored_besides_changes_nothing(tmp_path: Path) -> None:
    plain = execute("train", (), tmp_path / "a")
    scored = execute("train", sets(["accuracy", *EVERY]), tmp_path / "b")
    assert scored["metric"] == "accuracy" and scored["accuracy"] == plain["accuracy"]
    for key in ("average_forgetting", "forward_transfer", "worst_experience_accuracy", "compute"):
        assert scored[key] == plain[key]
    digests = [[r["draws_sha256"] for r in summary["rounds"]] for summary in (plain, scored)]
    assert digests[0] == digests[1] and plain["scores"] == {}


def test_a_score_and_its_contrary_come_to_the_same(tmp_path: Path) -> None:
    """The share that is right, and the share that is wrong: whatever steers a run goes one way."""
    right, wrong, upside_down = (
        execute("train", (f"model.score={OWN}:{name}", *MIRROR, *more), tmp_path / name)
        for name, *more in (
            ("right",),
            ("wrong",),
            ("inverted", f'model.score_options={{"{OWN}:inverted" = {LESS}}}'),
        )
    )
    assert right["metric"] == "right" and wrong["metric"] == "wrong"
    assert right["higher_is_better"] and not wrong["higher_is_better"]
    np.testing.assert_allclose(1 - np.array(wrong["accuracy"]), right["accuracy"], atol=1e-12)
    for key in ("average_forgetting", "backward_transfer", "forward_transfer"):
        assert wrong[key] == pytest.approx(right[key], abs=1e-12)
    worst = "worst_experience_accuracy"
    assert 1 - wrong[worst] == pytest.approx(right[worst])
    accepted = [[r["accepted"] for r in s["rounds"]] for s in (right, wrong, upside_down)]
    assert accepted[0] == accepted[1] == [True, True, True, False]
    assert accepted[2] != accepted[0]
    kept = [sorted(p.name for p in (tmp_path / n / "checkpoints").glob("step-*")) for n in WAYS]
    assert kept[0] == kept[1] and len(kept[0]) == 2
    manifests = [read_manifest(tmp_path / "wrong" / "checkpoints" / name) for name in kept[1]]
    assert manifests[0]["score"] < manifests[1]["score"]
    said = (tmp_path / "wrong" / "log.txt").read_text()
    assert re.search(r"round 4 is taken back: mean wrong on held-out data rose from 0\.", said)


WAYS = ("right", "wrong")


def test_forgetting_is_above_zero_where_less_is_better_and_it_got_worse(tmp_path: Path) -> None:
    more = ("stream.drift=permute", "training.epochs=30", "training.pretrain_epochs=30")
    names = ["perplexity", "accuracy"]
    found = execute("train", sets(names, *more)[:1] + more, tmp_path)
    rows = np.array(found["accuracy"])
    assert rows[-1, 0] > rows[0, 0] and rows[-1, 1] > rows[1, 1]  # it forgot
    lost = rows[-1, :2] - rows[:-1, :2].min(0)
    assert found["average_forgetting"] == pytest.approx(lost.mean()) and lost.mean() > 0
    gained = np.array([rows[0, 0], rows[1, 1]]) - rows[-1, :2]
    assert found["backward_transfer"] == pytest.approx(gained.mean())
    assert found["worst_experience_accuracy"] == rows[-1].max()
    assert found["scores"]["accuracy"]["average_forgetting"] > 0

    write_report([tmp_path], tmp_path / "report.html", tmp_path / "png")
    page = re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", (tmp_path / "report.html").read_text()))
    for shown in (
        "perplexity matrix",
        "Less is better: the darker, the better.",
        "perplexity after the last round minus the best before it; below zero: improved.",
        "perplexity forgotten",
        "over all experiences, at the end; less is better",
        "Further scores",
        "accuracy, %: average accuracy",
    ):
        assert shown in page, shown
    status = str(read_status(tmp_path))
    assert f"perplexity  {rows[-1].mean():.3f}"[:15] in status and "last round  2" in status
    assert "%" not in status

    # of a run that is not over, the report knows as much from what is logged
    (tmp_path / "summary.json").unlink()
    (tmp_path / "status.json").write_text(json.dumps({"state": "running", "reason": ""}))
    write_report([tmp_path], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "perplexity after the last round minus the best before it" in page


def test_an_interrupted_run_goes_on_with_all_its_matrices(tmp_path: Path) -> None:
    overrides = sets(["loss", "auroc"], "checkpoint.every_round=true", "checkpoint.keep=9")
    overrides = (overrides[0], *overrides[2:])
    whole = execute("train", overrides, tmp_path / "a")
    first = sorted((tmp_path / "a" / "checkpoints").glob("step-*"))[1]
    rest = run_job("train", small(*overrides), tmp_path / "b", resume=str(first))
    for key in ("accuracy", "scores", "average_forgetting", "forward_transfer"):
        assert rest[key] == whole[key]


def test_a_stream_that_is_watched_ends_with_the_score_of_its_end(tmp_path: Path) -> None:
    more = ("stream.drift=permute", "stream.samples_per_experience=600", "monitor.batch_size=50")
    more = ("training.pretrain_epochs=40", "detector.name=page_hinkley", *more)
    names = ["perplexity", f"{OWN}:wrong"]
    found = execute("run", (f"model.score={names!r}", "monitor.metric=error", *more), tmp_path)
    assert found["drifts"] and found["forward_transfer"] is not None
    assert list(found["stream_end"]) == ["samples", "perplexity"]
    assert np.shape(found["scores"]["wrong"]["accuracy"]) == np.shape(found["accuracy"])
    value = found["stream_end"]["perplexity"]
    assert f"[stream] perplexity {value:.3f} on its last" in (tmp_path / "log.txt").read_text()
    assert f"perplexity at end {value:.3f}"[:20] in str(read_status(tmp_path))


@pytest.mark.timeout(400)
def test_a_comparison_gives_its_verdict_in_the_score(tmp_path: Path) -> None:
    """A larger learning rate learns more here: fewer bits, so it is the better one."""
    config = tmp_path / "a.toml"
    config.write_text("")
    keys = ('model.score=["bits_per_byte", "accuracy"]', "stream.drift=none", "optimizer.lr=0.001")
    keys = (*(k for k in SMALL if not k.startswith("optimizer.lr")), *keys)
    keys = (*keys, "continual_learning.importance_weighting=false", "stream.experiences=2")
    words = [word for key in keys for word in ("--set", key)]
    command = (str(config), "--vs", "optimizer.lr=0.05", "--seeds", "3")
    done = compare(*command, *words, "--out", str(tmp_path / "out"))
    assert done.exit_code == 0, done.output
    said = r"'optimizer.lr=0.05' is better here by 0\.\d+ bits per byte \(95 %"
    assert re.match(said, done.stdout), done.stdout
    found = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert found["metric"] == "bits_per_byte" and found["higher_is_better"] is False
    assert found["differences"][0]["accuracy"]["mean"] < 0


ALL = "stream.samples_per_experience=0"
FAULTS: dict[str, tuple[tuple[str, ...], int, str]] = {
    "a constant class": (
        ("model.score=auroc", "stream.drift=split", "stream.experiences=10", ALL),
        2,
        r"model\.score = 'auroc' on experience 1: all \d+ held-out samples are of one class",
    ),
    "not a number": (
        (f"model.score={OWN}:undefined",),
        2,
        r"model\.score = 'undefined' is nan on experience 1 after round 0, by \d+ of 359 samples, "
        "though the model's outputs are finite",
    ),
    "a mean": (
        (f"model.score={OWN}:mean",),
        2,
        r"must return one number per sample, shape \[2\], but returned shape \[\]",
    ),
    "unknown": (("model.score=perplexty",), 2, "unknown score 'perplexty', did you mean"),
    "regression": (("model.score=r2",), 2, "'r2' needs regression"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_what_does_not_fit_ends_in_a_sentence(name: str, tmp_path: Path) -> None:
    overrides, code, message = FAULTS[name]
    with pytest.raises(DistclError, match=message) as caught:
        execute("train", overrides, tmp_path)
    assert caught.value.exit_code == code


def test_a_further_score_that_says_nothing_does_not_end_a_run(tmp_path: Path) -> None:
    names = ["accuracy", "auroc", f"{OWN}:undefined"]
    split = ("stream.drift=split", "stream.experiences=10", ALL)
    plain, scored = (
        run_ranks(1 + 2 * k, execute, "train", (*split, *more), tmp_path / str(k))[0]
        for k, more in enumerate([(), (f"model.score={names!r}",)])
    )
    np.testing.assert_allclose(scored["accuracy"], plain["accuracy"], rtol=0, atol=0.01)
    assert {v for row in scored["scores"]["auroc"]["accuracy"] for v in row} == {None}
    rows = scored["scores"]["undefined"]["accuracy"]
    assert sum(v is None for v in rows[-1]) == 1 and len(rows[-1]) == 10
    said = (tmp_path / "1" / "log.txt").read_text()
    assert "[auroc] after round 0: none on experience 1: all " in said
    assert "[undefined] after round 0: none on experience" in said and ": it would be nan" in said
    assert re.search(r"\[auroc\] after round 9:( –){10}\n", said)


def test_a_fault_in_a_score_of_the_users_is_told_as_theirs_before_anything_is_trained(
    tmp_path: Path,
) -> None:
    with pytest.raises(ZeroDivisionError) as caught:
        execute("train", (f"model.score={OWN}:broken",), tmp_path)
    line = told(caught.value)
    assert line is not None and re.search(r"in your code: .*scores_of_ones_own\.py, line \d+", line)
    assert "pretraining" not in (tmp_path / "log.txt").read_text()


def test_outputs_that_are_not_finite_are_the_models_fault(tmp_path: Path) -> None:
    with pytest.raises(DivergenceError, match=r"round 0|model's outputs are NaN"):
        execute("train", ("model.score=loss", "optimizer.lr=1e38"), tmp_path)
