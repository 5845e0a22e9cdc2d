import base64
import json
import subprocess
import sys

import numpy as np
import pytest
from river import drift

from distcl import registry
from distcl.errors import CheckpointError, ConfigError, DivergenceError

OPTIONS = {
    "adwin": {},
    "kswin": {"window_size": 60, "stat_size": 20},
    "page_hinkley": {"threshold": 20.0},
    "ensemble": {"members": [{"name": "adwin", "delta": 0.05}, "kswin", "page_hinkley"]},
}


def make(name, **options):
    return registry.create("detector", name, options={**OPTIONS[name], **options})


def errors(*parts, seed=0):
    """Return 0/1 errors: parts are (share of errors, how many)."""
    rng = np.random.default_rng(seed)
    return [float(v) for p, n in parts for v in rng.random(n) < p]


def fires(detector, values):
    return [k for k, value in enumerate(values) if detector.update(value)]


MIXED = errors((0.1, 500), (0.8, 400), (0.1, 500), (0.8, 300), (0.1, 300))


@pytest.mark.parametrize("name", OPTIONS)
def test_a_rise_is_found_soon_and_a_steady_metric_is_left_alone(name):
    found = fires(make(name), errors((0.1, 1000), (0.6, 500)))
    assert len(found) == 1
    assert 1000 < found[0] < 1150


@pytest.mark.parametrize("name", ["adwin", "kswin", "page_hinkley"])
def test_a_fall_counts_only_with_direction_both(name):
    falling = errors((0.95, 1000), (0.1, 500))
    assert fires(make(name), falling) == []
    assert 1000 < fires(make(name, direction="both"), falling)[0] < 1150


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("adwin", drift.ADWIN()),
        ("kswin", drift.KSWIN(**OPTIONS["kswin"], seed=0)),
        ("page_hinkley", drift.PageHinkley(threshold=20.0)),
    ],
)
def test_both_directions_together_are_rivers_own_detections(name, plain):
    wanted = []
    for k, value in enumerate(MIXED):
        plain.update(value)
        wanted += [k] if plain.drift_detected else []
    assert len(wanted) >= 4
    assert fires(make(name, direction="both"), MIXED) == wanted


@pytest.mark.parametrize("direction", ["up", "both"])
@pytest.mark.parametrize("name", OPTIONS)
def test_a_restored_detector_goes_on_bit_for_bit(name, direction):
    options = {} if name == "ensemble" else {"direction": direction}
    whole = make(name, **options)
    rng = np.random.default_rng(3)
    repeats = 50 if name in ("adwin", "page_hinkley") else 1  # the others are slow
    values = [v + 0.05 * float(rng.standard_normal()) for v in MIXED * repeats]
    wanted = fires(whole, values)
    assert len(wanted) >= 2
    cuts = sorted(
        {
            0,
            1,
            7,
            50,
            899,
            wanted[0],
            wanted[0] + 1,
            1100,
            1411,
            1999,
            len(values) // 2,
            len(values),
        }
    )
    detector, found = make(name, **options), []
    for begin, end in zip([0, *cuts], [*cuts, len(values)], strict=True):
        found += [begin + k for k in fires(detector, values[begin:end])]
        text = json.dumps(detector.state_dict(), allow_nan=False)
        detector = make(name, **options)
        fires(detector, values[:300])  # what it held before must not matter
        detector.load_state_dict(json.loads(text))
        assert json.dumps(detector.state_dict()) == text
    assert found == wanted
    assert detector.state_dict() == whole.state_dict()


@pytest.mark.parametrize("name", OPTIONS)
def test_reset_equals_a_new_detector(name):
    detector = make(name)
    fires(detector, MIXED[:1500])
    detector.reset()
    assert detector.state_dict() == make(name).state_dict()


@pytest.mark.parametrize("name", OPTIONS)
def test_state_stays_small_on_a_long_steady_stream(name):
    detector = make(name)
    fires(detector, errors((0.1, 2000 if name in ("kswin", "ensemble") else 200_000)))
    assert len(json.dumps(detector.state_dict())) < 32_000


@pytest.mark.parametrize("name", OPTIONS)
def test_state_of_other_kind_options_or_version_is_refused(name):
    detector = make(name)
    fires(detector, MIXED[:100])
    other = "adwin" if name != "adwin" else "kswin"
    with pytest.raises(CheckpointError, match="saved state"):
        detector.load_state_dict(make(other).state_dict())
    if name == "ensemble":
        with pytest.raises(CheckpointError, match="not that of an ensemble of 3 detectors"):
            detector.load_state_dict(make(name, members=["adwin", "kswin"]).state_dict())
        return
    with pytest.raises(CheckpointError, match=f"'{name}' has options = .*'both'"):
        detector.load_state_dict(make(name, direction="both").state_dict())
    with pytest.raises(CheckpointError, match=f"'{name}' has river = '0.1', this run has"):
        detector.load_state_dict({**detector.state_dict(), "river": "0.1"})


def damage(state):
    """Yield copies of ``state`` with one value gone, of another type, or flipped."""
    for key, value in state.items():
        yield {k: v for k, v in state.items() if k != key}
        yield {**state, key: None}
        yield {**state, key: {"no": "such"}}
        if isinstance(value, float):
            yield {**state, key: float("nan")}
        if isinstance(value, dict):
            yield from ({**state, key: inner} for inner in damage(value))
        if isinstance(value, list):  # of an ensemble's members
            for i, item in enumerate(value):
                for inner in damage(item) if isinstance(item, dict) else ():
                    yield {**state, key: [*value[:i], inner, *value[i + 1 :]]}


@pytest.mark.parametrize("name", OPTIONS)
def test_a_damaged_state_is_refused_and_changes_nothing(name):
    detector = make(name)
    fires(detector, MIXED[:300])
    before = detector.state_dict()
    for bad in damage(before):
        with pytest.raises(CheckpointError, match="saved state"):
            detector.load_state_dict(bad)
        assert detector.state_dict() == before


@pytest.mark.parametrize(
    ("name", "held"),
    [
        ("adwin", {"_drift_detected", "_helper"}),
        ("kswin", {"_drift_detected", "p_value", "n", "window", "_rng"}),
        (
            "page_hinkley",
            {
                *("_drift_detected", "mode", "_x_mean", "_sum_increase", "_sum_decrease"),
                *("_min_increase", "_max_decrease"),
            },
        ),
    ],
)
def test_what_is_saved_of_rivers_detectors_is_all_that_they_hold(name, held):
    plain = {"adwin": drift.ADWIN, "kswin": drift.KSWIN, "page_hinkley": drift.PageHinkley}[name]()
    state = make(name).state_dict()
    assert set(state["state"]) == held
    assert set(vars(plain)) - held - set(state["options"]) <= {"_test_drift"}  # a method


def test_a_flipped_byte_in_adwins_window_is_refused():
    state = make("adwin").state_dict()
    window = bytearray(base64.b64decode(state["state"]["_helper"]["bytes"]))
    for index in range(0, len(window), 7):
        bad = window.copy()
        bad[index] ^= 0xFF
        text = base64.b64encode(bad).decode()
        with pytest.raises(CheckpointError, match="checksum"):
            helper = {**state["state"]["_helper"], "bytes": text}
            make("adwin").load_state_dict({**state, "state": {**state["state"], "_helper": helper}})


def test_kswin_is_deterministic_by_seed():
    wanted = fires(make("kswin", seed=1), MIXED)
    assert fires(make("kswin", seed=1), MIXED) == wanted
    assert any(fires(make("kswin", seed=seed), MIXED) != wanted for seed in (2, 3))


@pytest.mark.parametrize("name", OPTIONS)
def test_a_metric_that_is_not_finite_is_refused(name):
    for value in (float("nan"), float("inf")):
        with pytest.raises(DivergenceError, match=f"is {value}"):
            make(name).update(value)


@pytest.mark.parametrize(
    ("name", "option", "value", "limit"),
    [
        ("adwin", "delta", 0.0, "greater than 0"),
        ("adwin", "delta", 1.0, "less than 1"),
        ("adwin", "delta", "small", "valid number"),
        ("adwin", "clock", 0, "greater than or equal to 1"),
        ("adwin", "direction", "down", "'up' or 'both'"),
        ("kswin", "alpha", 1.5, "less than 1"),
        ("kswin", "window_size", 39, r"at least twice stat_size \(20\)"),
        ("kswin", "seed", -1, "greater than or equal to 0"),
        ("page_hinkley", "threshold", 0, "greater than 0"),
        ("page_hinkley", "threshold", float("inf"), "finite"),
        ("page_hinkley", "alpha", 1.1, "less than or equal to 1"),
        ("ensemble", "vote", "most", "'any', 'majority' or 'unanimous'"),
        ("ensemble", "window", 0, "greater than or equal to 1"),
        ("ensemble", "members", [], "at least 1 item"),
    ],
)
def test_an_option_out_of_range_is_named_with_its_limit(name, option, value, limit):
    with pytest.raises(
        ConfigError, match=rf"^detector\.options\.{option}: .*{limit}.*{value!r}"[:-2]
    ):
        make(name, **{option: value})


@pytest.mark.parametrize(
    ("member", "message"),
    [
        ("adwinn", r"members\[1\] \('adwinn'\): unknown detector 'adwinn', did you mean 'adwin'"),
        ({"name": "adwin", "delta": 2}, r"members\[1\] \('adwin'\): detector\.options\.delta: "),
        ({"name": "adwin", "dleta": 2}, r"members\[1\] .* no option 'dleta', did you mean 'delta'"),
        ({"delta": 0.1}, r"members\[1\]: has no name"),
    ],
)
def test_a_wrong_member_of_an_ensemble_is_named(member, message):
    with pytest.raises(ConfigError, match=message):
        make("ensemble", members=["kswin", member])


class Scripted:
    """Fires at the given positions since the start."""

    def __init__(self, *positions):
        self.positions, self.seen, self.resets = positions, 0, 0

    def update(self, value):
        self.seen += 1
        return self.seen - 1 in self.positions

    def reset(self):
        self.resets += 1

    def state_dict(self):
        return {"seen": self.seen}

    def load_state_dict(self, state):
        self.seen = state["seen"]


@pytest.mark.parametrize(
    ("vote", "window", "wanted"),
    [
        ("any", 1, [2, 6, 9, 20]),
        ("majority", 3, []),
        ("majority", 4, [9]),
        ("majority", 5, [6]),
        ("majority", 8, [6]),
        ("unanimous", 7, []),
        ("unanimous", 8, [9]),
    ],
)
def test_votes_stand_for_window_values(vote, window, wanted, monkeypatch):
    monkeypatch.setattr(registry, "_parts", dict(registry._parts))  # what is added is taken back
    members = [Scripted(2), Scripted(6), Scripted(9, 20)]
    registry.register("detector", "scripted", lambda which: members[which])
    detector = make(
        "ensemble",
        members=[{"name": "scripted", "which": which} for which in range(3)],
        vote=vote,
        window=window,
    )
    assert fires(detector, [0.0] * 30) == wanted
    assert {member.resets for member in members} == {len(wanted)}


def test_importing_detectors_does_not_import_river():
    code = (
        "import sys, distcl.monitoring.detectors; "
        "sys.exit('river' in sys.modules or 'torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
