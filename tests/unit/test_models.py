import logging
import math
import sys

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import save_file, save_model
from sklearn.datasets import load_digits
from torch import nn
from torch.func import functional_call, grad, vmap

from distcl.config import ModelConfig
from distcl.errors import CheckpointError, ConfigError
from distcl.losses import cross_entropy
from distcl.models import create_model
from distcl.types import DataSpec

SMALL = {
    "mlp": {"hidden": [16], "activation": "tanh"},
    "cnn": {"channels": [4, 8, 12]},
    "resnet18": {"width": 4},
    "vit_tiny": {"dim": 12, "depth": 2},
}
DIGITS = DataSpec((8, 8), 10)


def build(name, spec=DIGITS, seed=0, **options):
    return create_model(ModelConfig(name=name, options={**SMALL[name], **options}), spec, seed)


def save(model, path, **changed):
    save_file({**model.state_dict(), **changed}, path)
    return ModelConfig(name="mlp", options=SMALL["mlp"], pretrained=str(path))


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("shape", [(8, 8), (1, 8, 8), (3, 12, 20), (1, 28, 28), (3, 64, 64)])
def test_images_of_any_size_give_one_output_per_class(name, shape):
    model = build(name, DataSpec(shape, 7))
    assert model(torch.randn(3, *shape)).shape == (3, 7)
    assert model(torch.randn(1, *shape)).shape == (1, 7)


@pytest.mark.parametrize("name", SMALL)
def test_regression_gives_one_output_per_value_of_a_target(name):
    assert build(name, DataSpec((8, 8), 0, (2, 3)))(torch.randn(4, 8, 8)).shape == (4, 6)
    assert build(name, DataSpec((8, 8), 0))(torch.randn(4, 8, 8)).shape == (4, 1)


def test_mlp_takes_any_shape_and_may_be_linear():
    for shape in [(), (5,), (2, 3, 4, 5)]:
        linear = build("mlp", DataSpec(shape, 2), hidden=[])
        assert linear(torch.randn(6, *shape)).shape == (6, 2)
        assert sum(p.numel() for p in linear.parameters()) == 2 * (math.prod(shape) + 1)


@pytest.mark.parametrize("name", SMALL)
def test_an_empty_batch_goes_forward_and_back(name):
    model = build(name)
    out = model(torch.randn(0, 8, 8))
    out.sum().backward()
    assert out.shape == (0, 10)
    assert all(torch.count_nonzero(p.grad) == 0 for p in model.parameters())


@pytest.mark.parametrize(
    ("name", "options"), [*((n, {}) for n in SMALL), ("resnet18", {"norm": "batch"})]
)
def test_per_sample_gradients_equal_single_backward_passes_in_float64(name, options):
    model = build(name, **options).double()
    model.eval() if options else model.train()
    x, y = torch.randn(3, 8, 8, dtype=torch.float64), torch.tensor([1, 9, 4])
    params = {n: p.detach() for n, p in model.named_parameters()}
    buffers = dict(model.named_buffers())

    def loss(params, x, y):
        out = functional_call(model, (params, buffers), (x[None],))
        return cross_entropy(out, y[None])[0]

    found = vmap(grad(loss), in_dims=(None, 0, 0))(params, x, y)
    for k in range(3):
        wanted = torch.autograd.grad(
            nn.functional.cross_entropy(model(x[k : k + 1]), y[k : k + 1]), model.parameters()
        )
        for got, want in zip(found.values(), wanted, strict=True):
            torch.testing.assert_close(got[k], want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", SMALL)
def test_a_sample_does_not_depend_on_its_batch(name):
    model = build(name).double()
    x = torch.randn(5, 8, 8, dtype=torch.float64)
    alone = torch.cat([model(x[k : k + 1]) for k in range(5)])
    torch.testing.assert_close(model(x), alone, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", SMALL)
def test_weights_depend_on_the_seed_alone_and_leave_random_numbers_alone(name):
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    first, second, other = build(name), build(name), build(name, seed=1)
    assert torch.equal(torch.rand(3), wanted)
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(first.head.weight, other.head.weight)


def test_sizes_are_those_of_the_papers():
    def size(model):
        return sum(p.numel() for p in model.parameters())

    resnet = create_model(ModelConfig(name="resnet18"), DataSpec((3, 32, 32), 10), 0)
    batch = ModelConfig(name="resnet18", options={"norm": "batch"})
    assert size(resnet) == size(create_model(batch, DataSpec((3, 32, 32), 10), 0)) == 11_173_962
    vit = create_model(ModelConfig(name="vit_tiny"), DataSpec((3, 32, 32), 10), 0)
    blocks = 12 * (12 * 192**2 + 13 * 192)  # weights, then biases and norms
    assert size(vit) == blocks + (48 + 1) * 192 + 64 * 192 + 2 * 192 + 193 * 10


@pytest.mark.parametrize("name", SMALL)
def test_a_model_learns_digits(name):
    data = load_digits()
    x = torch.from_numpy(data.data).float().reshape(-1, 8, 8) / 16
    y = torch.from_numpy(data.target)
    options = {"mlp": {"hidden": [64]}, "cnn": {"channels": [8, 16, 32]}}.get(name, {})
    if name == "vit_tiny":
        options = {"patch": 2, "dim": 48}
    model = build(name, **options)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    rng = np.random.default_rng(0)
    for _ in range(150):
        rows = torch.from_numpy(rng.integers(0, 1400, 64))
        optimizer.zero_grad()
        cross_entropy(model(x[rows]), y[rows]).mean().backward()
        optimizer.step()
    accuracy = (model(x[1400:]).argmax(1) == y[1400:]).float().mean()
    assert accuracy > 0.8


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("mlp", {"hiden": [4]}, "model 'mlp' has no option 'hiden', did you mean 'hidden'?"),
        ("mlp", {"hidden": [0]}, r"model\.options\.hidden\.0: .* greater than or equal to 1"),
        ("mlp", {"activation": "sine"}, r"model\.options\.activation: .*'relu', 'gelu' or 'tanh'"),
        ("cnn", {"channels": [4, 8]}, r"model\.options\.channels: .* at least 3 items"),
        ("resnet18", {"norm": "layer"}, r"model\.options\.norm: .*'group' or 'batch'"),
        ("resnet18", {"width": "wide"}, r"model\.options\.width: .* valid integer.*'wide'"),
        ("vit_tiny", {"patch": 3}, r"model\.options\.patch: must divide the image, 8×8"),
        ("vit_tiny", {"dim": 100}, r"model\.options\.dim: must be a multiple of heads \(3\)"),
    ],
)
def test_a_wrong_option_is_named(name, options, message):
    with pytest.raises(ConfigError, match=message):
        create_model(ModelConfig(name=name, options=options), DIGITS, 0)


def test_a_model_of_images_refuses_vectors():
    with pytest.raises(ConfigError, match=r"'cnn' takes images.*shape \[64\]; 'mlp' takes any"):
        build("cnn", DataSpec((64,), 10))


def test_a_users_factory_gets_spec_and_options_and_must_return_a_module(tmp_path, monkeypatch):
    (tmp_path / "their_model.py").write_text(
        "from torch import nn\n"
        "def wide(spec, width=2):\n"
        "    return nn.Linear(spec.x_shape[0], width * spec.classes)\n"
        "def needs(spec, depth):\n"
        "    pass\n"
        "def wrong(spec):\n"
        "    return spec\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    config = ModelConfig(name="their_model:wide", options={"width": 3})
    assert create_model(config, DataSpec((4,), 5), 0).weight.shape == (15, 4)
    with pytest.raises(ConfigError, match=r"wrong' must return a torch\.nn\.Module, not"):
        create_model(ModelConfig(name="their_model:wrong"), DIGITS, 0)
    with pytest.raises(ConfigError, match=r"'their_model:needs': missing .*'depth'"):
        create_model(ModelConfig(name="their_model:needs"), DIGITS, 0)
    with pytest.raises(ConfigError, match="'their_model:absent' cannot be imported"):
        create_model(ModelConfig(name="their_model:absent"), DIGITS, 0)
    sys.modules.pop("their_model")


def test_timm_that_is_absent_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)  # what the import system does for "not there"
    with pytest.raises(ConfigError, match=r"model 'timm:resnet18' needs the package 'timm'.*pip"):
        create_model(ModelConfig(name="timm:resnet18"), DataSpec((3, 32, 32), 7), 0)
    with pytest.raises(
        ConfigError, match=r"'timm:resnet18' takes images \[C, H, W\].*shape \[64\]"
    ):
        create_model(ModelConfig(name="timm:resnet18"), DataSpec((64,), 7), 0)


def test_a_timm_model_takes_the_streams_images_and_classes():
    try:
        import timm  # noqa: F401
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"timm cannot be imported: {error}")
    spec = DataSpec((1, 32, 32), 7)
    model, again = (create_model(ModelConfig(name="timm:resnet10t"), spec, 0) for _ in range(2))
    assert model(torch.randn(2, 1, 32, 32)).shape == (2, 7)
    assert all(map(torch.equal, model.parameters(), again.parameters()))
    with pytest.raises(ConfigError, match="timm has no model 'resnet10x', did you mean 'resnet10t"):
        create_model(ModelConfig(name="timm:resnet10x"), spec, 0)
    with pytest.raises(ConfigError, match=r"'timm:resnet10t' with {'nope': 3}: .*'nope'"):
        create_model(ModelConfig(name="timm:resnet10t", options={"nope": 3}), spec, 0)


def test_pretrained_weights_are_loaded(tmp_path):
    other = build("mlp", seed=9)
    model = create_model(save(other, tmp_path / "w.safetensors"), DIGITS, 0)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_tied_weights_may_be_saved_once(tmp_path, monkeypatch):
    (tmp_path / "their_tied.py").write_text(
        "from torch import nn\n"
        "def make(spec):\n"
        "    model = nn.ModuleDict({'first': nn.Linear(3, 3), 'second': nn.Linear(3, 3)})\n"
        "    model['second'].weight = model['first'].weight\n"
        "    return model\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    saved = create_model(ModelConfig(name="their_tied:make"), DIGITS, 1)
    save_model(saved, str(tmp_path / "w.safetensors"))
    config = ModelConfig(name="their_tied:make", pretrained=str(tmp_path / "w.safetensors"))
    model = create_model(config, DIGITS, 0)
    assert torch.equal(model["first"].weight, saved["first"].weight)
    assert model["second"].weight is model["first"].weight
    save_file(saved.state_dict() | {"second.weight": torch.ones(3, 3)}, tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError, match=r"'first\.weight' and 'second\.weight' differ"):
        create_model(config, DIGITS, 0)
    sys.modules.pop("their_tied")


def test_a_pretrained_file_that_does_not_fit_is_named_with_its_first_bad_key(tmp_path):
    model, path = build("mlp"), tmp_path / "w.safetensors"
    bias = model.state_dict()["head.bias"]
    state = model.state_dict()
    del state["head.bias"]
    save_file(state, path)
    missing = ModelConfig(name="mlp", options=SMALL["mlp"], pretrained=str(path))
    with pytest.raises(CheckpointError, match=r"w\.safetensors' lacks 'head\.bias'"):
        create_model(missing, DIGITS, 0)
    for changed, message in [
        ({"tail": bias.clone()}, "has 'tail', which the model has not"),
        ({"head.bias": bias[:3].clone()}, r"'head\.bias' has shape \[3\], the model's has \[10\]"),
        ({"head.bias": bias.int()}, r"'head\.bias' is int, the model's is float"),
        ({"head.bias": bias / 0}, r"'head\.bias' holds NaN or infinite"),
    ]:
        with pytest.raises(CheckpointError, match=rf"w\.safetensors'.*{message}"):
            create_model(save(model, path, **changed), DIGITS, 0)


def test_a_head_is_left_out_by_name_and_named(tmp_path, caplog):
    caplog.set_level(logging.INFO, "distcl")
    model, path = build("mlp", seed=9), tmp_path / "w.safetensors"
    config = save(model, path, **{"head.weight": torch.zeros(3, 2), "head.extra": torch.zeros(1)})

    def load(*skip):
        return create_model(config.model_copy(update={"pretrained_skip": list(skip)}), DIGITS, 0)

    loaded, fresh = load("head.*").state_dict(), build("mlp", seed=0).state_dict()
    for name, value in loaded.items():
        assert torch.equal(value, (fresh if "head" in name else model.state_dict())[name]), name
    assert "leaves out head.bias, head.extra, head.weight" in caplog.text
    with pytest.raises(CheckpointError, match=r"has 'head\.extra', .*; .*'head\.weight' has shape"):
        load()
    with pytest.raises(ConfigError, match=r"model\.pretrained_skip: 'haed\.\*' matches nothing"):
        load("head.*", "haed.*")
    with pytest.raises(ConfigError, match="leaves nothing"):
        load("*")
    with pytest.raises(ValidationError, match="pretrained_skip needs"):
        ModelConfig(pretrained_skip=["head.*"])


def test_a_pretrained_file_that_cannot_be_read_is_named(tmp_path):
    def load(name):
        config = ModelConfig(name="mlp", options=SMALL["mlp"], pretrained=str(tmp_path / name))
        create_model(config, DIGITS, 0)

    with pytest.raises(ConfigError, match=r"there is no file '.*absent\.safetensors'"):
        load("absent.safetensors")
    with pytest.raises(ConfigError, match=r"must be a \.safetensors file, not '.*weights\.pt'"):
        load("weights.pt")
    whole = tmp_path / "whole.safetensors"
    save_file(build("mlp").state_dict(), whole)
    for name, content in [("text", b"hello, world"), ("empty", b""), ("cut", None)]:
        bad = tmp_path / f"{name}.safetensors"
        bad.write_bytes(whole.read_bytes()[:-9] if content is None else content)
        with pytest.raises(CheckpointError, match=rf"'.*{name}\.safetensors' is not a valid"):
            load(bad.name)
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(ConfigError, match=r"cannot read '.*folder\.safetensors'"):
        load("folder.safetensors")
