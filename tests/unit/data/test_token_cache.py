"""Token ids that are kept: made once, mapped by all, made anew when anything of them is another."""

from __future__ import annotations

import json
import logging
import multiprocessing

import numpy as np
import pytest
import torch

from distcl.config import DataConfig, StreamConfig
from distcl.data.sources import records, text
from distcl.data.stream import create_stream
from distcl.errors import ConfigError, DataError
from tests.unit.data.test_token_shards import files, lines, same


def config(path, source="text", experiences=2, **options):
    return StreamConfig(
        source=source,
        path=str(path),
        drift="none",
        experiences=experiences,
        test_fraction=0.3,
        options=options,
    )


def kept(config, cache):
    return create_stream(config, 0, DataConfig(cache=str(cache)))


def made(cache):
    return sorted(path.stem for path in cache.glob("*.json"))


@pytest.mark.parametrize("kind", ["packed", "cut", "lines", "classes"])
def test_what_is_kept_is_what_was_made_and_is_not_made_again(kind, tmp_path, monkeypatch):
    (tmp_path / "f").mkdir()
    wanted = {
        "packed": lambda: config(files(tmp_path / "f"), length=12),
        "cut": lambda: config(files(tmp_path / "f"), length=12, pack=False),
        "lines": lambda: config(lines(tmp_path / "l"), "jsonl", length=9, domain="where"),
        "classes": lambda: config(lines(tmp_path / "l"), "jsonl", 1, length=9, label="mood"),
    }[kind]()
    cache = tmp_path / "cache"
    plain = create_stream(wanted, 0)
    same(kept(wanted, cache), plain)
    for module in (text, records):
        monkeypatch.setattr(module, "encoded", None)  # nothing is tokenized from here on
    again = kept(wanted, cache)
    same(again, plain)
    tokens = again.sources[0].arrays[0]
    assert isinstance(tokens.base, np.memmap) and not tokens.flags.writeable
    assert len(made(cache)) == 1


def test_another_file_or_option_is_another_cache_and_a_damaged_one_is_made_anew(tmp_path, caplog):
    folder, cache = files(tmp_path / "f"), tmp_path / "cache"
    wanted = config(folder, length=12)
    kept(wanted, cache)
    kept(config(folder, length=11), cache)
    kept(config(folder, length=12, pack=False), cache)
    assert len(made(cache)) == 3
    (folder / "a" / "0.txt").write_text("other words, more of them than before")
    first = set(made(cache))
    before = kept(wanted, cache)
    (new,) = set(made(cache)) - first
    plain = create_stream(wanted, 0)
    same(before, plain)
    path = cache / f"{new}.tokens.npy"
    whole = path.read_bytes()
    for damage in (whole[:-9], whole[:-9] + b"\1" + whole[-8:], b"", None):
        path.unlink() if damage is None else path.write_bytes(damage)
        caplog.clear()
        with caplog.at_level(logging.WARNING, "distcl"):
            same(kept(wanted, cache), plain)
        assert "tokens in data.cache are damaged, and made anew: " in caplog.text
    (cache / f"{new}.json").write_text("{")
    same(kept(wanted, cache), plain)
    assert json.loads((cache / f"{new}.json").read_text())["tokens"] == 257
    assert len(made(cache)) == 4 and path.read_bytes() == whole


def test_what_cannot_be_made_or_written_is_told(tmp_path):
    path, cache = lines(tmp_path / "l"), tmp_path / "cache"
    path.write_text('{"text": 3}')
    for _ in range(2):
        with pytest.raises(DataError, match="line 1: 'text' is no text"):
            kept(config(path, "jsonl", 1), cache)
    assert made(cache) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"data.cache: '.*file.*' cannot be written: "):
        kept(config(lines(path), "jsonl", 1), tmp_path / "file" / "x")


def _opened(wanted, cache, barrier, queue):
    torch.set_num_threads(1)
    count = []
    encoded = records.encoded

    def counting(*args):
        count.append(1)
        return encoded(*args)

    records.encoded = counting
    barrier.wait()
    queue.put((len(kept(wanted, cache).experiences[0].train), bool(count)))


def test_of_several_processes_one_makes_it_and_the_others_wait(tmp_path):
    context = multiprocessing.get_context("fork")
    barrier, queue = context.Barrier(3), context.Queue()
    wanted = config(lines(tmp_path / "l", 2000), "jsonl", 1, length=9)
    arguments = (wanted, tmp_path / "cache", barrier, queue)
    processes = [context.Process(target=_opened, args=arguments) for _ in range(3)]
    for process in processes:
        process.start()
    found = sorted(queue.get(timeout=60) for _ in processes)
    for process in processes:
        process.join(60)
    assert len({size for size, _ in found}) == 1 and sum(maker for _, maker in found) == 1


def test_domains_in_another_order_are_other_experiences(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(name * 40)
    for order in (["a.txt", "b.txt"], ["b.txt", "a.txt"]):
        stream = kept(config(tmp_path, length=8, domains=order), tmp_path / "cache")
        assert [e.name for e in stream.experiences] == order
        first = stream.read(stream.experiences[0].train)
        assert chr(int(first.x.min())) == order[0][0]
