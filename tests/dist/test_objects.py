"""Objects in place of names: a model, a stream, and what else a script or a notebook has."""

from __future__ import annotations

import inspect
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset, TensorDataset

import distcl
from distcl.checkpoint.export import evaluate, export
from distcl.checkpoint.predictions import write_predictions
from distcl.data.pairs import joined_pairs
from distcl.errors import ConfigError, DataError, UsageError
from distcl.types import info_of
from distcl.updaters import Updater
from tests.forked import distcl as command
from tests.spawn import exit_codes, preload, run_ranks

preload(__name__)

CONFIG: dict[str, Any] = {
    "training": {"epochs": 1, "batch_size": 16, "pretrain_epochs": 1},
    "continual_learning": {"importance_weighting": True, "mix_historic_data": True},
    "checkpoint": {"every_steps": 5, "keep": 9},
    "run": {"report": False, "poll_steps": 5},
}
SIZES = [(50, 11), (65, 20), (31, 8)]


class Points(Dataset[Any]):
    """A map-style dataset as a user has it: no tensors beforehand, nothing but two methods."""

    def __init__(self, n: int, k: int, bad: int = -1) -> None:
        g = torch.Generator().manual_seed(100 * k + n)
        self.x, self.bad = torch.randn(n, 6, generator=g), bad
        self.y = (self.x[:, k : k + 3]).argmax(1)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> Any:
        if i == self.bad:
            raise RuntimeError("no such point")
        return self.x[i], int(self.y[i])


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 16), nn.ReLU())
        self.head = nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.head(self.body(x))
        return found


def brier(outputs: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    away: torch.Tensor = outputs.softmax(1) - nn.functional.one_hot(y, 3)
    return away.square().sum(1)


brier.higher_is_better = False  # type: ignore[attr-defined]


class Margin:
    needs_anchor = False
    needs_logits = False

    def score(self, batch: Any, now: Any, anchor: Any) -> torch.Tensor:
        first, second = now.logits.softmax(1).topk(2, dim=1).values.unbind(1)
        closeness: torch.Tensor = 1 - (first - second)
        return closeness


class PullBack(Updater):
    def update_post_fwd_bwd(self) -> None:
        weights = self.partition.trainable()
        pull = {name: 0.01 * (w - self.theta_star[name]) for name, w in weights.items()}
        self.partition.add_grad_(pull)


class Watch(distcl.Callback):
    """Notes what it is told; ``fails``: raises at this step, if this is the rank."""

    def __init__(self, fails: int = 0, rank: int = 0) -> None:
        self.seen: list[Any] = []
        self.losses = 0
        self.fails = fails if int(os.environ.get("RANK", "0")) == rank else 0

    def on_round_begin(self, number: int, experience: Any) -> None:
        self.seen.append(("begin", number, len(experience.train)))

    def on_step(self, step: int, losses: torch.Tensor) -> None:
        assert not losses.requires_grad
        self.losses += len(losses)
        losses.zero_()  # is ours: nothing of the run's changes
        if step == self.fails:
            raise ValueError("enough")

    def on_round_end(self, number: int, report: dict[str, Any], scores: list[Any]) -> None:
        self.seen.append(("end", number, report["steps"], scores))
        report.clear()

    def on_drift(self, position: int) -> None:
        self.seen.append(("drift", position))


def pairs() -> list[tuple[Points, Points]]:
    return [(Points(n, k), Points(m, k)) for k, (n, m) in enumerate(SIZES)]


def net() -> Net:
    torch.manual_seed(int(os.environ.get("RANK", "0")))  # no two ranks' are alike
    return Net()


def objects() -> dict[str, Any]:
    return {
        "model": net(),
        "stream": pairs(),
        "loss": nn.CrossEntropyLoss(reduction="none"),
        "optimizer": lambda parameters: torch.optim.RMSprop(parameters, lr=0.01),
        "score": ["accuracy", brier],
        "updater": PullBack,
        "signal": Margin,
    }


def final(folder: Path) -> bytes:
    return (folder / "checkpoints" / "final.safetensors").read_bytes()


def whole(folder: Path) -> Any:
    """Train; return what this rank was told and how many samples it had."""
    watch, given = Watch(), objects()
    before = {name: w.clone() for name, w in given["model"].state_dict().items()}
    summary = distcl.train(CONFIG, folder, callbacks=[watch], **given)
    assert all(torch.equal(w, before[name]) for name, w in given["model"].state_dict().items())
    if summary["world_size"] > 1:
        with pytest.raises(UsageError, match="3 processes of this launch have had their run"):
            distcl.train(CONFIG, folder, "auto", **given)
    return summary["accuracy"], summary["scores"]["brier"]["accuracy"], watch.seen, watch.losses


def resumed(step: Path, folder: Path) -> Any:
    """Go on from a checkpoint in another folder; return what the rank was told."""
    watch = Watch()
    accuracy = distcl.train(CONFIG, folder, str(step), callbacks=[watch], **objects())["accuracy"]
    return accuracy, watch.seen


@pytest.mark.parametrize("world", [1, 3])
def test_all_objects_train_and_go_on(world: int, tmp_path: Path) -> None:
    found = run_ranks(world, whole, tmp_path / "a")
    accuracy, scores, seen, _ = found[0]
    assert all(one[:3] == found[0][:3] for one in found)
    step = tmp_path / "a" / "checkpoints" / "step-00000009"  # within a round
    again = run_ranks(world, resumed, step, tmp_path / "b")
    assert again == [(accuracy, seen[2:])] * world
    assert final(tmp_path / "a") == final(tmp_path / "b")
    assert len(accuracy) == len(scores) == 3
    steps = [4, 8, 10]  # of 50, 65 + 50 and 31 + 115 samples, 16 a step
    assert [one[:3] for one in seen[1::2]] == [("end", k, steps[k]) for k in range(3)]
    assert [one[:2] for one in seen[::2]] == [("begin", k) for k in range(3)]
    assert [one[3] for one in seen[1::2]] == accuracy
    assert sum(one[3] for one in found) == 50 + 115 + 146  # each rank its own part
    text = (tmp_path / "a" / "config.toml").read_text()
    for name in ("Points", "Net", "brier", "<lambda>", "PullBack", "Margin"):
        assert f'"<object> {__name__}:{name}"' in text
    assert '"<object> torch.nn.modules.loss:CrossEntropyLoss"' in text
    assert 'drift = "none"' in text
    check_classes(tmp_path / "a")


def check_classes(folder: Path) -> None:
    """Compare what is told of classes with what the model says of every held-out sample."""
    run = distcl.open_run(folder, model=net())
    model, told = run.load_model(), run.summary["classes"]
    counts, every = torch.zeros(3, 3).long(), []
    for _, held_out in pairs():
        with torch.no_grad():
            predicted = model(held_out.x).argmax(1)
        mine = torch.zeros(3, 3).long()
        for true, other in zip(held_out.y.tolist(), predicted.tolist(), strict=True):
            mine[true, other] += 1
        counts += mine
        every.append((mine.diagonal() / mine.sum(1)).tolist())
    assert told["names"] == ["0", "1", "2"]
    assert told["confusion"] == counts.tolist()
    torch.testing.assert_close(told["accuracy"], (counts.diagonal() / counts.sum(1)).tolist())
    torch.testing.assert_close(told["by_experience"], every)
    last = run._run.lines[-1]
    assert [last[f"class_accuracy/{k}"] for k in range(3)] == told["accuracy"]
    text = run.report().read_text()
    assert "which class is taken for which" in text
    assert "Accuracy of each class" in text


def test_the_command_line_says_what_an_object_needs(tmp_path: Path) -> None:
    run = tmp_path / "run"
    distcl.train(CONFIG, run, model=net(), stream=pairs())
    assert len(export(run, tmp_path / "export")) == 2  # which needs no object
    config = str(run / "config.toml")
    done = command("train", config, "--out", str(run), "--resume", "auto")
    assert done.returncode == 2
    assert ":Net' was given as an object" in done.stderr
    assert "Traceback" not in done.stderr
    with pytest.raises(ConfigError, match=r"Net' was given as an object, .* as model=…"):
        distcl.train(config, run, "auto", stream=pairs())
    with pytest.raises(ConfigError, match=r"model.name: '<object> .*Net' -> '<object> .*Linear'"):
        distcl.train(config, run, "auto", stream=pairs(), model=nn.Linear(6, 3))
    for look in (lambda: write_predictions(run, tmp_path / "x.npz"), lambda: evaluate(run)):
        with pytest.raises(ConfigError, match="was given as an object"):
            look()


def fails(folder: Path) -> None:
    distcl.train(CONFIG, folder, callbacks=[Watch(7, rank=1)], **objects())


def test_an_exception_of_one_ranks_callback_ends_all(tmp_path: Path) -> None:
    codes = exit_codes(3, fails, tmp_path / "run", timeout=30)
    assert None not in codes
    assert 0 not in codes
    status = (tmp_path / "run" / "status.json").read_text()
    assert '"failed"' in status
    assert "rank 1: ValueError: enough (in your code: " in status


def test_a_watched_stream_tells_of_drift(tmp_path: Path) -> None:
    options = {"min_instances": 10, "threshold": 2}
    config = CONFIG | {"detector": {"name": "page_hinkley", "options": options}}
    watch, stream = Watch(), [(Points(100, k), Points(20, k)) for k in (0, 3)]
    summary = distcl.run(config, tmp_path, model=net(), stream=stream, callbacks=[watch])
    assert [one[1] for one in watch.seen if one[0] == "drift"] == summary["drifts"] != []
    rounds = [one[1] for one in watch.seen if one[0] == "end"]
    assert rounds == list(range(len(summary["rounds"]) + 1))


class Odd:
    def on_stepp(self) -> None: ...


class Short:
    def on_step(self, step: int) -> None: ...


@pytest.mark.parametrize(
    ("given", "config", "kind", "says"),
    [
        ({"model": 3}, {}, ConfigError, "model.name: int is not callable"),
        ({"model": nn.Linear(6, 3)}, {"model": {"options": {"a": 1}}}, ConfigError, "made already"),
        ({"model": lambda spec: 3}, {}, ConfigError, "must return a torch.nn.Module, not int"),
        ({"stream": []}, {}, ConfigError, "stream.experiences: it is 0, but must be"),
        ({"stream": pairs()}, {"stream": {"experiences": 5}}, ConfigError, "stream= has 3 pairs"),
        ({"stream": [Points(9, 0)]}, {}, DataError, r"experience 1 must be a pair \(train, held-"),
        ({"stream": [(Points(9, 0), Points(0, 0))]}, {}, DataError, "1: Points has no samples"),
        ({"stream": [(Points(9, 0), [3][:0])]}, {}, DataError, "1: list has no samples"),
        ({"loss": nn.CrossEntropyLoss()}, {}, ConfigError, "a loss without unreduced form"),
        ({"optimizer": lambda p: 3}, {}, ConfigError, "must return a torch.optim.Optimizer, not"),
        ({"optimizer": lambda p: torch.optim.SGD(p[:1])}, {}, ConfigError, "not the 4 that it was"),
        ({"optimizer": torch.optim.LBFGS}, {}, ConfigError, "LBFGS steps by a closure"),
        (
            {"optimizer": torch.optim.SGD},
            {"optimizer": {"lr": 0.1}},
            ConfigError,
            "lr = 0.1 is for",
        ),
        ({"model": [net(), net()]}, {}, ConfigError, "name: give one object, not a list of 2"),
        ({"score": []}, {}, ConfigError, "model.score: give at least one object, not"),
        ({"score": [brier, brier]}, {}, ConfigError, "names '<object> .*:brier' twice"),
        ({"signal": Margin, "loss": "focal"}, {}, ConfigError, "unknown loss 'focal'"),
        ({"callbacks": [Odd()]}, {}, UsageError, "Odd has 'on_stepp', did you mean 'on_step'"),
        ({"callbacks": Watch()}, {}, UsageError, "must be a list of objects, not Watch"),
        ({"callbacks": [Watch]}, {}, UsageError, "callbacks: Watch is a class; give an object"),
        ({"callbacks": [Short()]}, {}, UsageError, r"Short.on_step is called with \(step, losses\)"),
        ({"callbacks": [3]}, {}, UsageError, "int has none of its methods; there are on_round"),
    ],
)
def test_what_is_no_part_is_told(
    given: dict[str, Any], config: Any, kind: Any, says: str, tmp_path: Path
) -> None:
    given = {"model": Net(), "stream": pairs(), **given}
    weighted = {"continual_learning": {"importance_weighting": True}}
    with pytest.raises(kind, match=says):
        distcl.train(weighted | config, tmp_path / "run", **given)


def test_a_samples_group_is_its_pair() -> None:
    ones = TensorDataset(torch.ones(2, 6), torch.ones(2).long())
    train, test = joined_pairs([*pairs(), (ones, ones)])
    assert len(train) == 148
    assert len(test) == 41
    batch = train.read(torch.tensor([147, 0, 49, 50, 114, 115]).numpy())
    assert batch.ids.tolist() == [147, 0, 49, 50, 114, 115]
    assert torch.equal(batch.x[0], torch.ones(6))
    assert torch.equal(batch.x[2], Points(50, 0).x[49])
    assert torch.equal(batch.x[3:5], Points(65, 1).x[[0, 64]])
    assert info_of(train).groups[[0, 49, 50, 114, 115, 147]].tolist() == [0, 0, 1, 1, 2, 3]
    assert train.read(torch.empty(0).long().numpy()).x.shape == (0, 6)


def test_classes_of_pairs_must_agree() -> None:
    some = pairs()
    for pair, names in zip(some, ([], ["cat", "dog"], ["cat", "dog", "eel"]), strict=True):
        for one in pair:
            one.classes = names  # type: ignore[attr-defined]
    assert list(info_of(joined_pairs(some)[0]).class_names) == ["cat", "dog", "eel"]
    some[1][1].classes = ["dog", "cat"]  # type: ignore[attr-defined]
    with pytest.raises(DataError, match="2's class 0 is 'dog', experience 3's is 'cat'"):
        joined_pairs(some)


def test_help_shows_the_arguments() -> None:
    for function in (distcl.train, distcl.run, distcl.detect):
        names = list(inspect.signature(function).parameters)
        assert names[:3] == ["config", "out", "resume"]
        assert {"model", "stream", "callbacks"} <= set(names)
        assert f"``distcl {function.__name__}``" in str(function.__doc__)
