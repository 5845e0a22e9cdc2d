import re
import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distcl import load_config
from distcl.config import Config
from distcl.config.load import GONE, SECTIONS, allowed, load_with_origins, to_toml
from distcl.config.reference import reference, template
from distcl.errors import ConfigError

ROOT = Path(__file__).parents[3]


def load(path=None, *overrides, **environ):
    return load_config(path, overrides, environ)


@pytest.fixture
def toml(tmp_path):
    def write(text: str | bytes) -> Path:
        path = tmp_path / "a.toml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


def message(path=None, *overrides, **environ) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides, environ)
    assert caught.value.exit_code == 2
    assert str(caught.value).count("\n") <= 1
    return str(caught.value)


def test_defaults_come_from_the_models():
    assert load() == Config()


def test_later_places_win(toml):
    path = toml("[run]\nseed = 1\npoll_steps = 1\ntimeout_seconds = 1\n")
    environ = {"DISTCL_RUN__SEED": "2", "DISTCL_RUN__POLL_STEPS": "2", "DISTCL_DEBUG": "1"}
    config, origins = load_with_origins(path, ["run.seed=3"], environ)
    assert (config.run.seed, config.run.poll_steps, config.run.timeout_seconds) == (3, 2, 1.0)
    assert {key: origins[f"run.{key}"] for key in SECTIONS["run"].model_fields} == {
        "seed": "--set",
        "poll_steps": "DISTCL_RUN__POLL_STEPS",
        "timeout_seconds": f"{path}:4",
        "out": "default",
        "precision": "default",
        "max_minutes": "default",
        "report": "default",
    }


def test_every_key_has_an_origin():
    _, origins = load_with_origins(None, (), {})
    assert set(origins) == {f"{s}.{k}" for s, m in SECTIONS.items() for k in m.model_fields}
    assert set(origins.values()) == {"default"}


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("run.precision=fp64", "precision", "fp64"),
        ("run.precision='fp64'", "precision", "fp64"),
        ("run.seed=7", "seed", 7),
        (" run.seed = 7 ", "seed", 7),
        ("run.timeout_seconds=3", "timeout_seconds", 3.0),
        ("run.out=a=b", "out", "a=b"),
        ("run.out=2024", "out", "2024"),
        ("run.out=", "out", ""),
        ("run.out=[run]\nseed=1", "out", "[run]\nseed=1"),
    ],
)
def test_set_takes_toml_or_a_bare_string(override, key, value):
    assert getattr(load(None, override).run, key) == value


def test_options_merge_key_by_key(toml):
    path = toml("[model.options]\nhidden = [8]\nbias = true\n")
    environ = {"DISTCL_MODEL__OPTIONS__HIDDEN": "[64, 64]"}
    config, origins = load_with_origins(path, ["model.options.deep.er=1"], environ)
    assert config.model.options == {"hidden": [64, 64], "bias": True, "deep": {"er": 1}}
    assert str(origins["model.options.hidden"]) == "DISTCL_MODEL__OPTIONS__HIDDEN"
    assert str(origins["model.options.bias"]) == f"{path}:3"
    assert load(path, "model.options={}").model.options == {}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("seed = 3", "a.toml:1: unknown section or key 'seed', did you mean 'run.seed'?"),
        ("\n[trainig]\nepochs = 1", ":2: unknown section 'trainig', did you mean 'training'?"),
        ("[run]\nsede = 1", "a.toml:2: unknown key 'run.sede', did you mean 'run.seed'?"),
        ("[training]\nlr = 1.0", "unknown key 'training.lr', did you mean 'optimizer.lr'?"),
        ("run = 3", "a.toml:1: run must be a section, [run]"),
        ("[[run]]\nseed = 1", "a.toml:1: run must be a section, [run]"),
        ("[run]\nseed = 'x'", "a.toml:2: run.seed is 'x', but must be a whole number in [0, 2^63)"),
        ("[run]\nseed = 1.0", "run.seed is 1.0, but must be a whole number"),
        ("[run]\nseed = true", "run.seed is true, but must be a whole number"),
        ("[optimizer]\nlr = '0.1'", "optimizer.lr is '0.1', but must be a number, more than 0"),
        ("[data]\npin_memory = 1", "data.pin_memory is 1, but must be true or false"),
        ("[stream]\ndrift = 3", "stream.drift is 3, but must be a text or a list"),
        ("[model]\noptions = 3", "model.options is 3, but must be a table"),
        ("[run]\nprecision = 'bf61'", "one of fp32, bf16, fp16, fp64, did you mean 'bf16'?"),
        ("[stream]\nsource = 'digit'", "stream.source: unknown source 'digit', did you mean"),
        ("[stream]\ndrift = ['blur', 'rotat']", "unknown drift 'rotat', did you mean 'rotate'?"),
        ("[training]\nbatch_size = 0", "training.batch_size is 0, but must be a whole number, at"),
        (
            "[continual_learning]\nimportance_alpha = -1.0",
            "is -1.0, but must be a number, at l",
        ),
        ("[continual_learning]\nimportance_alpha = nan", "alpha is nan, but must be finite"),
        ("[continual_learning]\ncurrent_ratio = 0", "is 0, but must be a number in (0, 1]"),
        ("[continual_learning]\ncurrent_ratio = 1.5", "is 1.5, but must be a number in (0, 1]"),
        ("[run]\nseed = -1\npoll_steps = 0", "run.seed is -1, but must be a whole number"),
        ("[run]\nseed = abc", ":2:8: not valid TOML: Invalid value (is a text without quotes?)"),
        ("[run\n", "a.toml:1:5: not valid TOML: Expected ']'"),
        ("x = " + "[" * 20_000, "a.toml"),
        ("[run]\nseed = 1" + "0" * 5000, "a.toml"),
        (b"[run]\nout = '\xff'", "a.toml: not UTF-8 text (byte 13)"),
    ],
)
def test_a_bad_file_gets_a_sentence(toml, text, expected):
    path = toml(text)
    assert expected in message(path)
    assert str(path) in message(path)


def test_every_wrong_key_is_named(toml):
    text = "[run]\nseed = -1\n[training]\nepochs = 0\nbatch_size = 'x'\n"
    assert message(toml(text)).endswith("\nalso wrong: training.batch_size, training.epochs")


def test_missing_files_and_folders_are_named(tmp_path):
    assert message(tmp_path / "no.toml") == f"{tmp_path}/no.toml: no such file"
    assert message(tmp_path) == f"{tmp_path}: is a directory, not a TOML file"


def test_a_byte_order_mark_is_no_error(toml):
    assert load(toml(b"\xef\xbb\xbf[run]\nseed = 4\n")).run.seed == 4


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("run.seed", "--set run.seed: must have the form section.key=value"),
        ("=3", "--set =3: must have the form section.key=value"),
        ("run=3", "'run' is a section; give a key in it, as run.KEY"),
        ("seed=3", "unknown section or key 'seed', did you mean 'run.seed'?"),
        ("run.sed=3", "unknown key 'run.sed', did you mean 'run.seed'?"),
        ("run.seed.x=3", "run.seed is one value, with no 'x' in it"),
        ("run.seed=x", "--set: run.seed is 'x', but must be a whole number in [0, 2^63)"),
        ("parallel.strategy=ddp9", "parallel.strategy is 'ddp9', but must be"),
    ],
)
def test_a_bad_override_gets_a_sentence(override, expected):
    assert expected in message(None, override)


def test_options_inside_a_value_that_is_no_table_are_refused():
    assert "model.options.a is not a table" in message(
        None, "model.options.a=1", "model.options.a.b=2"
    )


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("DISTCL_RUN__SEDE", "1", "DISTCL_RUN__SEDE: unknown key 'run.sede', did you mean"),
        ("DISTCL_SEED", "1", "DISTCL_SEED: unknown section or key 'seed', did you mean"),
        ("DISTCL_RUN__SEED", "", "DISTCL_RUN__SEED: run.seed is '', but must be a whole number"),
    ],
)
def test_a_bad_variable_gets_a_sentence(name, value, expected):
    assert expected in message(None, **{name: value})


def test_other_variables_are_ignored():
    assert load(None, PATH="x", DISTCL="x", NOT_DISTCL_RUN__SEED="5") == Config()


def test_combinations_are_checked(toml):
    text = "[run]\nprecision = 'fp64'\n[stream]\ntest_fraction = 0.5\n"
    assert load(toml(text)).run.precision == "fp64"


@pytest.mark.parametrize("dotted", GONE)
def test_a_key_that_moved_or_went_is_told_with_its_new_place(dotted, toml):
    section, key = dotted.split(".")
    path = toml(f"[{section}]\n{key} = 1")
    told = f"{dotted} {GONE[dotted]}"
    with pytest.raises(ConfigError, match=re.escape(f"{path}:2: {told}")):
        load(path)
    with pytest.raises(ConfigError, match=re.escape(f"--set: {told}")):
        load(None, f"{dotted}=1")
    named = re.findall(r"\b(\w+)\.(\w+)\b", GONE[dotted])
    assert all(n in SECTIONS[s].model_fields for s, n in named if s in SECTIONS)


def test_all_keys_that_went_are_told_at_once(toml):
    path = toml("[stream]\ntransition = 'abrupt'\n[training]\non_divergence = 'stop'\n")
    with pytest.raises(ConfigError) as caught:
        load(path)
    first, second = str(caught.value).splitlines()
    assert first.startswith(f"{path}:2: stream.transition is gone: 'abrupt' is stream.transition_f")
    assert second.startswith(f"{path}:4: training.on_divergence is gone: 'stop' is training.max_r")


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.toml")), ids=lambda p: p.stem)
def test_shipped_configs_load_and_round_trip(path, toml):
    config = load(path)
    assert load(toml(to_toml(config))) == config


def test_written_origins_are_comments(toml):
    config, origins = load_with_origins(None, ["model.options.hidden=[2]"], {})
    text = to_toml(config, origins)
    assert "seed = 0 # default\n" in text
    assert "hidden = [2] # --set\n" in text
    assert load(toml(text)) == config


_values = st.recursive(
    st.text(st.characters(exclude_categories=["Cs"]))
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False)
    | st.booleans()
    | st.datetimes()
    | st.dates(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text('ab.c-" é'), inner),
    max_leaves=8,
)


@given(options=st.dictionaries(st.text('ab.c-" é'), _values, max_size=4))
def test_any_options_round_trip(options, tmp_path_factory):
    config = Config.model_validate({"model": {"options": options}})
    path = tmp_path_factory.getbasetemp() / "round.toml"
    path.write_text(to_toml(config), encoding="utf-8")
    assert load(path) == config


@given(data=st.binary(max_size=80) | st.text("[]{}=.\"'\\\n #arunsed01-", max_size=40))
def test_no_file_breaks_the_reader(data, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "fuzz.toml"
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    try:
        load(path)
    except ConfigError as error:
        assert str(path) in str(error)


@given(text=st.text(max_size=30), key=st.sampled_from(["run.seed", "run.out", "model.options.x"]))
def test_no_override_breaks_the_reader(text, key):
    try:
        load(None, f"{key}={text}")
    except ConfigError as error:
        assert key in str(error)


def test_the_commented_file_sets_the_recommended_recipe_and_nothing_else(toml):
    text = template(every=True)
    loaded = load(toml(text))
    assert load(toml(template())) == loaded
    assert len(template().splitlines()) <= 60
    recipe = {
        "training": {"ema": 0.98},
        "continual_learning": {
            "update_mode": "er",
            "importance_weighting": True,
            "importance_alpha": 2.0,
        },
        "priority": {
            "signal": "entropy",
            "source": "online",
            "refresh_steps": 10,
            "target": "history",
            "draw": "credit",
            "gate": 0.6,
            "min_ess": 0.5,
            "min_score": 1e-4,
        },
    }
    assert loaded == Config.model_validate(recipe)
    assert not Config().continual_learning.importance_weighting  # the defaults stay off
    bare = re.sub(r"^# (\w+ = .*)$", r"\1", text, flags=re.MULTILINE)
    assert load(toml(bare)) == loaded
    written = tomllib.loads(bare)
    assert {s: set(t) for s, t in written.items()} == {
        s: set(m.model_fields) for s, m in SECTIONS.items()
    }
    unset = re.sub(r"^(?!#|\[).*$", "", text, flags=re.MULTILINE)
    shown = load(toml(re.sub(r"^# (\w+ = .*)$", r"\1", unset, flags=re.MULTILINE)))
    assert shown == Config()  # what stands behind '#' is the default


def test_every_key_is_described():
    for section, model in SECTIONS.items():
        for key, field in model.model_fields.items():
            assert field.description, f"{section}.{key}"
            assert allowed(section, key)


def test_the_reference_is_fresh():
    written = (ROOT / "docs" / "CONFIG.md").read_text(encoding="utf-8")
    assert written == reference(), "type: distcl config --reference > docs/CONFIG.md"
