import json

import numpy as np
import pytest
import torch

from distcl.config import StreamConfig
from distcl.data.fingerprint import check_ids, data_fingerprint
from distcl.data.replay_buffer import ReplayBuffer
from distcl.data.stream import create_stream
from distcl.errors import ConfigError, DataError
from distcl.losses import judged_by
from distcl.types import GENERAL, pack_ids, unpack_ids


def arrays(path, rows, shape=(4,), classes=3, first=0.0, dtype=np.float32):
    x = (first + np.arange(rows)).repeat(int(np.prod(shape))).reshape(rows, *shape)
    np.savez(path, x=x.astype(dtype), y=np.arange(rows) % classes)
    return str(path)


@pytest.fixture
def described(tmp_path):
    general = arrays(tmp_path / "general.npz", 30, classes=2, first=1000.0)
    return {
        "source": "arrays",
        "path": arrays(tmp_path / "own.npz", 60),
        "drift": "permute",
        "experiences": 3,
        "general": {"source": "arrays", "path": general},
    }


def stream_of(described):
    return create_stream(StreamConfig(**described), 0)


def test_general_samples_are_read_as_they_are_beside_those_that_drift(described):
    stream, plain = stream_of(described), stream_of(described | {"general": {}})
    assert [e.train.tolist() for e in stream.experiences] == [
        e.train.tolist() for e in plain.experiences
    ]
    general = stream.info.general
    experience, rows, test = unpack_ids(general)
    assert set(experience) == {GENERAL} and len(general) == 24 and not test.any()
    own = stream.experiences[2].train[:5]
    ids = np.concatenate([general[[7, 2]], own, general[[2]]])
    batch = stream.read(ids)
    assert batch.ids.tolist() == ids.tolist() and batch.total == len(ids)
    wanted = plain.read(own)
    assert torch.equal(batch.x[2:7], wanted.x) and torch.equal(batch.y[2:7], wanted.y)
    base = stream.general.source.read(rows[[7, 2, 2]])
    assert torch.equal(batch.x[[0, 1, 7]], base.x) and (base.x >= 1000).all()
    assert torch.equal(batch.y[[0, 1, 7]], base.y)
    assert len(stream.read(general[:0])) == 0
    check_ids(stream, general, "who")
    with pytest.raises(DataError, match=r"who: sample \d+ is not in stream\.general: row 24 of 24"):
        check_ids(stream, pack_ids(GENERAL, np.array([0, 24])), "who")


def test_the_history_holds_general_samples_first_and_for_good(described):
    stream = stream_of(described)
    general, first, second = stream.info.general, *(e.train for e in stream.experiences[:2])
    history = ReplayBuffer(stream, 10, 5, copies=True)
    assert history.ids().tolist() == general.tolist()
    alone = ReplayBuffer(stream_of(described | {"general": {}}), 10, 5)
    for ids in (first, second):
        wanted = np.concatenate([general, alone.after(ids)])
        assert history.after(ids).tolist() == wanted.tolist()
        history.add(ids)
        alone.add(ids)
        assert history.ids().tolist() == wanted.tolist()
    ids = history.ids()[::-3]
    assert torch.equal(history.read(ids).x, stream.read(ids).x)
    again = ReplayBuffer(stream, 10, 5, copies=True)
    again.load_state_dict(history.state_dict())
    assert again.after(first).tolist() == history.after(first).tolist()
    before = ReplayBuffer(stream_of(described | {"general": {}}), 10, 5)
    before.add(first)
    for copies in (False, True):  # a run that had none yet goes on with them
        later = ReplayBuffer(stream, 10, 5, copies)
        later.load_state_dict(before.state_dict())
        assert later.ids().tolist() == [*general.tolist(), *before.ids().tolist()]
        assert torch.equal(later.read(later.ids()).x, stream.read(later.ids()).x)
    closed = ReplayBuffer(stream, 10, 5, takes=False)
    closed.add(first)
    assert closed.ids().tolist() == general.tolist()


def test_the_fingerprint_knows_general_data(described, tmp_path):
    before = data_fingerprint(stream_of(described))
    assert before["general samples"] == 24 and before == data_fingerprint(stream_of(described))
    arrays(tmp_path / "general.npz", 30, classes=2, first=1001.0)
    now = data_fingerprint(stream_of(described))
    assert {key for key in now if now[key] != before[key]} == {"general samples read"}


@pytest.mark.parametrize(
    ("general", "error", "message"),
    [
        ({"path": "a"}, ValueError, r"stream\.general needs a source"),
        ({"source": "arays"}, ValueError, r"stream\.general\.source: .*did you mean 'arrays'"),
        ({"source": "arrays", "pth": "a"}, ValueError, r"stream\.general\.pth: .* mean 'path'"),
        ({"source": "arrays", "path": 3}, ValueError, r"stream\.general\.path: "),
        ({"source": "arrays", "path": "{}/gone.npz"}, DataError, r"gone\.npz"),
        ({"source": "digits"}, DataError, r"stream\.general does not fit the stream: .*shape"),
        ({"source": "arrays", "path": "{}/many.npz"}, DataError, r"has 9 classes, .* the stream 3"),
    ],
)
def test_what_does_not_fit_is_refused_by_its_key(described, general, error, message, tmp_path):
    arrays(tmp_path / "many.npz", 60, classes=9)
    if isinstance(general.get("path"), str):
        general = general | {"path": general["path"].format(tmp_path)}
    with pytest.raises(error, match=message):
        stream_of(described | {"general": general})


def lines(path, rows):
    path.write_text("\n".join(json.dumps({"text": text, "label": label}) for text, label in rows))
    return str(path)


def texts(tmp_path, general, options=None, names="ab"):
    own = [(f"text {k}", names[k % 2]) for k in range(12)]
    described = {"source": "jsonl", "path": lines(tmp_path / "own.jsonl", own), "drift": "none"}
    described |= {"experiences": 1, "options": {"label": "label"}}
    table = {"source": "jsonl", "path": lines(tmp_path / "general.jsonl", general)}
    return described | {"general": table | {"options": options or {"label": "label"}}}


def test_labels_that_mean_other_classes_are_refused(tmp_path):
    same = [("known", "a"), ("known too", "b"), ("also", "a"), ("this", "b")] * 2
    assert len(stream_of(texts(tmp_path, same)).info.general) == 6
    other = [(text, {"a": "b", "b": "c"}[label]) for text, label in same]
    with pytest.raises(DataError, match=r"class 0 is 'a' in one, 'b' in the other: labels would"):
        stream_of(texts(tmp_path, other))


def test_token_ids_of_another_tokenizer_are_refused(tmp_path):
    tokenizers = pytest.importorskip("tokenizers", reason="the package tokenizers is not installed")
    words = {"[UNK]": 0, "text": 1, "known": 2, "</s>": 3}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    made.save(str(tmp_path / "tokenizer.json"))
    described = texts(tmp_path, [("known", "a"), ("text", "b")] * 4)
    described["options"]["tokenizer"] = str(tmp_path)
    with pytest.raises(
        DataError, match=r"stream\.general is bytes, that of the stream is a file of"
    ):
        stream_of(described)
    described["general"]["options"] = {"label": "label", "tokenizer": str(tmp_path)}
    assert stream_of(described).spec.tokens == 4


def test_what_foretells_nothing_is_known_of_general_data_too(tmp_path):
    rows = np.arange(24).reshape(6, 4) % 5
    np.savez(tmp_path / "own.npz", x=rows, y=rows)
    labels = np.full((6, 4), -100)
    labels[:, 0] = 1
    np.savez(tmp_path / "general.npz", x=rows, y=labels)
    described = {"source": "arrays", "path": str(tmp_path / "own.npz"), "drift": "none"}
    general = {"source": "arrays", "path": str(tmp_path / "general.npz")}
    stream = stream_of(described | {"experiences": 1, "general": general})
    assert "general.npz" in stream.spec.lone
    with pytest.raises(DataError, match=r"general\.npz.: row 0 has no token to foretell"):
        judged_by("next_token", stream.spec)


def test_a_history_of_general_data_alone_needs_them(tmp_path):
    from tests.small import execute

    with pytest.raises(ConfigError, match=r"history_of = 'general' needs stream\.general"):
        execute("train", ("continual_learning.history_of=general",), tmp_path)
    keys = ("continual_learning.history_of=general", "continual_learning.buffer_size=9")
    with pytest.raises(ConfigError, match=r"buffer_size = 9 bounds what earlier experiences leave"):
        execute("train", (*keys, 'stream.general={source = "digits"}'), tmp_path / "b")


def test_general_data_that_nothing_replays_are_told(tmp_path, caplog):
    from tests.small import execute

    with caplog.at_level("WARNING", "distcl"):
        execute("train", ('stream.general={source = "digits"}', "training.epochs=1"), tmp_path)
    assert "stream.general is not replayed: update_mode = 'base' takes no" in caplog.text
