"""Text files as a source of token ids, a domain each."""

from __future__ import annotations

import glob
import logging
import sys
import sysconfig
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import NonNegativeInt

from distcl.config import DataConfig, StreamConfig
from distcl.config.files import file_stamp
from distcl.config.paths import reachable
from distcl.data.sources.token_cache import cached
from distcl.data.sources.tokens import (
    Tokenizer,
    Tokens,
    TokenSource,
    check_length,
    create_tokenizer,
    encoded,
)
from distcl.errors import ConfigError, DataError
from distcl.registry import checked
from distcl.types import Ids, SourceInfo

log = logging.getLogger("distcl")

Document = tuple[str, bytes]
"""Where it comes from, and its text in UTF-8."""


@checked("stream")
def text(
    config: StreamConfig,
    data: DataConfig | None = None,
    length: int = 128,
    tokenizer: str = "bytes",
    end: str = "",
    domains: tuple[str, ...] = (),
    pack: bool = True,
    max_bytes: NonNegativeInt = 0,
) -> tuple[TokenSource, TokenSource]:
    """Return (train, test) of text files for language modelling; each domain is an experience.

    ``domains``: files, folders (all files below) or globs, relative to ``stream.path``, one domain
    each; without them, the folders in ``stream.path``, or its files, or the file itself. Texts that
    every Python has: ``python:topics`` (its documentation), ``python:library`` (its source code),
    ``python:names`` (the names of characters). ``max_bytes``: how much of a domain is read, whole
    characters; 0: all.

    ``tokenizer``: "bytes", or a ``tokenizer.json`` or its folder; ``end``: its token that ends a
    document. ``pack``: documents one after the other are cut into samples of ``length`` tokens, and
    what is left of a domain is dropped, with a word; otherwise each document is cut by itself, and
    its last sample is shorter. Of each domain ``stream.test_fraction`` of the samples is held out.

    Raises ConfigError if domains and experiences do not fit, DataError naming a file without text.
    """
    check_length(length)
    found = _domains(config, list(domains))
    concepts = config.concepts
    if concepts and len(found) != concepts:
        raise ConfigError(
            f"source 'text' has {len(found)} domains ({', '.join(found)}), but the stream has "
            f"{concepts} experiences (stream.experiences, stream.options.domains)"
        )
    known = create_tokenizer(tokenizer, end)
    what = {
        "source": "text",
        "path": config.path,
        "domains": [
            [name, (data and data.cache and stamps_of(files)) or sys.version]
            for name, files in found.items()
        ],
        "cut": [length, pack, max_bytes],
        "tokenizer": [known.name, known.end],
    }
    made = cached(data, what, lambda: _made(config, found, known, length, pack, max_bytes))
    return made.holdout(config.test_fraction)


def _made(
    config: StreamConfig,
    found: dict[str, list[Path]],
    known: Tokenizer,
    length: int,
    pack: bool,
    max_bytes: int,
) -> TokenSource:
    """Read the files of each domain; none: it is built in."""
    parts: list[Tokens] = []
    starts: list[Ids] = []
    lengths: list[Ids] = []
    groups: list[Ids] = []
    at = 0
    for k, (name, files) in enumerate(found.items()):
        documents = _files(files) if files else _BUILT_IN[name]()
        within = _up_to(documents, max_bytes, name) if max_bytes else documents
        pieces = [encoded(known, where, content) for where, content in within]
        sizes = [sum(map(len, pieces))] if pack else [len(document) for document in pieces]
        begin, size = _cut(np.array(sizes, dtype=np.int64), length, pack)
        if not len(begin):
            raise DataError(f"domain '{name}' has {sum(sizes)} tokens, too few for {length}")
        if left := sum(sizes) - int(size.sum()):
            log.info("[data] domain '%s': %d of %d tokens are left over", name, left, sum(sizes))
        parts += pieces
        starts.append(begin + at)
        lengths.append(size)
        groups.append(np.full(len(begin), k, dtype=np.int64))
        at += sum(sizes)
    info = SourceInfo(
        f"'{config.path}'" if config.path else "text",
        classes=known.size,
        groups=np.concatenate(groups),
        group_names=tuple(found),
        varies=not pack,
        tokens=known.size,
        tokenizer=known.name,
        longest=max(int(size.max()) for size in lengths),
    )
    tokens = np.concatenate(parts)
    cuts = np.concatenate(starts), np.concatenate(lengths)
    return TokenSource(tokens, *cuts, known.end, pack, info)


def _cut(sizes: Ids, length: int, pack: bool) -> tuple[Ids, Ids]:
    """Return starts and lengths of the samples of stretches of ``sizes`` tokens.

    Without ``pack`` a stretch may end in a shorter sample, of two tokens or more.
    """
    begin, counts = sizes.cumsum() - sizes, sizes // length if pack else -(-sizes // length)
    within = np.arange(counts.sum()) - np.repeat(counts.cumsum() - counts, counts)
    lengths = np.minimum(np.repeat(sizes, counts) - within * length, length)
    starts = np.repeat(begin, counts) + within * length
    return starts[lengths > 1], lengths[lengths > 1]


def _up_to(documents: Iterator[Document], most: int, name: str) -> Iterator[Document]:
    """Yield documents of ``most`` bytes together: the last is cut, between characters."""
    left = most
    for where, content in documents:
        if len(content) > left:
            log.info("[data] domain '%s' is cut after %d bytes (max_bytes)", name, most)
            end = left
            while end > max(0, left - 3) and content[end] & 0xC0 == 0x80:
                end -= 1
            if end:
                yield where, content[:end]
            return
        yield where, content
        left -= len(content)


def _domains(config: StreamConfig, wanted: list[str]) -> dict[str, list[Path]]:
    """Return the files of each domain by its name; of what is built in, none."""
    base = reachable(config.path or ".")
    if wanted:
        return {name: [] if name in _BUILT_IN else _matching(base, name) for name in wanted}
    if not config.path:
        raise ConfigError("source 'text' needs stream.path or stream.options.domains")
    if not base.exists():
        raise DataError(f"stream.path: there is no '{base}'")
    if base.is_file():
        return {base.name: [base]}
    within = sorted(path for path in base.iterdir() if not path.name.startswith("."))
    found = [path for path in within if path.is_dir()] or within
    if not found:
        raise DataError(f"'{base}' holds no files")
    domains = {path.name: _below(path) for path in found}
    for name in (name for name, files in domains.items() if not files):
        raise DataError(f"domain '{name}' has no files in '{base}'")
    return domains


def _matching(base: Path, pattern: str) -> list[Path]:
    path = base / reachable(pattern)
    every = map(Path, glob.glob(str(reachable(pattern)), root_dir=base, recursive=True))
    found = (
        _below(path)
        if path.exists()
        else sorted(p for p in map(base.joinpath, every) if p.is_file())
    )
    if not found:
        raise DataError(f"stream.options.domains: '{pattern}' matches no file in '{base}'")
    return found


def _below(path: Path) -> list[Path]:
    """Return a file, or all files below a folder, by name; those that begin with a dot are not."""
    if path.is_file():
        return [path]
    every = sorted(p for p in path.rglob("*") if p.is_file())
    return [p for p in every if not any(part.startswith(".") for part in p.relative_to(path).parts)]


def bytes_of(path: Path) -> bytes:
    """Return what a file holds; DataError if it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"'{path}' cannot be read: {error.strerror}") from None


def stamps_of(paths: list[Path]) -> list[dict[str, Any]]:
    """Return what tells whether files change; DataError if one cannot be read."""
    try:
        return [file_stamp(path) for path in paths]
    except OSError as error:
        raise DataError(f"'{error.filename}' cannot be read: {error.strerror}") from None


def _files(paths: list[Path]) -> Iterator[Document]:
    for path in paths:
        content = bytes_of(path)
        if b"\0" in content[:4096]:
            raise DataError(f"'{path}' is no text: it has bytes of value 0")
        yield f"'{path}'", content


def _topics() -> Iterator[Document]:
    from pydoc_data.topics import topics

    for name, content in sorted(topics.items()):
        yield f"topic '{name}'", content.encode()


def _library() -> Iterator[Document]:
    folder = Path(sysconfig.get_path("stdlib"))
    return _files(sorted(folder.glob("*.py")))


def _names() -> Iterator[Document]:
    """The names of characters, 256 characters a document."""
    for start in range(0, 0x1_0000, 256):
        lines = (f"{chr(c)} {unicodedata.name(chr(c), '')}" for c in range(start, start + 256))
        named = "\n".join(line for line in lines if len(line) > 2)
        if named:
            yield f"characters from {start}", named.encode(errors="replace")


_BUILT_IN = {"python:topics": _topics, "python:library": _library, "python:names": _names}
