"""K-FAC factors, penalty and steps against a dense Fisher matrix, sample by sample, in float64."""

from __future__ import annotations

import io
import logging
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from distcl.config import ContinualLearningConfig, RunConfig
from distcl.distributed.runtime import Runtime
from distcl.errors import ConfigError, DivergenceError, UsageError
from distcl.models.reference import CNN
from distcl.parallel.anchor import Anchor
from distcl.parallel.inference import ShardedForward
from distcl.parallel.partition import create_partition
from distcl.priority.scoring import Scorer
from distcl.priority.signals import LossDelta
from distcl.types import Batch, DataSpec
from distcl.updaters import UpdaterSetup
from distcl.updaters.kfac import KFACOnline
from distcl.updaters.kronecker import Layer, deal_layers
from tests.models import awkward

LR, STRENGTH = 0.3, 7.0
NO_IDS = np.empty(0, dtype=np.int64)


def criterion(outputs: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(outputs, y, reduction="none")


@pytest.fixture(scope="module")
def runtime() -> Runtime:
    return Runtime(RunConfig(precision="fp64"))


def make(runtime: Runtime, model: nn.Module, **keys: Any) -> KFACOnline:
    model = runtime.prepare(model)
    partition = create_partition(runtime, model)
    anchor = Anchor(partition)
    forward = ShardedForward(runtime, model, partition, criterion)
    trainable = [p for p in model.parameters() if p.requires_grad]
    return KFACOnline(
        UpdaterSetup(
            config=ContinualLearningConfig(kfac_lambda=STRENGTH, **keys),
            model=model,
            optimizer=torch.optim.SGD(trainable, lr=LR),
            scorer=Scorer(forward, anchor, LossDelta(), 8),
            seed=0,
        )
    )


def data(*shape: int, n: int = 6, seed: int = 1) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, *shape, generator=generator, dtype=torch.float64)
    return Batch(torch.arange(n), x, torch.randint(3, (n,), generator=generator), n)


def step(updater: KFACOnline, batch: Batch) -> None:
    updater.update_pre_fwd_bwd()
    updater.fwd_bwd(batch, None)
    updater.model.zero_grad()


def penalty(updater: KFACOnline, seed: int = 2) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Begin a round, move every weight; return (shift, penalty's gradient) by name."""
    updater.cl_preprocessing()
    generator = torch.Generator().manual_seed(seed)
    shifts = {}
    for name, p in updater.model.named_parameters():
        if p.requires_grad:
            shifts[name] = torch.randn(p.shape, generator=generator, dtype=p.dtype)
            p.data.add_(shifts[name])
    updater.model.zero_grad()
    updater.update_post_fwd_bwd()
    grads = {n: p.grad for n, p in updater.model.named_parameters() if p.grad is not None}
    return {n: (shift, grads.get(n, torch.zeros_like(shift))) for n, shift in shifts.items()}


def positions(layer: nn.Module, a: torch.Tensor, g: torch.Tensor) -> list[Any]:
    """(input, output gradient) of each position, both 1-D; a patch is cut out by indices."""
    if isinstance(layer, nn.Linear):
        return [*zip(a.reshape(-1, a.shape[-1]), g.reshape(-1, g.shape[-1]), strict=True)]
    (p, q), (s, t), (d, e), (k, m) = layer.padding, layer.stride, layer.dilation, layer.kernel_size
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    a, found = nn.functional.pad(a, (q, q, p, p), mode)[0], []
    for i in range(g.shape[2]):
        for j in range(g.shape[3]):
            rows, columns = torch.arange(k) * d + i * s, torch.arange(m) * e + j * t
            found.append((a[:, rows][:, :, columns].flatten(), g[0, :, i, j]))
    return found


def dense_fisher(model: nn.Module, layer: nn.Module, batch: Batch) -> torch.Tensor:
    """G ⊗ A over the rows of [weight, bias], from one sample at a time."""
    a_sum, g_sum, rows = 0.0, 0.0, 0
    for x, y in zip(batch.x, batch.y, strict=True):
        calls: list[tuple[torch.Tensor, torch.Tensor]] = []

        def see(_: Any, args: Any, out: torch.Tensor, calls: list[Any] = calls) -> torch.Tensor:
            calls.append((args[0], out))
            return 1 * out  # the model may change this one in place

        hook = layer.register_forward_hook(see)
        loss = criterion(model(x[None]), y[None]).sum()
        hook.remove()
        grads = torch.autograd.grad(loss, [out for _, out in calls])
        for (a_call, _), g_call in zip(calls, grads, strict=True):
            for a, g in positions(layer, a_call.detach(), g_call):
                if layer.bias is not None:
                    a = torch.cat([a, a.new_ones(1)])
                a_sum, g_sum, rows = a_sum + a.outer(a), g_sum + g.outer(g), rows + 1
    return torch.kron(g_sum / rows, a_sum / len(batch))


def dense_penalty(fisher: torch.Tensor, shifts: list[torch.Tensor], damped: bool) -> torch.Tensor:
    delta = torch.cat([s.reshape(s.shape[0], -1) for s in shifts], dim=1)
    curvature = STRENGTH * fisher
    if damped:
        curvature = curvature @ torch.linalg.inv(torch.eye(len(fisher)) + LR * curvature)
    return (curvature @ delta.reshape(-1)).reshape(delta.shape)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.head = nn.Linear(4, 3, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.layer(torch.tanh(self.layer(x)))))


class Tokens(nn.Module):
    """Samples first, positions first, or both in one dimension."""

    def __init__(self, order: str = "samples") -> None:
        super().__init__()
        self.order = order
        self.layer = nn.Linear(4, 5)
        self.head = nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.order == "positions":
            return self.head(torch.relu_(self.layer(x.transpose(0, 1))).mean(0))
        flat = x.flatten(0, 1) if self.order == "flat" else x
        return self.head(torch.relu_(self.layer(flat)).view(*x.shape[:2], 5).mean(1))


def convolution(**keys: Any) -> nn.Module:
    conv = nn.Conv2d(2, 3, **keys)
    return nn.Sequential(conv, nn.Tanh(), nn.Flatten(), nn.LazyLinear(3))


CASES = {
    "linear": (lambda: nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)), (4,)),
    "linear without bias": (
        lambda: nn.Sequential(nn.Linear(4, 5, bias=False), nn.ReLU(), nn.Linear(5, 3)),
        (4,),
    ),
    "linear on tokens": (Tokens, (7, 4)),
    "linear on tokens, positions first": (lambda: Tokens("positions"), (7, 4)),
    "linear on tokens, flat": (lambda: Tokens("flat"), (7, 4)),
    "linear used twice": (Twice, (4,)),
    "conv": (lambda: convolution(kernel_size=2), (2, 4, 4)),
    "conv without bias": (lambda: convolution(kernel_size=2, bias=False), (2, 4, 4)),
    "conv with stride and padding": (
        lambda: convolution(kernel_size=(3, 2), stride=(2, 1), padding=(1, 2)),
        (2, 5, 4),
    ),
    "dilated conv, reflected": (
        lambda: convolution(kernel_size=2, dilation=2, padding=1, padding_mode="reflect"),
        (2, 4, 5),
    ),
}


@pytest.mark.parametrize("mode", ["explicit", "damped", "explicit, losses weighted"])
@pytest.mark.parametrize("case", CASES)
def test_penalty_equals_the_dense_fisher_matrix(case: str, mode: str, runtime: Runtime) -> None:
    build, shape = CASES[case]
    torch.manual_seed(0)
    model = build().double()
    batch = data(*shape)
    model(batch.x)  # lazy layers learn their shape
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    if "weighted" in mode:  # by priority.correction; the Fisher matrix is that of the plain losses
        batch = replace(batch, weights=torch.linspace(0.2, 3.0, len(batch)).double())
    updater = make(runtime, model, penalty_step=mode.partition(",")[0])
    fishers = {name: dense_fisher(model, layer, batch) for name, layer in layers.items()}
    step(updater, batch)
    updater.cl_postprocessing(updater.setup, NO_IDS)
    found = penalty(updater)
    for name, layer in layers.items():
        names = [f"{name}.weight"] + [f"{name}.bias"] * (layer.bias is not None)
        shifts = [found[n][0] for n in names]
        expected = dense_penalty(fishers[name], shifts, mode == "damped")
        actual = torch.cat([found[n][1].reshape(len(expected), -1) for n in names], dim=1)
        assert expected.abs().max() > 1e-3
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-8)


def test_padding_same_is_that_of_the_convolution(runtime: Runtime) -> None:
    factors = []
    for name, build in (
        ("0", lambda: convolution(kernel_size=2, padding="same")),
        (
            "0.1",
            lambda: nn.Sequential(
                nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(2, 3, 2)),
                nn.Tanh(),
                nn.Flatten(),
                nn.LazyLinear(3),
            ),
        ),
    ):
        torch.manual_seed(0)
        model, batch = build().double(), data(2, 4, 5)
        model(batch.x)
        updater = make(runtime, model)
        step(updater, batch)
        updater.cl_postprocessing(updater.setup, NO_IDS)
        factors.append(updater.curvature[name])
    torch.testing.assert_close(factors[0].a, factors[1].a, rtol=0, atol=1e-12)
    torch.testing.assert_close(factors[0].g, factors[1].g, rtol=0, atol=1e-12)


def test_factors_of_one_sample_are_its_exact_fisher_matrix(runtime: Runtime) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    batch = data(4, n=1)
    updater = make(runtime, model, penalty_step="explicit")
    grads = torch.autograd.grad(criterion(model(batch.x), batch.y).sum(), list(model.parameters()))
    step(updater, batch)
    updater.cl_postprocessing(updater.setup, NO_IDS)
    found = penalty(updater)
    for i in (0, 2):
        w, b = grads[i], grads[i + 1]
        (dw, pw), (db, pb) = found[f"{i}.weight"], found[f"{i}.bias"]
        slope = (w * dw).sum() + (b * db).sum()
        torch.testing.assert_close(pw, STRENGTH * slope * w, rtol=0, atol=1e-10)
        torch.testing.assert_close(pb, STRENGTH * slope * b, rtol=0, atol=1e-10)


def test_every_kth_step_counts_and_commits_fold_by_ema(runtime: Runtime) -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 3).double()
    updater = make(runtime, model, kfac_every=2, kfac_ema_decay=0.75)
    rounds = [[data(4, n=n, seed=n) for n in sizes] for sizes in ((5, 6, 7), (8, 9))]
    counted = [(rounds[0][0], rounds[0][2]), (rounds[1][0],)]
    fishers, factors = [], []
    for batches, used in zip(rounds, counted, strict=True):
        x, y = torch.cat([b.x for b in used]), torch.cat([b.y for b in used])
        fishers.append(dense_fisher(model, model, Batch(y, x, y, len(y))))
        for batch in batches:
            step(updater, batch)
        updater.cl_postprocessing(updater.setup, NO_IDS)
        factors.append((updater.curvature[""].a, updater.curvature[""].g))
    torch.testing.assert_close(torch.kron(*reversed(factors[0])), fishers[0], rtol=0, atol=1e-12)
    fresh = make(runtime, model, kfac_every=2)
    for batch in rounds[1]:
        step(fresh, batch)
    fresh.cl_postprocessing(fresh.setup, NO_IDS)
    new = (fresh.curvature[""].a, fresh.curvature[""].g)
    for i in range(2):
        expected = 0.75 * factors[0][i] + 0.25 * new[i]
        torch.testing.assert_close(factors[1][i], expected, rtol=0, atol=1e-12)


def test_only_counted_training_passes_touch_the_statistics(runtime: Runtime) -> None:
    torch.manual_seed(0)
    updater = make(runtime, nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)))
    batch = data(4)

    def others() -> None:
        with updater.anchor.swapped_in(), torch.inference_mode():
            updater.model(batch.x)
        updater.model.train()
        criterion(updater.model(batch.x), batch.y).sum().backward()
        updater.model.eval()
        updater.model(batch.x)
        updater.model.train()

    others()
    assert not updater.sums
    step(updater, batch)
    before = {name: value.clone() for name, value in updater.sums.items()}
    others()
    updater.update_pre_fwd_bwd()  # step 1 of 20: not counted
    updater.fwd_bwd(batch, None)
    empty = Batch(batch.ids[:0], batch.x[:0], batch.y[:0], 4)
    updater.steps = 0
    step(updater, empty)  # a rank's empty part: a row of zeros in eval mode
    assert updater.samples == len(batch) + 4
    for name, value in updater.sums.items():
        assert torch.equal(value, before[name])
    assert not any(m._forward_hooks for m in updater.model.modules())
    updater.cl_postprocessing(updater.setup, NO_IDS)
    committed = {name: held.a for name, held in updater.curvature.items()}
    others()
    updater.cl_postprocessing(updater.setup, NO_IDS)  # a round without steps
    assert all(torch.equal(committed[n], held.a) for n, held in updater.curvature.items())


def test_damped_step_is_stable_where_the_explicit_one_diverges(runtime: Runtime) -> None:
    distance = {}
    for mode in ("damped", "explicit"):
        torch.manual_seed(0)
        model = nn.Linear(4, 3).double()
        updater = make(runtime, model, penalty_step=mode)
        step(updater, data(4))
        updater.cl_postprocessing(updater.setup, NO_IDS)
        updater.cl_preprocessing()
        updater.curvature[""] = updater.curvature[""]._replace(l_a=1e4 * updater.curvature[""].l_a)
        start = model.weight.detach().clone()
        model.weight.data.add_(1.0)
        for _ in range(20):
            updater.setup.optimizer.zero_grad()
            updater.update_post_fwd_bwd()
            updater.setup.optimizer.step()
        distance[mode] = float((model.weight.detach() - start).norm())
    assert distance["damped"] < 12**0.5 + 1e-9
    assert distance["explicit"] > 1e10


def test_other_parameters_and_frozen_ones_are_left_alone_and_named(
    runtime: Runtime, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="distcl"):
        updater = make(runtime, CNN(DataSpec((1, 8, 8), 3), channels=(4, 4, 4)))
    assert "without a penalty: body.1.weight, body.1.bias" in caplog.text
    step(updater, data(1, 8, 8))
    updater.cl_postprocessing(updater.setup, NO_IDS)
    found = penalty(updater)
    moved = {name for name, (_, gradient) in found.items() if gradient.abs().max() > 0}
    assert moved == {n for layer in updater.layers for n in layer.parameters}
    assert "body.0.weight" in moved
    assert "body.1.weight" not in moved

    updater = make(runtime, awkward())  # frozen and tied weights, of which a bias alone trains
    step(updater, data(7))
    updater.cl_postprocessing(updater.setup, NO_IDS)
    tied = next(layer for layer in updater.layers if layer.name == "tied")
    assert tied.parameters == ["tied.bias"]
    shift, gradient = penalty(updater)["tied.bias"]
    held = updater.curvature["tied"]
    torch.testing.assert_close(held.a, torch.ones(1, 1, dtype=torch.float64), rtol=0, atol=1e-12)
    fisher = STRENGTH * held.g
    damped = fisher @ torch.linalg.inv(torch.eye(len(fisher)) + LR * fisher)
    torch.testing.assert_close(gradient, damped @ shift, rtol=0, atol=1e-9)


def test_a_layer_that_a_round_does_not_use_keeps_its_factors(runtime: Runtime) -> None:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.heads = nn.ModuleList(nn.Linear(4, 3) for _ in range(3))
            self.active = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.heads[self.active](x)

    torch.manual_seed(0)
    model = Heads()
    updater = make(runtime, model)
    for active in (0, 1):
        model.active = active
        step(updater, data(4))
        updater.cl_postprocessing(updater.setup, NO_IDS)
        if active == 0:
            first = updater.curvature["heads.0"]
    assert set(updater.curvature) == {"heads.0", "heads.1"}
    assert updater.curvature["heads.0"] is first
    assert float(penalty(updater)["heads.2.weight"][1].abs().max()) == 0


def test_state_saved_in_the_middle_of_a_round_continues_exactly(runtime: Runtime) -> None:
    def build() -> KFACOnline:
        torch.manual_seed(0)
        return make(
            runtime, nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)), kfac_every=2
        )

    def rest(updater: KFACOnline) -> dict[str, torch.Tensor]:
        for seed in (7, 8):
            step(updater, data(4, seed=seed))
        updater.update_post_fwd_bwd()
        grads = {n: p.grad.clone() for n, p in updater.model.named_parameters()}
        updater.cl_postprocessing(updater.setup, NO_IDS)
        return grads | {n: held.u_a for n, held in updater.curvature.items()}

    one = build()
    step(one, data(4, seed=3))
    one.cl_postprocessing(one.setup, NO_IDS)
    one.cl_preprocessing()
    for seed in (4, 5, 6):
        step(one, data(4, seed=seed))
    one.model[0].weight.data.add_(0.1)
    saved = io.BytesIO()
    torch.save({"updater": one.state_dict(), "model": one.model.state_dict()}, saved)
    saved.seek(0)
    state = torch.load(saved, weights_only=True)
    other = build()
    other.model.load_state_dict(state["model"])
    other.load_state_dict(state["updater"])
    expected, actual = rest(one), rest(other)
    assert expected.keys() == actual.keys()
    assert all(torch.equal(value, actual[name]) for name, value in expected.items())


class OwnForward(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(input)


def tied_linears() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    return model


def tied_embedding() -> nn.Module:
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5))
    model[1].weight = model[0].weight
    return model


REFUSED = [
    (lambda: nn.Sequential(nn.Conv2d(4, 4, 1, groups=2)), r"'0' \(Conv2d\).*with 2 groups"),
    (lambda: nn.Sequential(nn.ConvTranspose2d(4, 4, 1)), r"'0' \(ConvTranspose2d\)"),
    (lambda: nn.Sequential(nn.Linear(4, 4), nn.Conv1d(4, 4, 1)), r"'1' \(Conv1d\)"),
    (lambda: nn.Sequential(nn.LSTM(4, 4)), r"'0' \(LSTM\).*recurrent"),
    (lambda: nn.Sequential(nn.Bilinear(4, 4, 2)), r"'0' \(Bilinear\)"),
    (lambda: nn.TransformerEncoderLayer(4, 2), r"'self_attn' \(MultiheadAttention\)"),
    (lambda: nn.Sequential(OwnForward(4, 4)), r"'0' \(OwnForward\).*a forward of its own"),
    (lambda: nn.Sequential(weight_norm(nn.Linear(4, 4))), r"'0' .*computed from other parameters"),
    (tied_linears, r"'0' \(Linear\).*shares weights with '1'"),
    (tied_embedding, r"'1' \(Linear\).*shares weights with '0'"),
    (lambda: nn.LayerNorm(4), r"needs a model with a trainable nn.Linear or nn.Conv2d"),
]


@pytest.mark.parametrize(("build", "message"), REFUSED, ids=[m for _, m in REFUSED])
def test_layers_that_cannot_be_handled_are_refused_by_name(
    build: Any, message: str, runtime: Runtime
) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        make(runtime, build())
    assert "continual_learning.update_mode = 'kfac_online'" in str(error.value)
    frozen = nn.Sequential(build().requires_grad_(False), nn.Linear(4, 3))
    assert [layer.name for layer in make(runtime, frozen).layers] == ["1"]


def test_fp16_is_refused(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "precision", "fp16")
    with pytest.raises(ConfigError, match=r"does not work with run\.precision = 'fp16'"):
        make(runtime, nn.Linear(4, 3))


def test_rows_that_belong_to_no_single_sample_are_refused(runtime: Runtime) -> None:
    class Prompt(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.project = nn.Linear(2, 3)
            self.prompt = nn.Parameter(torch.ones(1, 2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x[:, :3] + self.project(self.prompt)

    updater = make(runtime, Prompt())
    with pytest.raises(ConfigError, match="layer 'project' has 1 rows of input for 6 samples"):
        step(updater, data(4))


def test_an_input_changed_in_place_is_refused(runtime: Runtime) -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3)
            self.layer.weight.requires_grad_(False)  # so autograd does not need its input

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = x * 2
            out = self.layer(h)
            h.add_(1)
            return out

    with pytest.raises(UsageError, match="changes the input of layer 'layer' in place"):
        step(make(runtime, InPlace()), data(4))


def test_factors_that_are_not_finite_end_the_run(runtime: Runtime) -> None:
    updater = make(runtime, nn.Linear(4, 3))
    batch = data(4)
    batch.x[0, 0] = float("inf")
    step(updater, batch)
    with pytest.raises(DivergenceError, match="the factors of layer '' are not finite"):
        updater.cl_postprocessing(updater.setup, NO_IDS)


@pytest.mark.parametrize("world", [1, 2, 3, 4, 64])
def test_layers_are_dealt_out_evenly_and_each_once(world: int) -> None:
    sizes = [(3, 5), (50, 2), (20, 20), (20, 20), (1, 1), (31, 7), (20, 20), (40, 10), (20, 21)]
    layers = [
        Layer(str(i), nn.Linear(n, m, bias=False), f"{i}.weight", None)
        for i, (n, m) in enumerate(sizes)
    ]
    owners = deal_layers(layers, world)
    assert owners == deal_layers(layers, world)
    assert owners.keys() == {layer.name for layer in layers}
    held = [0] * world
    for layer in layers:
        assert layer.elements == layer.inputs**2 + layer.outputs**2
        held[owners[layer.name]] += layer.elements
    assert max(held) <= sum(held) / world + max(layer.elements for layer in layers)
    if world == 4:
        assert max(held) <= 1.25 * sum(held) / world
