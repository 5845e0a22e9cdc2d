"""What a user brings is looked at before anything is trained, and leaves no trace of the look."""

from __future__ import annotations

import copy
import random
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import pytest
import torch

from distcl.data.stream import create_stream
from distcl.distributed.failure import Cause, cause_of
from distcl.distributed.runtime import Runtime
from distcl.errors import ConfigError, told
from distcl.models import create_model
from distcl.parallel.anchor import Anchor
from distcl.priority.scoring import compute_sample_priorities
from distcl.training.build import assemble
from distcl.training.dry_run import DryRun
from distcl.training.foresight import foresee_rounds
from distcl.training.parts import Parts
from distcl.training.trainer import ContinuousTrainer
from distcl.types import GENERAL, Experience, SourceInfo, pack_ids
from distcl.updaters.fisher import Squares
from tests import theirs
from tests.forked import distcl
from tests.small import small


def config(model: str, *keys: str) -> Any:
    return small(f"model.name=tests.theirs:{model}", "model.options={}", *keys)


OUT = Path(mkdtemp())
"""Nothing is to stay of what these parts write."""


def built(model: str, *keys: str, out: Path = OUT) -> Parts:
    settings = config(model, *keys, "tracking.kind=none")
    return assemble(settings, Runtime(), create_stream(settings.stream, 0), out)


@pytest.mark.parametrize(
    ("model", "keys", "message"),
    [
        ("ComplexBuffer", [], "buffer 'filter' is complex64.*imaginary part.*view_as_real"),
        ("ComplexParameter", [], "parameter 'w' is complex64"),
        ("Huge", [], "buffer 't' is float64 and holds values beyond float32.*fp64"),
        ("Plain", ["model.loss=tests.theirs:mean_loss"], r"mean_loss' .*\[2\], but returned \[\]"),
        ("Returning", ["how=other"], "Returning' returned dict with features: float32.*know what"),
        ("Returning", ["how=tuple"], r"tuple of 2 \(float32 \[2, 10\], float32 \[2, 12\]\)"),
        ("Returning", ["how=text"], "Returning' returned str for 2 samples"),
        ("Returning", ["how=mean"], r"returned float32 \[10\] for 2 samples"),
        ("Returning", ["how=squeezed"], r"returned float32 \[10\] for one sample"),
        ("Returning", ["how=detached"], "the loss has no gradient"),
        ("sequence", [], r"sequence' fails on 2 samples, float32 \[2, .*\]: RuntimeError: mat1"),
        ("Plain", ["priority.signal=tests.theirs:FlatSignal"], r"'FlatSignal' returned \(\)"),
    ],
)
def test_what_cannot_work_is_refused_by_name(model, keys, message):
    keys = [f"model.options.{key}" if key.startswith("how") else key for key in keys]
    with pytest.raises(ConfigError, match=message):
        built(model, *keys)


@pytest.mark.parametrize("how", ["dict", "output", "named"])
def test_logits_are_taken_from_what_names_them(how):
    parts = built("Returning", f"model.options.how={how}")
    batch = parts.stream.read(parts.stream.experiences[0].train[:5])
    assert parts.updater.fwd_bwd(batch, None).losses.shape == (5,)
    assert parts.model(batch.x).shape == (5, 10)


@pytest.mark.parametrize(
    ("keys", "kind", "function"),
    [
        (["model.name=tests.theirs:Broken"], ZeroDivisionError, "forward"),
        (["model.loss=tests.theirs:broken_loss"], KeyError, "broken_loss"),
        (["model.loss=tests.theirs:leaving_loss"], SystemExit, "leaving_loss"),
        (["model.loss=tests.theirs:refused_loss"], RuntimeError, "refused_loss"),
        (["priority.signal=tests.theirs:BrokenSignal"], IndexError, "score"),
        (["stream.source=tests.theirs:broken_source"], ValueError, "broken_source"),
    ],
)
def test_a_users_exception_is_told_as_theirs(keys, kind, function):
    with pytest.raises(kind) as caught:
        built("Plain", *keys)
    text = told(caught.value)
    assert text is not None
    assert text.startswith(f"{kind.__name__}: ")
    assert f"{theirs.__file__}, line " in text and f"in {function})" in text
    assert cause_of(caught.value, 0) == Cause(0, 1, text)  # no loss of contact, though it says so


def test_ours_is_not_told_as_theirs():
    with pytest.raises(TypeError) as caught:
        built("Plain", out=3)  # type: ignore[arg-type]
        compute_sample_priorities(1, 2, 3, 4, runtime=5)  # type: ignore[arg-type]
    assert told(caught.value) is None
    with pytest.raises(ZeroDivisionError) as divided:
        1 / 0  # noqa: B018
    assert told(divided.value) is None  # no line of distcl's has called it


@pytest.mark.parametrize(
    ("workers", "source", "told"),
    [
        (0, "leaving_source", "SystemExit: 0"),
        (1, "leaving_source", "SystemExit: 0"),
        (1, "late_source", "OverflowError: sample 77"),
    ],
)
def test_the_command_line_names_file_and_line(workers, source, told, tmp_path):
    (tmp_path / "c.toml").write_text("")
    sets = (
        f"stream.source=tests.theirs:{source}",
        f"data.workers={workers}",
        "stream.drift=none",
        "stream.experiences=1",
        "training.pretrain_epochs=0",
    )
    ended = distcl(
        "train",
        str(tmp_path / "c.toml"),
        *(word for key in sets for word in ("--set", key)),
        "--out",
        str(tmp_path / "run"),
        "--quiet",
    )
    assert ended.returncode == 1
    first = ended.stderr.splitlines()[0]
    assert first.startswith(f"distcl: {told}")
    assert f"{theirs.__file__}, line " in first and "in read)" in first
    assert "internal error" not in ended.stderr
    assert told.partition(":")[0] in (tmp_path / "run" / "status.json").read_text()


def test_a_look_leaves_no_trace():
    settings = config("Noisy", "priority.signal=grad_norm")
    stream, runtime = create_stream(settings.stream, 0), Runtime()
    model = create_model(settings.model, stream.spec, 0)
    before = copy.deepcopy(model.state_dict())
    torch.manual_seed(5), random.seed(5), np.random.seed(5)
    wanted = [torch.rand(3).tolist(), random.random(), np.random.rand()]
    torch.manual_seed(5), random.seed(5), np.random.seed(5)
    dry = DryRun(settings, runtime, stream, torch.nn.CrossEntropyLoss(reduction="none"), None)
    dry.before(model)
    dry.after(model)
    dry.conclude()
    assert [torch.rand(3).tolist(), random.random(), np.random.rand()] == wanted
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert all(p.grad is None for p in model.parameters())
    assert model.training


def test_lazy_modules_become_real_and_depend_on_the_seed_alone():
    torch.manual_seed(1)
    first = built("Lazy").model.state_dict()
    torch.manual_seed(2)
    again = built("Lazy").model.state_dict()
    assert first["a.weight"].shape == (12, 64)
    assert all(torch.equal(again[name], value) for name, value in first.items())
    normed = built("Lazy", "model.options.norm=true").model.norm
    assert type(normed) is torch.nn.BatchNorm1d and int(normed.num_batches_tracked) == 0


def test_a_reduced_or_broadcast_criterion_is_refused_in_a_loop_of_ones_own():
    runtime, linear = Runtime(), torch.nn.Linear(3, 2)
    model = runtime.prepare(linear)
    anchor = Anchor.of(runtime, model)
    data = torch.utils.data.TensorDataset(torch.randn(6, 3), torch.arange(6) % 2)
    for size in (1, 512):
        for criterion in (torch.nn.CrossEntropyLoss(), lambda z, y: z - y[:, None]):
            with pytest.raises(ConfigError, match="the criterion is a loss without unreduced form"):
                compute_sample_priorities(
                    model, anchor, data, criterion, runtime=runtime, batch_size=size
                )


# -- BatchNorm and one sample ----------------------------------------------------------------


def test_a_last_batch_of_one_sample_is_foreseen_with_batchnorm():
    settings = config("Norm", "tracking.kind=none")  # 301 samples in batches of 50
    stream = create_stream(settings.stream, 0)
    trainer = ContinuousTrainer(assemble(settings, Runtime(), stream, OUT), settings)
    with pytest.raises(ConfigError) as caught:
        trainer.pretrain(stream.experiences[0])
    text = str(caught.value)
    assert "pretraining, on experience 1: step 7 has a batch of 1;" in text
    assert "BatchNorm 'norm' cannot train on one sample; change training.batch_size" in text
    assert trainer.loop.steps == 0


def test_it_is_foreseen_for_all_rounds_before_the_first():
    settings = config("Norm", "tracking.kind=none", "continual_learning.mix_historic_data=true")
    stream = create_stream(settings.stream, 0)
    updater = assemble(settings, Runtime(), stream, OUT).updater
    sizes = [[300, 320, 340], [300, 320, 481], [300, 351, 300]]  # with the history before them
    found = []
    for lengths in sizes:
        experiences = [
            Experience(k, np.arange(n) + (k << 40), np.arange(5)) for k, n in enumerate(lengths)
        ]
        try:
            foresee_rounds(updater, settings, experiences, SourceInfo())
        except ConfigError as error:
            found.append(str(error).partition(";")[0])
        else:
            found.append("")
    assert found == [
        "",
        "the round on experience 3: step 23 has a batch of 1",
        "the round on experience 2: step 14 has a batch of 1",
    ]


@pytest.mark.parametrize(
    ("general", "history_of", "refused"),
    [(101, "all", True), (101, "general", True), (151, "all", True), (100, "all", False)],
)
def test_general_data_are_foreseen_in_every_round(general, history_of, refused):
    """Rounds of 300 + 300 + general samples, or 300 + general, in batches of 50."""
    keys = ("tracking.kind=none", "continual_learning.mix_historic_data=true", "training.epochs=1")
    settings = config("Norm", *keys, f"continual_learning.history_of={history_of}")
    stream = create_stream(settings.stream, 0)
    updater = assemble(config("Norm", *keys), Runtime(), stream, OUT).updater
    experiences = [Experience(k, np.arange(300) + (k << 40), np.arange(5)) for k in range(2)]
    info = SourceInfo(general=pack_ids(GENERAL, np.arange(general)))
    if not refused:
        return foresee_rounds(updater, settings, experiences, info)
    step = (300 + general + 300 * (history_of == "all")) // 50 + 1
    with pytest.raises(ConfigError, match=f"experience 2: step {step} has a batch of 1;"):
        foresee_rounds(updater, settings, experiences, info)


@pytest.mark.parametrize("mode", ["base", "er", "der", "jvp_reg", "agem", "lwf", "ewc_online"])
def test_the_sizes_of_training_forwards_are_foreseen(mode):
    settings = config(
        "Plain",
        f"continual_learning.update_mode={mode}",
        "continual_learning.buffer_size=53",
        "continual_learning.replay_batch_size=19",
        "training.accumulate=3",
        "training.epochs=1",
        "tracking.kind=none",
    )
    stream = create_stream(settings.stream, 0)
    trainer = ContinuousTrainer(assemble(settings, Runtime(), stream, OUT), settings)
    seen: list[int] = []

    def note(module: Any, args: Any) -> None:
        if module.training:
            seen.append(len(args[0]))

    trainer.pretrain(stream.experiences[0])
    trainer.parts.model.register_forward_pre_hook(note)
    foreseen: list[int] = []
    rebuild = trainer.parts.loader.rebuild

    def rebuilt(*args: Any) -> None:
        rebuild(*args)
        steps = trainer.parts.loader.steps()
        for batch, history in trainer.parts.loader.batch_sizes(steps):
            sizes = [n for n in trainer.parts.updater.passes(batch, history) if n]
            foreseen.extend(sizes * (2 if mode == "jvp_reg" else 1))

    trainer.parts.loader.rebuild = rebuilt  # type: ignore[method-assign]
    trainer.run_round(stream.experiences[1], "test")
    assert sorted(seen) == sorted(foreseen)


# -- Fisher ----------------------------------------------------------------------------------


def test_a_model_that_vmap_cannot_take_has_its_fisher_sample_by_sample(caplog):
    parts = built("Unmappable")
    criterion = parts.updater.criterion
    batch = parts.stream.read(parts.stream.experiences[0].train[:7])
    squares = Squares(parts.model, criterion, torch.float32)
    squares.layers = None
    parts.model.eval()
    with caplog.at_level("WARNING", "distcl"):
        found = squares.of(batch)
        squares.of(batch)
    assert [r.message.count("one at a time") for r in caplog.records] == [1]
    for name, p in parts.model.named_parameters():
        wanted = torch.zeros_like(p)
        for k in range(7):
            loss = parts.updater.criterion(parts.model(batch.x[k : k + 1]), batch.y[k : k + 1])
            wanted += torch.autograd.grad(loss.sum(), p)[0] ** 2
        torch.testing.assert_close(found[name], wanted)
